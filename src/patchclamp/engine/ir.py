"""The graph engine's own small representation: nodes that call operators.

Nothing here knows torch.export; capture.py fills it, codegen.py runs it, bounds
and relevance will walk it. A node's arguments hold other nodes directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch.utils import _pytree as pytree


class Kind(Enum):
    """What a node stands for."""

    INPUT = auto()
    """A tensor of the call, by number."""
    CONST = auto()
    """A parameter, buffer (by path) or constant tensor."""
    OP = auto()
    """An operator applied to arguments."""
    TAG = auto()
    """The identity: marks a module's input or output. Edits at a module's value act here,
    so that they reach only those who read the value through this module."""


@dataclass(eq=False)
class Node:
    """One value.

    Attributes:
        kind: see `Kind`.
        address: its site address ("" for values that are no sites, such as sizes).
        operation: the operator's short name ("softmax"), or "input", "output", "const".
        module: path of the innermost module that computes it.
        call: which call of that module (0 for the first).
        target: what is called, for OP.
        args, kwargs: arguments; leaves may be nodes.
        path: parameter or buffer path, for CONST.
        constant: the tensor itself, for CONST without a path.
        number: which input tensor, for INPUT.
        shape: symbolic sizes; None for values that are not one tensor.
        dtype: of the tensor.
    """

    kind: Kind
    address: str = ""
    operation: str = ""
    module: str = ""
    call: int = 0
    target: Callable[..., object] | None = None
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)
    path: str = ""
    constant: torch.Tensor | None = None
    number: int = 0
    shape: tuple[int | str, ...] | None = None
    dtype: torch.dtype | None = None

    def inputs(self) -> list[Node]:
        """The nodes among the arguments, in order."""
        return [
            x
            for x in pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_node)
            if isinstance(x, Node)
        ]

    def replace_inputs(self, swap: Callable[[Node], Node]) -> None:
        """Point the arguments at other nodes."""

        def change(x: object) -> object:
            return swap(x) if isinstance(x, Node) else x

        self.args = pytree.tree_map(change, self.args, is_leaf=_is_node)
        self.kwargs = pytree.tree_map(change, self.kwargs, is_leaf=_is_node)

    def __repr__(self) -> str:
        return f"<{self.kind.name} {self.address or self.operation} {self.shape}>"


def _is_node(x: object) -> bool:
    return isinstance(x, Node)


@dataclass
class Graph:
    """A captured network.

    Attributes:
        nodes: in an order in which they can be computed.
        outputs: leaves of the output; nodes where they are computed.
        out_spec: how the leaves make up the output.
    """

    nodes: list[Node]
    outputs: list[object]
    out_spec: pytree.TreeSpec

    def users(self) -> dict[Node, list[Node]]:
        """For every node, the nodes that read it."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in dict.fromkeys(node.inputs()):
                users[source].append(node)
        return users

    def values(self) -> Iterator[Node]:
        """The nodes that are sites."""
        return (node for node in self.nodes if node.address)

    def upstream(self, wanted: list[Node]) -> set[Node]:
        """Everything that `wanted` depends on, itself included."""
        seen: set[Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += node.inputs()
        return seen

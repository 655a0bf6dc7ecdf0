"""Python code for one request: which values, which transforms, with or without the output.

Only what the request depends on is run, in the captured order; every value is
let go after its last use. Constants are handed in at each run, so that the
code always sees the network's present weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from patchclamp.core.errors import CaptureError
from patchclamp.engine.ir import Graph, Kind, Node

Program = Callable[
    [Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[Callable[..., torch.Tensor]]],
    tuple[list[torch.Tensor], list[object]],
]

_PLAIN = (int, float, bool, str)


def _size(x: torch.Tensor, dim: int) -> int:
    return x.shape[dim]


_SWAPPED: dict[object, Callable[..., object]] = {
    torch.ops.aten.view.default: torch.reshape,
    torch.ops.aten._unsafe_view.default: torch.reshape,
    torch.ops.aten.sym_size.int: _size,
}
"""`view` becomes `reshape`: an edited value may be laid out differently."""


@dataclass(frozen=True)
class Compiled:
    """Generated code and what it has to be handed.

    Attributes:
        program: run(inputs, constants, transforms) -> (recorded values, output leaves).
        constants: the constant nodes, in the order in which they are handed in.
        num_operators: how many operators the request runs.
        source: the generated text.
    """

    program: Program
    constants: tuple[Node, ...]
    num_operators: int
    source: str


def compile_request(
    graph: Graph, record: Sequence[Node], transformed: Sequence[Node], *, output: bool
) -> Compiled:
    """Generate the code of one request.

    Args:
        graph: the network.
        record: values to hand back.
        transformed: values that pass through `transforms[i]` as soon as they are computed.
        output: also compute the network's output.
    """
    return _Writer(graph, record, transformed, output=output).compiled()


class _Writer:
    def __init__(
        self, graph: Graph, record: Sequence[Node], transformed: Sequence[Node], *, output: bool
    ) -> None:
        self.record = record
        self.outs = graph.outputs if output else []
        wanted = [*record, *(x for x in self.outs if isinstance(x, Node))]
        needed = graph.upstream(wanted)
        self.order = [n for n in graph.nodes if n in needed]
        self.kept = set(wanted)
        self.transformed = {node: i for i, node in enumerate(transformed)}
        self.names: dict[Node, str] = {}
        self.held: dict[str, object] = {}
        self.lines: list[str] = []
        self.constants: list[Node] = []
        self.last = self._last_uses()

    def _last_uses(self) -> dict[Node, Node]:
        return {source: node for node in self.order for source in node.inputs()}

    def compiled(self) -> Compiled:
        num = 0
        for node in self.order:
            num += node.kind is Kind.OP
            self._write(node)
        record = ", ".join(self.names[n] for n in self.record)
        outs = ", ".join(self._literal(x) for x in self.outs)
        body = "\n    ".join([*self.lines, f"return [{record}], [{outs}]"])
        source = f"def run(I, C, E):\n    {body}\n"
        scope = dict(self.held)
        exec(compile(source, "<patchclamp graph>", "exec"), scope)
        program: Program = scope["run"]  # type: ignore[assignment]  # just defined by the source
        return Compiled(program, tuple(self.constants), num, source)

    def _write(self, node: Node) -> None:
        name = self.names.setdefault(node, f"v{len(self.names)}")
        if node.kind is Kind.INPUT:
            line = f"{name} = I[{node.number}]"
        elif node.kind is Kind.CONST:
            line = f"{name} = C[{len(self.constants)}]"
            self.constants.append(node)
        elif node.kind is Kind.TAG:
            line = f"{name} = {self._literal(node.args[0])}"
        else:
            target = _SWAPPED.get(node.target, node.target)
            given = [self._literal(a) for a in node.args]
            given += [f"{k}={self._literal(v)}" for k, v in node.kwargs.items()]
            line = f"{name} = {self._hold(target)}({', '.join(given)})"
        if node in self.transformed:
            line += f"; {name} = E[{self.transformed[node]}]({name})"
        self.lines.append(line)
        done = [
            self.names[s]
            for s in dict.fromkeys(node.inputs())
            if self.last[s] is node and s not in self.kept
        ]
        if done:
            self.lines.append(f"del {', '.join(done)}")

    def _hold(self, thing: object) -> str:
        name = f"h{len(self.held)}"
        self.held[name] = thing
        return name

    def _literal(self, x: object) -> str:
        if isinstance(x, Node):
            return self.names[x]
        if isinstance(x, (list, tuple)):
            return "[" + ", ".join(self._literal(i) for i in x) + "]"
        if isinstance(x, slice):
            raise CaptureError("a captured operator takes a Python slice", got=repr(x))
        if x is None or (type(x) in _PLAIN and not isinstance(x, float)):
            return repr(x)
        if isinstance(x, torch.SymInt):
            raise CaptureError("a captured operator holds a size that is not in the graph")
        return self._hold(x)

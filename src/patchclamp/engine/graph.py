"""The graph engine: a captured network, run by code written for each request.

It reaches every operator's value, runs only what a request depends on, and
reads the weights from the live module at every run, so that it never holds a
second copy. It serves calls of the one form that it was captured with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from torch.utils import _pytree as pytree

from patchclamp.core.errors import EngineError
from patchclamp.core.sites import Site
from patchclamp.engine.attention import (
    Attention,
    expanded,
    expanded_addresses,
    find_attention,
    score_shape,
)
from patchclamp.engine.axes import channel_first, name_axes
from patchclamp.engine.capture import Capture
from patchclamp.engine.codegen import Compiled, compile_request
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.protocol import EngineName, Transform
from patchclamp.model.inputs import Call

_MAX_PROGRAMS = 256


@dataclass
class GraphEngine:
    """Runs a captured network; see the module docstring.

    Attributes:
        module: the live network, for its weights.
        capture: what was captured.
        structure: the form of call that it serves.
    """

    module: nn.Module
    capture: Capture
    structure: str
    name: EngineName = EngineName.GRAPH
    _programs: dict[object, Compiled] = field(default_factory=dict, repr=False)
    _expansions: dict[frozenset[str], tuple[Graph, dict[str, Node]]] = field(
        default_factory=dict, repr=False
    )
    planned: dict[object, object] = field(default_factory=dict, repr=False)
    """What engine/wavefront.py learned of the graph: plans without values, by sizes of the call."""

    @cached_property
    def attention(self) -> list[Attention]:
        """Every attention, found by structure."""
        return find_attention(self.capture.graph)

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {n.address: n for n in self.capture.graph.values()}

    @cached_property
    def _hidden(self) -> dict[str, str]:
        """Addresses that exist once a fused attention is written out -> its address."""
        return {
            address: node.address
            for node in self.capture.graph.values()
            if node.kind is Kind.OP and node.operation == "attention"
            for address in expanded_addresses(node).values()
        }

    @cached_property
    def _table(self) -> dict[str, Site]:
        modules = dict(self.module.named_modules())
        table: dict[str, Site] = {}
        for order, node in enumerate(self.capture.graph.values()):
            if node.kind is Kind.OP and node.operation == "attention":
                for role, address in expanded_addresses(node).items():
                    shape = score_shape(node)
                    if shape is not None:
                        table[address] = self._site(node, address, role, shape, order)
            shape = node.shape or ()
            table[node.address] = self._site(node, node.address, node.operation, shape, order)
            if node.kind is Kind.TAG and node.operation == "output":
                own = modules[node.module]
                channels = channel_first(own) and len(shape) > 2
                table[node.address] = replace(
                    table[node.address],
                    axes=name_axes(shape, channels=channels),
                    parameters=sum(p.numel() for p in own.parameters()),
                )
        for attention in self.attention:
            for role, address in attention.roles.items():
                site = table.get(address)
                axes = attention.axes(role)
                if site is not None and attention.num_heads is None and len(axes) == len(site.axes):
                    table[address] = replace(site, axes=axes)
        return table

    def _site(
        self, node: Node, address: str, operation: str, shape: tuple[int | str, ...], order: int
    ) -> Site:
        channels = node.operation in ("conv2d", "conv1d", "conv3d", "batch_norm")
        return Site(
            address=address,
            module=node.module,
            operation=operation,
            axes=name_axes(shape, channels=channels and len(shape) > 2),
            shape=shape,
            dtype=str(node.dtype).removeprefix("torch."),
            engines=frozenset({str(EngineName.GRAPH)}),
            order=order,
        )

    def sites(self) -> Mapping[str, Site]:
        """Every tensor in the captured network, in the order of the forward pass."""
        return self._table

    def producer(self, address: str) -> str | None:
        """Address of the value that a module's input or output was made as; None for none."""
        node = self._nodes.get(address)
        while node is not None and node.kind is Kind.TAG and node.operation == "input":
            source = node.args[0]
            node = source if isinstance(source, Node) else None
        return node.address or None if node is not None else None

    def serves(self, call: Call) -> str | None:
        """None if this call can run here, else why not."""
        if call.structure != self.structure:
            return "it was captured for a call with other arguments"
        for number, (x, dims) in enumerate(zip(call.tensors(), self.capture.dims, strict=True)):
            for size, dim in zip(x.shape, dims, strict=True):
                if isinstance(dim, int) and size != dim:
                    return f"it was captured with input {number} of shape {dims}"
        if self.module.training:
            return "the network was captured in evaluation mode and is now in training mode"
        return None

    def run(
        self,
        call: Call,
        *,
        record: Sequence[str] = (),
        transforms: Mapping[str, Transform] | None = None,
        output: bool = True,
    ) -> tuple[object, dict[str, torch.Tensor]]:
        """One pass through the captured network.

        Raises:
            EngineError: unknown address, or a call of another form than the captured one.
        """
        problem = self.serves(call)
        if problem is not None:
            raise EngineError(
                f"the graph engine cannot run this call: {problem}", hint="use engine='hooks'"
            )
        changes = transforms or {}
        compiled = self.compiled(tuple(record), tuple(changes), output=output)
        constants = [self.constant(n) for n in compiled.constants]
        given = call.tensors()
        values, leaves = compiled.program(given, constants, list(changes.values()))
        foreign = {x.untyped_storage().data_ptr() for x in (*given, *constants)}
        values = [  # what is recorded shares no memory with inputs or weights
            v.clone() if v.untyped_storage().data_ptr() in foreign else v for v in values
        ]
        result = pytree.tree_unflatten(leaves, self.capture.graph.out_spec) if output else None
        return result, dict(zip(record, values, strict=True))

    def values(self, call: Call, nodes: Sequence[Node]) -> list[torch.Tensor]:
        """Values of nodes of the captured graph, which need not be sites."""
        with torch.no_grad():
            program = compile_request(self.capture.graph, list(nodes), [], output=False)
            constants = [self.constant(n) for n in program.constants]
            return program.program(call.tensors(), constants, [])[0]

    def compiled(
        self, record: tuple[str, ...], transformed: tuple[str, ...], *, output: bool
    ) -> Compiled:
        """The code of a request, from the cache where it was asked for before."""
        key = (record, transformed, output)
        if key not in self._programs:
            touched = [*record, *transformed]
            unknown = [a for a in touched if a not in self._nodes and a not in self._hidden]
            if unknown:
                raise EngineError(
                    f"the graph engine has no value '{unknown[0]}'",
                    hint="net.coverage() lists what each engine offers",
                )
            which = frozenset(self._hidden[a] for a in touched if a in self._hidden)
            graph, nodes = self._expanded(which)
            if len(self._programs) >= _MAX_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = compile_request(
                graph,
                [nodes[a] for a in record],
                [nodes[a] for a in transformed],
                output=output,
            )
        return self._programs[key]

    def _expanded(self, which: frozenset[str]) -> tuple[Graph, dict[str, Node]]:
        if not which:
            return self.capture.graph, self._nodes
        if which not in self._expansions:
            graph = expanded(self.capture.graph, which)
            self._expansions[which] = graph, {n.address: n for n in graph.values()}
        return self._expansions[which]

    def constant(self, node: Node) -> torch.Tensor:
        """The present value of a CONST node: a weight of the live module, or a fixed tensor."""
        if node.constant is not None:
            return node.constant
        owner, _, name = node.path.rpartition(".")
        value: torch.Tensor = getattr(self.module.get_submodule(owner), name)
        return value

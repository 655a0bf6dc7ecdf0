"""The wiring of linear and convolutional layers; see engine/layers.py.

A source is the input of a layer. Which earlier unit an input unit *is* (through
rectifiers, pooling, flattening, concatenation) is not read off operator names but
measured: every earlier layer's output is set to random values and the gradient says
which of its units an input unit depends on. An input unit that depends on exactly one
earlier unit is that unit; one that mixes several is a writer of its own.

Shape suffixes: B batch, I input units, J output units, R readers, W writers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.core.circuit import Node, Reader
from patchclamp.core.errors import TargetError
from patchclamp.engine.codegen import Compiled, compile_request
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind
from patchclamp.engine.ir import Node as Value
from patchclamp.engine.layers import Layer, MaskedLayers, masked_layers
from patchclamp.engine.targets import Metric, measured
from patchclamp.methods.circuits.network.wiring import EdgeVariants, Recording, Slopes, Wiring
from patchclamp.model.inputs import Call, principal
from patchclamp.net import Net

INPUT = ":input"
_PROBES = 4  # pairs of opposite signs, so that every rectifier is open in one of them


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWiring(Wiring):
    """Input units write, output units read."""

    layers: tuple[Layer, ...]
    groups: tuple[Tensor, ...]
    first_reader: tuple[int, ...]
    mask: MaskedLayers = field(repr=False)
    _programs: dict[object, Compiled] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, net: Net, engine: GraphEngine, layers: tuple[Layer, ...]) -> LayerWiring:
        """Measure which unit is which, and number writers and readers."""
        readers = [Reader(Node(layer.site, j)) for layer in layers for j in range(layer.num_out)]
        first_reader = np.cumsum([0, *(layer.num_out for layer in layers)])[:-1]
        origins = _origins(net, engine, layers)
        writers: dict[Node, int] = {}
        groups, fed = [], []
        for layer, found in zip(layers, origins, strict=True):
            names = [
                units[0] if len(units) == 1 else Node(_own_name(layer), i)
                for i, units in enumerate(found)
            ]
            groups.append(torch.tensor([writers.setdefault(n, len(writers)) for n in names]))
            fed.append(found)
        row = {r.node: i for i, r in enumerate(readers)}
        shape = (len(readers), len(writers))
        possible, feeds = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        roots = []
        for i, layer in enumerate(layers):
            rows = slice(int(first_reader[i]), int(first_reader[i]) + layer.num_out)
            possible[rows, groups[i].unique().numpy()] = True
            earlier = [
                (row[n], int(groups[i][k])) for k, f in enumerate(fed[i]) for n in f if n in row
            ]
            for r, w in earlier:
                feeds[r, w] = True
            if not earlier:
                roots.append(i)
        return cls(
            net=net,
            engine=engine,
            layers=layers,
            writers=tuple(writers),
            readers=tuple(readers),
            possible=possible,
            feeds=feeds,
            roots=tuple(roots),
            groups=tuple(groups),
            first_reader=tuple(int(i) for i in first_reader),
            mask=masked_layers(engine.capture.graph, layers, len(engine.capture.dims)),
        )

    def _ran(
        self,
        graph: Graph,
        call: Call,
        *,
        extra: Sequence[Tensor] = (),
        record: Sequence[Value] = (),
        transforms: Mapping[Value, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        changes = dict(transforms or {})
        key = (id(graph), tuple(record), tuple(changes))
        if key not in self._programs:
            self._programs[key] = compile_request(graph, list(record), list(changes), output=True)
        compiled = self._programs[key]
        constants = [self.engine.constant(n) for n in compiled.constants]
        values, leaves = compiled.program(
            [*call.tensors(), *extra], constants, list(changes.values())
        )
        return principal(pytree.tree_unflatten(leaves, graph.out_spec)), values

    def record(self, call: Call) -> Recording:
        with torch.no_grad():
            output, values = self._ran(
                self.engine.capture.graph, call, record=[layer.data for layer in self.layers]
            )
        return Recording(values=tuple(v.detach() for v in values), output=output)

    def slopes(
        self,
        call: Call,
        metric: Metric,
        rows: Tensor,
        held: Mapping[int, Tensor] | None = None,
    ) -> Slopes:
        caught: dict[Value, Tensor] = {}

        def catch(node: Value, value: Tensor | None = None) -> Callable[[Tensor], Tensor]:
            def keep(x: Tensor) -> Tensor:
                x = (x if value is None else value.expand_as(x)).clone()
                if not x.requires_grad:
                    x.requires_grad_(True)
                caught[node] = x
                return x.clone()

            return keep

        held = held or {}
        catches = {
            layer.data: catch(layer.data, held.get(i)) for i, layer in enumerate(self.layers)
        }
        catches |= {layer.node: catch(layer.node) for layer in self.layers}
        with torch.enable_grad():
            output, _ = self._ran(self.engine.capture.graph, call, transforms=catches)
            found = measured(metric, output, rows)
            if not found.requires_grad:
                raise TargetError(f"the metric '{metric.name}' does not depend on the network")
            nodes = list(caught)
            grads = torch.autograd.grad(found.sum(), [caught[n] for n in nodes], allow_unused=True)
        slope = {
            n: torch.zeros_like(caught[n]) if g is None else g
            for n, g in zip(nodes, grads, strict=True)
        }
        return Slopes(
            metric=found.detach(),
            at=tuple(caught[layer.data].detach() for layer in self.layers),
            values=tuple(slope[layer.data] for layer in self.layers),
            reads=tuple(slope[layer.node] for layer in self.layers),
        )

    def products(self, differences: Sequence[Tensor], slopes: Slopes) -> Tensor:
        num_rows = slopes.metric.shape[0]
        made = differences[0].new_zeros(num_rows, len(self.readers), len(self.writers))
        for i, layer in enumerate(self.layers):
            weight = self.engine.constant(layer.weight).detach()
            difference = differences[i].expand_as(slopes.values[i])
            part_BJI = layer.edge_products(difference, slopes.reads[i], weight)
            rows = slice(self.first_reader[i], self.first_reader[i] + layer.num_out)
            made[:, rows].index_add_(2, self.groups[i], part_BJI)
        return made

    def node_products(self, differences: Sequence[Tensor], slopes: Slopes) -> Tensor:
        num_rows = slopes.metric.shape[0]
        made = differences[0].new_zeros(num_rows, len(self.writers))
        for i, layer in enumerate(self.layers):
            product = (differences[i] * slopes.values[i]).movedim(layer.unit_axis, 1)
            made.index_add_(
                1, self.groups[i], product.flatten(2).sum(2) if product.ndim > 2 else product
            )
        return made

    def variants(
        self, call: Call, differences: Sequence[Tensor], edges: Sequence[tuple[int, int]]
    ) -> Iterator[EdgeVariants]:
        for i, layer in enumerate(self.layers):
            first = self.first_reader[i]
            mine = [e for e in edges if first <= e[0] < first + layer.num_out]
            if not mine:
                continue
            yield EdgeVariants(
                address=layer.node.address,
                edges=tuple(mine),
                first_row=0,
                make=partial(self._cut, i, differences[i]),
            )

    def _cut(
        self, i: int, difference: Tensor, base: Tensor, edges: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The layer's output with one edge cut at a time."""
        layer, first = self.layers[i], self.first_reader[i]
        weight = layer.oriented(self.engine.constant(layer.weight).detach())
        units = base.movedim(layer.unit_axis, 0)
        changed: dict[int, Tensor] = {}
        made = []
        for reader, writer in edges:
            if writer not in changed:
                mine = self.groups[i] == writer
                kept = weight * mine.to(weight.dtype).reshape(1, -1, *[1] * layer.spatial)
                part = layer.apply_each(difference, kept.expand(base.shape[0], *kept.shape))
                changed[writer] = part.movedim(layer.unit_axis, 0)
            cut = units.clone()
            cut[reader - first] += changed[writer][reader - first]
            made.append(cut.movedim(0, layer.unit_axis))
        return torch.cat(made)

    def place_axis(self, source: int) -> int:
        return 1 if self.layers[source].spatial else -1

    def position_means(self, source: int, value: Tensor) -> Tensor:
        unit = self.layers[source].unit_axis % value.ndim
        others = [a for a in range(1, value.ndim) if a != unit]
        return value.mean(others, keepdim=True) if others else value

    def run(self, call: Call, references: Sequence[Tensor], cut: Tensor) -> Tensor:
        output, _ = self._ran(self.mask.graph, call, extra=self._masks(references, cut))
        return output

    def record_cut(self, call: Call, references: Sequence[Tensor], cut: Tensor) -> Recording:
        with torch.no_grad():
            output, values = self._ran(
                self.mask.graph, call, extra=self._masks(references, cut), record=self.mask.data
            )
        return Recording(values=tuple(v.detach() for v in values), output=output)

    def _masks(self, references: Sequence[Tensor], cut: Tensor) -> list[Tensor]:
        """Reference and mask of every layer in turn."""
        extra: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            rows = slice(self.first_reader[i], self.first_reader[i] + layer.num_out)
            extra += [references[i], cut[:, rows][:, :, self.groups[i]]]
        return extra


def _own_name(layer: Layer) -> str:
    """The name of an input that is no earlier layer's: the address of the value."""
    return layer.data.address or f"{layer.site}:input"


def _origins(
    net: Net, engine: GraphEngine, layers: Sequence[Layer]
) -> list[list[tuple[Node, ...]]]:
    """For every layer and input unit, the earlier units that it is made of."""
    graph, call = engine.capture.graph, net.example
    generator, sign = torch.Generator(), 1
    inputs = [
        n for n in graph.nodes if n.kind is Kind.INPUT and n.dtype and n.dtype.is_floating_point
    ]
    places = [*inputs, *(layer.node for layer in layers)]
    caught: dict[Value, Tensor] = {}

    def set_random(node: Value) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            drawn = sign * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            caught[node] = drawn.requires_grad_()
            return caught[node].clone()

        return put

    program = compile_request(graph, [layer.data for layer in layers], places, output=False)
    constants = [engine.constant(n) for n in program.constants]
    found: list[list[set[Node]]] = [[set() for _ in range(layer.num_in)] for layer in layers]
    for probe in range(_PROBES):
        caught.clear()
        sign = 1 - 2 * (probe % 2)
        generator.manual_seed(probe // 2)
        with torch.enable_grad():
            values, _ = program.program(call.tensors(), constants, [set_random(n) for n in places])
            for k, layer in enumerate(layers):
                if values[k].requires_grad:  # a layer may read a constant, or an embedding
                    _probe(found[k], layer, values[k], caught, layers, generator)
    return [[tuple(sorted(units, key=str)) for units in of_layer] for of_layer in found]


def _probe(
    found: list[set[Node]],
    layer: Layer,
    value: Tensor,
    caught: Mapping[Value, Tensor],
    layers: Sequence[Layer],
    generator: torch.Generator,
) -> None:
    """Add to `found` what each unit of `value` depends on."""
    units = value.movedim(layer.unit_axis, 0)
    sites = {earlier.node: earlier for earlier in layers}
    nodes = list(caught)
    if not nodes:
        return  # it depends on constants only
    for i in range(layer.num_in):
        weights = torch.randn(units[i].shape, generator=generator, dtype=units.dtype)
        grads = torch.autograd.grad(
            (units[i] * weights).sum(),
            [caught[n] for n in nodes],
            retain_graph=True,
            allow_unused=True,
        )
        for node, grad in zip(nodes, grads, strict=True):
            if grad is None or not bool(grad.any()):
                continue
            earlier = sites.get(node)
            if earlier is not None:
                by_unit = grad.movedim(earlier.unit_axis, 0).flatten(1).any(1)
                found[i].update(Node(earlier.site, j) for j in by_unit.nonzero()[:, 0].tolist())
            elif node.number == 0:
                found[i].update(Node(INPUT, j) for j in _input_units(grad, layer, value))


def _input_units(grad: Tensor, layer: Layer, value: Tensor) -> list[int]:
    """Units of the network's input: channels of a convolution, else features; elements of a
    picture that is flattened before the first layer."""
    if layer.spatial:
        return grad.transpose(0, 1).flatten(1).any(1).nonzero()[:, 0].tolist()
    flat = grad.flatten(1) if grad[0].numel() == layer.num_in else grad.flatten(0, -2)
    return flat.any(0).nonzero()[:, 0].tolist()

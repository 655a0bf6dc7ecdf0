"""Edges of networks of linear and convolutional layers, known from how they were built.

Every call of an operator is a *wire*: it says which nodes made the operator's input
units and through which weights the construction sends something. From the wires follow
the structural edges, and, by patching one edge after the other, those that matter.

Patching an edge here is one forward pass with one hook: the operator's call gets one
writer's units from the other run, and one of its outputs is kept. It rests on nothing
but the module, so that methods can be measured against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchclamp.core.circuit import Edge, Node
from patchclamp.engine.targets import Metric
from patchclamp.truth.planted_circuit import Family, PlantedCircuit

INPUT = ":input"
"""Site of the network's own input units or channels."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One call of a linear or convolutional operator.

    Attributes:
        module: path of the operator.
        call: which of its calls in a forward pass.
        address: its name in edges: the path, with `@call` where it is called several times.
        writers: who makes its input units, in their order; after flattening each
            writer makes the same number of neighbouring inputs.
        num_outputs: units or channels that it makes.
        true: (writer, output) pairs through which the construction sends something.
    """

    module: str
    call: int
    address: str
    writers: tuple[Node, ...]
    num_outputs: int
    true: frozenset[tuple[int, int]]

    @property
    def outputs(self) -> tuple[Node, ...]:
        """Its output units or channels, as readers and as writers of what follows."""
        return nodes(self.address, self.num_outputs)

    def edges(self) -> Iterator[Edge]:
        """Every possible edge."""
        for reader in self.outputs:
            yield from (Edge(writer, reader) for writer in self.writers)


def nodes(site: str, num: int, start: int = 0) -> tuple[Node, ...]:
    """Neighbouring units of a site."""
    return tuple(Node(site, unit) for unit in range(start, start + num))


def possible_edges(wires: Iterable[Wire]) -> list[Edge]:
    """Every edge that the anatomy allows, in the order of the forward pass."""
    return [edge for wire in wires for edge in wire.edges()]


def structural_edges(wires: Sequence[Wire], ends: Iterable[Node]) -> frozenset[Edge]:
    """Edges of the construction that lie on a way from an input to one of `ends`."""
    true = [Edge(w.writers[i], w.outputs[j]) for w in wires for i, j in sorted(w.true)]
    reached = {writer for wire in wires for writer in wire.writers if writer.site == INPUT}
    for edge in true:  # in the order of the forward pass, so that one sweep is enough
        if edge.writer in reached:
            reached.add(edge.reader)
    needed = set(ends)
    for edge in reversed(true):
        if edge.reader in needed:
            needed.add(edge.writer)
    return frozenset(e for e in true if e.writer in reached and e.reader in needed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Wired:
    """A network of wires with its pairs of inputs and its metric: all but the active edges.

    Attributes:
        inputs: place of every named feature along the axis of the input's units; where
            each step reads some, in the first step.
        ends: the output units that the metric reads.
        tolerance: patching what is no part of the circuit moves the metric by less.
    """

    name: str
    family: Family
    module: nn.Module
    wires: tuple[Wire, ...]
    clean: Tensor
    corrupt: Tensor
    metric: Metric
    inputs: Mapping[str, int]
    ends: tuple[Node, ...]
    tolerance: float
    description: str

    def effects(self, edges: Iterable[Edge]) -> dict[Edge, Tensor]:
        """See `edge_effects`."""
        return edge_effects(self.module, self.wires, self.clean, self.corrupt, self.metric, edges)

    def planted(self) -> PlantedCircuit:
        """The circuit, its active edges found among the structural ones by brute force."""
        structural = structural_edges(self.wires, self.ends)
        return PlantedCircuit(
            name=self.name,
            family=self.family,
            module=self.module,
            clean=self.clean,
            corrupt=self.corrupt,
            metric=self.metric,
            structural=structural,
            active=active_edges(self.effects(structural), self.tolerance),
            tolerance=self.tolerance,
            description=self.description,
        )


# ---- patching one edge ------------------------------------------------------------


def edge_effects(
    module: nn.Module,
    wires: Sequence[Wire],
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    edges: Iterable[Edge],
) -> dict[Edge, Tensor]:
    """Change of the metric by patching an edge: (direction, pair), noising before denoising.

    Cost: one forward pass of all pairs in both directions for every edge.
    """
    places = {
        (writer, reader): (wire, i, j)
        for wire in wires
        for i, writer in enumerate(wire.writers)
        for j, reader in enumerate(wire.outputs)
    }
    here, there = torch.cat([clean, corrupt]), torch.cat([corrupt, clean])
    rows = torch.arange(len(clean)).repeat(2)
    with torch.no_grad():
        before = _measured(metric, module(here), rows)
        donors = {(w.module, w.call): _taken(module, w, there) for w in wires}
        found = {}
        for edge in edges:
            wire, i, j = places[edge.writer, edge.reader]
            donor = donors[wire.module, wire.call]
            after = _hooked(module, wire, here, _patch(donor, i, len(wire.writers), j))
            found[edge] = (_measured(metric, after, rows) - before).unflatten(0, (2, -1))
    return found


def active_edges(effects: dict[Edge, Tensor], tolerance: float) -> frozenset[Edge]:
    """Edges that move the metric on some pair in some direction."""
    return frozenset(e for e, change in effects.items() if float(change.abs().max()) > tolerance)


_Change = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _hooked(module: nn.Module, wire: Wire, inputs: Tensor, change: _Change) -> Tensor:
    """The output when one call of an operator gives `change(operator, input, output)`."""
    calls = itertools.count()

    def hook(operator: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return change(operator, args[0], output) if next(calls) == wire.call else output

    handle = module.get_submodule(wire.module).register_forward_hook(hook)
    try:
        output: Tensor = module(inputs)
    finally:
        handle.remove()
    return output


def _taken(module: nn.Module, wire: Wire, inputs: Tensor) -> Tensor:
    """What the operator took in at this call."""
    taken: list[Tensor] = []

    def keep(operator: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        taken.append(given)
        return output

    _hooked(module, wire, inputs, keep)
    return taken[0]


def _patch(donor: Tensor, writer: int, num_writers: int, output_unit: int) -> _Change:
    def change(operator: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        axis = 1 if isinstance(operator, nn.Conv2d) else -1
        span = given.shape[axis] // num_writers
        mixed = given.clone()
        mixed.narrow(axis, writer * span, span).copy_(donor.narrow(axis, writer * span, span))
        made = operator.forward(mixed)
        patched = output.clone()
        patched.select(axis, output_unit).copy_(made.select(axis, output_unit))
        return patched

    return change


def _measured(metric: Metric, output: Tensor, rows: Tensor) -> Tensor:
    return metric(output if metric.position is None else output[:, metric.position], rows)


# ---- metrics ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OutputUnit:
    """The value of one output unit, at one position where there are several."""

    unit: int
    position: int | None = None
    name: str = "output unit"

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output[:, self.unit]


@dataclass(frozen=True, kw_only=True)
class OutputSum:
    """The sum of some units of the output over everything else but the row."""

    units: tuple[int, ...]
    position: None = None
    name: str = "sum of outputs"

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output[..., list(self.units)].flatten(1).sum(1)

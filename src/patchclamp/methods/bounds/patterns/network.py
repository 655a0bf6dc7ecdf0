"""A network with the units of a pattern found in it, and the inputs that are asked about.

What is said of a pattern here is said over the reals, of the network with the weights that it
has: z > 0 for active units, z <= 0 for inactive ones. Proofs cover z >= 0 for active units,
which is more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from patchclamp.bounding.edits import part
from patchclamp.bounding.lowering import Lowered, Rewrite, lower
from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Box
from patchclamp.core.errors import BoundError, InputError, SiteError
from patchclamp.core.sites import Tap
from patchclamp.engine.ir import Kind, Node
from patchclamp.methods.bounds.patterns.pattern import ACTIVE, FREE, Pattern
from patchclamp.methods.bounds.search.attack import outputs
from patchclamp.net import Net
from patchclamp.rules.operators.builder import Builder, Operand
from patchclamp.rules.relu import ReLU
from patchclamp.rules.value import Value


@dataclass(frozen=True, eq=False)
class Domain:
    """A box of inputs, flat: (num_inputs,) float64 each."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        Box(self.lower[None], self.upper[None])  # finite and not empty, or BoundError

    @classmethod
    def box(cls, example: Tensor, low: float | Tensor, high: float | Tensor) -> Domain:
        """All inputs of the shape of one example between two limits."""
        sides = (torch.as_tensor(s).double().expand(example.shape) for s in (low, high))
        return cls(*(side.flatten().clone() for side in sides))

    def ball(self, reference: Tensor, eps: float) -> Domain:
        """What of it is no farther than eps from one input, in each element.

        Its sides are rounded outwards, so no input of the ball is missing.
        """
        centre = reference.detach().double().flatten()
        if centre.shape != self.lower.shape or not bool(torch.isfinite(centre).all()) or eps < 0:
            raise InputError(
                "no ball can be made around this reference",
                got=f"{centre.numel()} elements, eps {eps}",
                expected=f"{self.lower.numel()} finite elements, eps at least 0",
            )
        low, high = centre - eps, centre + eps
        if eps > 0:
            low = torch.nextafter(low, torch.full_like(low, -torch.inf))
            high = torch.nextafter(high, torch.full_like(high, torch.inf))
        return Domain(torch.maximum(low, self.lower), torch.minimum(high, self.upper))

    def holds(self, inputs: Tensor) -> Tensor:
        """Which inputs (row, ...) lie in it."""
        flat = inputs.double().flatten(1)
        return ((flat >= self.lower) & (flat <= self.upper)).all(1)

    def clamped(self, inputs: Tensor) -> Tensor:
        """Inputs (row, ...) moved into it: (row, num_inputs)."""
        flat = inputs.double().flatten(1)
        return torch.minimum(torch.maximum(flat, self.lower), self.upper)

    def sampled(self, num: int, generator: torch.Generator) -> Tensor:
        """Uniform draws, (num, num_inputs)."""
        drawn = torch.rand(num, len(self.lower), generator=generator, dtype=torch.float64)
        return self.lower + (self.upper - self.lower) * drawn


@dataclass(frozen=True, eq=False)
class Part:
    """The units of a pattern at one value: flat numbers, and whether each is active."""

    value: Value
    index: Tensor
    active: Tensor


@dataclass(frozen=True, eq=False)
class Constrained:
    """A network in float64 and a pattern in it."""

    network: Lowered
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, net: Net, pattern: Pattern) -> Constrained:
        """Lower a network with one input and one output.

        Raises:
            BoundError: an operator without a rule. SiteError: a site that no ReLU reads.
            InputError: several inputs or outputs, or another number of units.
        """
        graph = net.graph.capture.graph
        ins = [n for n in graph.nodes if n.kind is Kind.INPUT]
        outs = [n for n in graph.outputs if isinstance(n, Node)]
        if len(ins) != 1 or len(outs) != 1:
            raise InputError(
                f"{net.name} has {len(ins)} inputs and {len(outs)} outputs",
                expected="one of each, to verify patterns",
            )
        example = [_precise(x) for x in net.example.rows(slice(0, 1), net.input_dims).tensors()]
        taps = {tap.site.address: (site, tap) for site in pattern.states for tap in net.taps(site)}
        nodes = {n.address: n for n in graph.values()}
        seen: dict[str, tuple[Value, Tensor]] = {}
        rewrites = {}
        for address, (site, tap) in taps.items():
            if address not in nodes:
                raise SiteError(f"site '{site}' is not in the captured network")
            rewrites[nodes[address]] = [_watched(site, tap, seen)]
        network = lower(
            graph,
            lambda n: _precise(net.graph.constant(n).detach()),
            example,
            {ins[0]: "input"},
            outs[0],
            torch.float64,
            rewrites=rewrites,
            exact=True,
        )
        made = (_part(network, site, s, *seen[site]) for site, s in pattern.states.items())
        return cls(network, tuple(p for p in made if len(p.index)))

    @property
    def num_inputs(self) -> int:
        """Elements of one input."""
        ((_, leaf),) = self.network.leaves.items()
        return prod(leaf.shape)

    @property
    def num_classes(self) -> int:
        """Elements of one output."""
        return prod(self.network.output.shape)

    def shaped(self, x: Tensor) -> dict[str, Tensor]:
        """Flat inputs (B, num_inputs) as the network's argument."""
        ((name, leaf),) = self.network.leaves.items()
        return {name: x.reshape(len(x), *leaf.shape)}

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, num_classes), and how far each unit is inside its state (B, size).

        Computed in float64; negative where a unit is outside. Differentiable.
        """
        if not self.parts:
            return outputs(self.network, x), x.new_zeros(len(x), 0)
        held: dict[Value, Tensor] = {}
        given = self.shaped(x)
        for value in self.network.values:
            made = [held[a] for a in value.arguments]
            held[value] = given[value.name] if value.rule is None else value.rule.forward(*made)
        inside = [
            held[p.value].flatten(1)[:, p.index] * torch.where(p.active, 1.0, -1.0).to(x)
            for p in self.parts
        ]
        return held[self.network.output].flatten(1), torch.cat(inside, 1)

    def certainly(self, x: Tensor, rows: Tensor) -> bool:
        """Whether, over the reals, one input follows the pattern and has rows . y <= 0.

        Args:
            x: (num_inputs,) float64; rows: (R, num_classes), each with entries of 0, 1 and -1.

        Decided by interval arithmetic that is rounded outwards; False where that leaves it open.
        """
        box = {n: Box(v, v) for n, v in self.shaped(x[None]).items()}
        bounds = Propagation(self.network, box, rounded=True)
        for p in self.parts:
            lower, upper = (side.flatten()[p.index] for side in bounds.interval(p.value))
            if not bool(torch.where(p.active, lower > 0, upper <= 0).all()):
                return False
        low, high = (side.flatten() for side in bounds.interval(self.network.output))
        size = torch.maximum(low.abs(), high.abs())
        most = rows.clamp(min=0) @ high + rows.clamp(max=0) @ low
        spare = 1e-12 * (rows.abs() @ size)  # thousands of roundings of a sum of a few terms
        ties = rows.abs().sum(1) == 0
        return bool(((most + spare <= 0) | ties).all())


def _watched(site: str, tap: Tap, seen: dict[str, tuple[Value, Tensor]]) -> Rewrite:
    """Leaves a value as it is, and notes which it is and which of its elements are meant."""

    def rewrite(b: Builder, x: Operand) -> Operand:
        if not isinstance(x, Value):
            raise BoundError(f"'{site}' does not depend on the input")
        seen[site] = (x, part(tap, x.shape, {})[0].flatten())
        return x

    return rewrite


def _part(network: Lowered, site: str, states: Tensor, value: Value, elements: Tensor) -> Part:
    readers = [v for v in network.values if value in v.arguments]
    if not any(isinstance(v.rule, ReLU) for v in readers):
        raise SiteError(
            f"no ReLU reads '{site}', so its units are neither active nor inactive",
            hint="patchclamp.methods.bounds.patterns.relu_sites(net) lists what ReLUs read",
        )
    if len(states) != len(elements):
        raise InputError(
            f"the pattern has another number of units at '{site}' than the network",
            got=str(len(states)),
            expected=str(len(elements)),
        )
    kept = (states != FREE).nonzero().flatten()
    return Part(value, elements[kept], states[kept] == ACTIVE)


def _precise(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x

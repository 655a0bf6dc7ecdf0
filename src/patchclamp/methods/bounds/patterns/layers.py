"""All layers bounded where a pattern holds, ready for branch and bound.

A unit of the pattern cuts the interval of what its ReLU reads at 0, and enters the bound of every
row as a Lagrange multiplier besides: for m >= 0, a row minus m z is a lower bound of the row
where z >= 0. Layers are bounded in order, each with the multipliers of the units up to it, the
first layer too: there the pattern cuts the box of inputs itself.

Source: Wang et al. 2021, arXiv 2103.06624 (multipliers of ReLU constraints).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Box
from patchclamp.bounding.slopes import Optimised, SlopeSearch
from patchclamp.methods.bounds.patterns.network import Constrained, Domain, Part
from patchclamp.methods.bounds.search.branching import divisible
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.methods.bounds.search.neuron_split import Root, Split
from patchclamp.rules.base import Interval, Nonlinear, gamma, magnitude
from patchclamp.rules.relu import ReLU
from patchclamp.rules.value import Value


class EmptyError(Exception):
    """No input of the domain follows the pattern. Caught by the methods, which say so."""


@dataclass(frozen=True, kw_only=True)
class LayerSearch:
    """Ascent on slopes and multipliers, for each row of each layer.

    Attributes:
        num_steps: of Adam; 0 leaves the multipliers out.
        rate: of its first step.
        decay: of the rate, at each step.
    """

    num_steps: int = 20
    rate: float = 0.2
    decay: float = 0.95

    def run(self, constrained: Constrained, domain: Domain, limits: Limits) -> Root:
        """Bound all layers. Raises EmptyError, OutOfTimeError."""
        sides = (constrained.shaped(side[None]) for side in (domain.lower, domain.upper))
        (name, low), (_, high) = (next(iter(side.items())) for side in sides)
        network = constrained.network
        bounds = Propagation(network, {name: Box(low, high)}, rounded=True)
        parts = {p.value: p for p in constrained.parts}
        seen: list[Part] = []
        for value in network.values:
            if not isinstance(value.rule, Nonlinear):
                continue
            for argument in value.arguments:
                limits.check()
                if argument in parts:
                    _cut(bounds, parts[argument])
                with torch.no_grad():
                    bounds.tighten(argument)
                if argument in parts and parts[argument] not in seen:
                    seen.append(parts[argument])
                if seen and self.num_steps and isinstance(value.rule, ReLU):
                    self._improve(bounds, argument, seen, limits)
                _require_some(bounds.interval(argument))
        places = [network.leaves[name], *divisible(network.values)]
        optimised = Optimised(bounds, SlopeSearch(num_steps=0), kept={})
        return Root(bounds, optimised, places, _given(places, constrained.parts))

    def _improve(
        self, bounds: Propagation, value: Value, seen: Sequence[Part], limits: Limits
    ) -> None:
        """Narrow what is open at a value, with multipliers of the parts seen so far."""
        open_ = ReLU(value.shape).open(bounds.interval(value)).flatten().nonzero().flatten()
        for index in bounds.pieces(value, open_, 2):
            low = self._least(bounds, value, index, 1.0, seen, limits)
            high = -self._least(bounds, value, index, -1.0, seen, limits)
            lower, upper = (side.clone() for side in bounds.interval(value))
            lower.view(-1)[index] = torch.maximum(lower.flatten()[index], low)
            upper.view(-1)[index] = torch.minimum(upper.flatten()[index], high)
            bounds.intervals[value] = Interval(lower, upper)

    def _least(
        self,
        bounds: Propagation,
        value: Value,
        index: Tensor,
        sign: float,
        seen: Sequence[Part],
        limits: Limits,
    ) -> Tensor:
        """Lower bounds of sign times some elements, (len(index),)."""
        rows, constant = bounds.start(value, index, sign)
        best = torch.full((1, len(index)), -torch.inf, dtype=constant.dtype)
        slopes = SlopeSearch.first(bounds, (rows, constant), best, {})
        size = float(magnitude(bounds.interval(value)).flatten()[index].mean())
        penalties = [Penalty.of(bounds, p, len(index), size) for p in seen]
        moving = [s.requires_grad_() for s in slopes.values()]
        wanted = [*moving, *(p.multipliers.requires_grad_() for p in penalties)]
        adam = torch.optim.Adam(wanted, lr=self.rate, betas=(0.9, 0.99))
        for step in range(self.num_steps + 1):
            limits.check()
            with torch.enable_grad():
                here, noise = dict(rows), torch.zeros_like(constant)
                for p in penalties:
                    held = here.get(p.part.value)
                    here[p.part.value] = p.rows() if held is None else held + p.rows()
                    noise = noise + p.noise()
                found = bounds.linearise(here, constant - noise, slopes).bound
            best = torch.maximum(best, found.detach())
            if step == self.num_steps or bool((best >= 0).all()):
                break
            gradients = torch.autograd.grad(-found.sum(), wanted, allow_unused=True)
            for x, gradient in zip(wanted, gradients, strict=True):
                x.grad = gradient
            adam.step()
            with torch.no_grad():
                for s in moving:
                    s.clamp_(0, 1)
                for p in penalties:
                    p.multipliers.clamp_(min=0)
            for group in adam.param_groups:
                group["lr"] *= self.decay
        return best[0]


@dataclass(frozen=True, eq=False)
class Penalty:
    """Multipliers (R, k) of one part, each in units of the rows' size over the unit's."""

    part: Part
    multipliers: Tensor
    scale: Tensor
    size: float

    @classmethod
    def of(cls, bounds: Propagation, part: Part, num_rows: int, row_size: float) -> Penalty:
        """All zero."""
        box = bounds.interval(part.value)
        size = magnitude(box).flatten()[part.index]
        zero = torch.zeros(num_rows, len(part.index), dtype=size.dtype)
        return cls(part, zero, row_size / size.clamp(min=1e-6), float(size.max()))

    def rows(self) -> Tensor:
        """What is added to R rows on the part's value, (1, R, *shape)."""
        force = self.multipliers * self.scale * torch.where(self.part.active, -1.0, 1.0)
        shape = self.part.value.shape
        on = force.new_zeros(len(force), torch.Size(shape).numel())
        return on.index_copy(1, self.part.index, force).reshape(1, len(force), *shape)

    def noise(self) -> Tensor:
        """More than rounding can do where rows on one value are added up, (1, R)."""
        total = (self.multipliers.detach() * self.scale).sum(1)
        return (gamma(8, total.dtype) * self.size * total)[None]


def _cut(bounds: Propagation, part: Part) -> None:
    """Active units are at least 0, inactive ones at most."""
    lower, upper = (side.clone() for side in bounds.interval(part.value))
    on, off = part.index[part.active], part.index[~part.active]
    lower.view(-1)[on] = lower.flatten()[on].clamp(min=0)
    upper.view(-1)[off] = upper.flatten()[off].clamp(max=0)
    bounds.intervals[part.value] = Interval(lower, upper)
    _require_some(bounds.intervals[part.value])


def _require_some(box: Interval) -> None:
    if bool((box.lower > box.upper).any()):
        raise EmptyError


def _given(places: Sequence[Value], parts: Sequence[Part]) -> tuple[Split, ...]:
    """The pattern's units as sides to start from."""
    return tuple(
        (places.index(p.value), unit, 0.0, active)
        for p in parts
        for unit, active in zip(p.index.tolist(), p.active.tolist(), strict=True)
    )

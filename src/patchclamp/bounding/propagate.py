"""Bounds through a lowered network: intervals forwards, linear bounds backwards (CROWN).

The argument of every nonlinear operator needs an interval before the operator can be replaced
by linear bounds. It comes from interval arithmetic first; what this leaves undecided is bounded
by going backwards to the perturbed sets. Only lower bounds are propagated, of rows and of
their negatives.

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020, arXiv 2002.12920 (general graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.sets import PerturbedSet
from patchclamp.rules.base import (
    Affine,
    Interval,
    Nonlinear,
    Relaxation,
    gamma,
    magnitude,
    one_hot,
)
from patchclamp.rules.relu import ReLU
from patchclamp.rules.value import Value

Sets = Mapping[str, PerturbedSet]
Slopes = Mapping[Value, Tensor]
"""For a nonlinear value, (num_slopes, N, R, *shape) in [0, 1]."""

MAX_ELEMENTS = 1 << 24
"""How many coefficients of one value are held at a time; more rows go in pieces."""


@dataclass(frozen=True)
class Linearised:
    """A lower bound of rows of the output as a linear function of what is perturbed.

    Attributes:
        rows: for every perturbed value, (N or 1, R, *shape).
        constant: (N, R).
        bound: the smallest value over the sets, (N, R).
    """

    rows: dict[Value, Tensor]
    constant: Tensor
    bound: Tensor


Start = tuple[dict[Value, Tensor], Tensor]
"""Rows on values, and their constants."""

Improve = Callable[[Start, Linearised, Value, Tensor, float], Tensor]
"""Better bounds of rows: (start, found, whose elements they are, which, their sign)."""


@dataclass(eq=False)
class Propagation:
    """Bounds of one network on N sets side by side.

    Attributes:
        network: what is bounded.
        sets: for every perturbed value, by name.
        intervals: the best known elementwise bounds of each value.
        rounded: subtract what rounding can do, so that bounds hold over the reals.
        improve: better bounds of rows that were linearised; see bounding/slopes.py.
    """

    network: Lowered
    sets: Sets
    intervals: dict[Value, Interval] = field(default_factory=dict)
    rounded: bool = False
    improve: Improve | None = None
    relaxed: dict[Value, Relaxation] = field(default_factory=dict)
    _sizes: dict[Value, Tensor] = field(default_factory=dict)

    # ---- forwards -------------------------------------------------------------

    def interval(self, value: Value) -> Interval:
        """Elementwise bounds by interval arithmetic from the best known ones of the arguments."""
        if value not in self.intervals:
            if value.rule is None:
                made = self.sets[value.name].hull()
            else:
                made = value.rule.interval(*(self.interval(a) for a in value.arguments))
            if value.known is not None:
                known = Interval(*(side.to(made.lower) for side in value.known))
                made = made.within(known)
            self.intervals[value] = made
        return self.intervals[value]

    def relaxation(self, value: Value, slopes: Tensor | None = None) -> Relaxation:
        """The linear bounds of a nonlinear value on its arguments' intervals."""
        rule = value.rule
        if not isinstance(rule, Nonlinear):
            raise TypeError(f"{value} is not nonlinear")
        if slopes is not None:
            return rule.relax(tuple(self.interval(a) for a in value.arguments), slopes)
        if value not in self.relaxed:
            self.relaxed[value] = rule.relax(tuple(self.interval(a) for a in value.arguments))
        return self.relaxed[value]

    # ---- backwards ------------------------------------------------------------

    def linearise(
        self,
        rows: dict[Value, Tensor],
        constant: Tensor,
        slopes: Slopes | None = None,
        met: dict[Value, Tensor] | None = None,
    ) -> Linearised:
        """Go backwards from rows on some values to the perturbed ones.

        Args:
            rows: on each value, (N or 1, R, *shape).
            constant: (N or 1, R).
            slopes: chosen slopes; missing values take the default.
            met: filled with the rows on every nonlinear value that is passed.
        """
        pending = {v.number: (v, A) for v, A in rows.items()}
        reached: dict[Value, Tensor] = {}
        while pending:
            value, A = pending.pop(max(pending))
            if value.rule is None:
                reached[value] = A
                continue
            if isinstance(value.rule, Affine):
                parts = value.rule.backward(A)
                gained = value.rule.constant(A)
            else:
                given = None if slopes is None else slopes.get(value)
                if met is not None:
                    met[value] = A.detach()
                relaxation = self.relaxation(value, given)
                parts, gained = relaxation.backward(A)
                if self.rounded:
                    boxes = [self.interval(a) for a in value.arguments]
                    size = relaxation.magnitude(*boxes)
                    constant = constant - _error(A, size, relaxation.num_terms)
            if gained is not None:
                constant = constant + gained
            if self.rounded and isinstance(value.rule, Affine) and _computes(value.rule):
                constant = constant - _error(A, self._size(value), value.rule.num_terms)
            for argument, part in zip(value.arguments, parts, strict=True):
                held = pending.get(argument.number)
                pending[argument.number] = (argument, part if held is None else held[1] + part)
        bound = constant
        for value, A in reached.items():
            bound = bound + self.sets[value.name].minimum(A)
            if self.rounded:
                size = magnitude(self.interval(value))
                bound = bound - _error(A, size, A[0, 0].numel())
        return Linearised(reached, constant, bound)

    def _size(self, value: Value) -> Tensor:
        if value not in self._sizes:
            rule = value.rule
            if not isinstance(rule, Affine):
                raise TypeError(f"{value} is not affine")
            self._sizes[value] = rule.magnitude(*(self.interval(a) for a in value.arguments))
        return self._sizes[value]

    def start(self, value: Value, index: Tensor, sign: float) -> tuple[dict[Value, Tensor], Tensor]:
        """Rows that read single elements of a value, one rule back where that is free."""
        rule = value.rule
        dtype = self.network.dtype
        if isinstance(rule, Affine) and not self.rounded:
            parts = rule.start(index)
            offset = rule.offset
            gained = (
                torch.zeros(1, len(index), dtype=dtype)
                if offset is None
                else offset.flatten()[index][None]
            )
            rows: dict[Value, Tensor] = {}
            for argument, part in zip(value.arguments, parts, strict=True):
                part = part * sign
                rows[argument] = rows[argument] + part if argument in rows else part
            return rows, gained * sign
        return {value: one_hot(index, value.shape, dtype) * sign}, torch.zeros(
            1, len(index), dtype=dtype
        )

    # ---- all layers -----------------------------------------------------------

    def tighten(self, value: Value) -> None:
        """Bound a value backwards, where interval arithmetic leaves something undecided."""
        box = self.interval(value)
        if self._is_exact(value):
            return
        wanted = undecided(self._readers(value), box).any(0).flatten().nonzero().flatten()
        if len(wanted) == 0:
            return
        lower, upper = (side.flatten(1).clone() for side in box)
        for index in self._pieces(value, wanted, lower.shape[0]):
            down = self._best(value, index, 1.0)
            up = -self._best(value, index, -1.0)
            lower[:, index] = torch.maximum(lower[:, index], down)
            upper[:, index] = torch.minimum(upper[:, index], up)
        self.intervals[value] = Interval(
            lower.reshape(box.lower.shape), upper.reshape(box.lower.shape)
        )

    def _best(self, value: Value, index: Tensor, sign: float) -> Tensor:
        start = self.start(value, index, sign)
        found = self.linearise(*start)
        if self.improve is None:
            return found.bound
        return self.improve(start, found, value, index, sign)

    def is_open(self, value: Value) -> bool:
        """Whether anything of a nonlinear value's arguments is undecided."""
        return any(
            bool(undecided([value], self.interval(argument)).any()) for argument in value.arguments
        )

    def _pieces(self, value: Value, wanted: Tensor, num: int) -> tuple[Tensor, ...]:
        widest = max(
            (
                v.rule.output if v.rule is not None else v.shape
                for v in self.network.values[: value.number + 1]
            ),
            key=lambda s: torch.Size(s).numel(),
        )
        at_once = max(1, MAX_ELEMENTS // (num * torch.Size(widest).numel()))
        pieces: tuple[Tensor, ...] = wanted.split(at_once)
        return pieces

    def _readers(self, value: Value) -> list[Value]:
        return [v for v in self.network.values if value in v.arguments]

    def _is_exact(self, value: Value) -> bool:
        """Interval arithmetic is exact one affine rule behind a perturbed box."""
        return value.rule is None or (
            isinstance(value.rule, Affine)
            and len(value.arguments) == 1
            and value.arguments[0].rule is None
        )

    def run(self) -> None:
        """Intervals of the arguments of every nonlinear operator, in order."""
        for value in self.network.values:
            if isinstance(value.rule, Nonlinear):
                for argument in value.arguments:
                    self.tighten(argument)

    def output(self, C: Tensor, d: Tensor, slopes: Slopes | None = None) -> Linearised:
        """Lower bounds of C . output + d; C (N or 1, R, *shape), d (N or 1, R)."""
        return self.linearise({self.network.output: C}, d, slopes)


def _computes(rule: Affine) -> bool:
    """Whether a rule does more than move values."""
    return bool(rule.num_terms) or rule.offset is not None


def _error(A: Tensor, size: Tensor, num_terms: int) -> Tensor:
    """What rounding can do to rows that meet values of this size."""
    total: Tensor = (A.detach().abs().flatten(2) @ size.flatten(1)[:, :, None])[:, :, 0]
    return gamma(num_terms + 4, A.dtype) * total + torch.finfo(A.dtype).tiny


def undecided(readers: list[Value], box: Interval) -> Tensor:
    """Which elements must be known better: bool (N, *shape)."""
    wanted = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in readers:
        if isinstance(reader.rule, ReLU):
            wanted |= reader.rule.open(box)
        elif isinstance(reader.rule, Nonlinear):
            wanted |= box.upper > box.lower
    return wanted

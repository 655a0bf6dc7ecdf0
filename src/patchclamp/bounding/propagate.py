"""Bounds through a lowered network: intervals forwards, linear bounds backwards (CROWN).

The argument of every nonlinear operator needs an interval before the operator can be replaced
by linear bounds. It comes from interval arithmetic first; what this leaves undecided is bounded
by going backwards to the perturbed sets. Only lower bounds are propagated, of rows and of
their negatives.

A ReLU needs to know of a negative argument no more than its sign: an element that shows to be
negative on the way, from the intervals of a layer that was met, is not followed any further.

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020, arXiv 2002.12920 (general graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.steps import Rows, Sets, Slopes, Steps, added, chosen, copies, dense
from patchclamp.rules.base import Affine, Interval, Nonlinear, gamma, one_hot
from patchclamp.rules.relu import ReLU
from patchclamp.rules.value import Value

__all__ = ["Improve", "Linearised", "Propagation", "Sets", "Slopes", "Start", "undecided"]

MAX_ELEMENTS = 1 << 24
"""How many coefficients of one value are held at a time; more rows go in pieces."""

MIN_SETTLED = 1 << 14
"""From how many coefficients on it pays to look which rows are settled on the way."""


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

Improve = Callable[[Value, Tensor], tuple[Tensor, Tensor]]
"""Other bounds of the elements of a value that are still undecided: (value, which), each (N, R)."""


@dataclass(eq=False)
class Propagation(Steps):
    """Bounds of one network on N sets side by side.

    Attributes:
        improve: better bounds of elements that were bounded once; see bounding/slopes.py.
    """

    improve: Improve | None = None

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
        walk = _Walk.of(self, dict(rows), constant, slopes)
        while (value := walk.next()) is not None:
            if met is not None and isinstance(value.rule, Nonlinear):
                met[value] = dense(walk.pending[value.number][1]).detach()
            walk.step(value)
        reached = {v: dense(A) for v, A in walk.pending.values()}
        return Linearised(reached, walk.constant, walk.bound())

    def start(self, value: Value, index: Tensor, sign: float) -> tuple[dict[Value, Tensor], Tensor]:
        """Rows that read single elements of a value, one rule back where that is free."""
        rule, dtype = value.rule, self.network.dtype
        nothing = torch.zeros(1, len(index), dtype=dtype)
        if not isinstance(rule, Affine) or (self.rounded and not copies(rule)):
            return {value: one_hot(index, value.shape, dtype) * sign}, nothing
        if copies(rule):
            parts = rule.start(index)
        else:
            parts = rule.backward(one_hot(index, value.shape, dtype))
        rows: dict[Value, Tensor] = {}
        for argument, part in zip(value.arguments, parts, strict=True):
            part = part * sign
            rows[argument] = rows[argument] + part if argument in rows else part
        offset = rule.offset
        return rows, nothing if offset is None else offset.flatten()[index][None] * sign

    # ---- all layers -----------------------------------------------------------

    def tighten(self, value: Value) -> None:
        """Bound a value backwards, where interval arithmetic leaves something undecided."""
        if self.is_exact(value):
            return
        for index in self.pieces(value, self._undecided(value), 2):
            self._tightened(value, index)
        if self.improve is not None:
            for index in self.pieces(value, self._undecided(value), 2):
                self._narrow(value, index, *self.improve(value, index))

    def _tightened(self, value: Value, index: Tensor) -> None:
        """Bound some elements, or only so far that they show to be dead."""
        walk = _Walk.of(self, *self._both(value, index))
        only_relu = all(isinstance(v.rule, ReLU) for v in self._readers(value))
        met = 0  # at the first, rows show no more than interval arithmetic did
        while (at := walk.next()) is not None:
            met += isinstance(at.rule, Nonlinear)
            if only_relu and isinstance(at.rule, ReLU) and met > 1 and walk.is_large():
                low, high = walk.sides()
                dead = (high <= 0).all(0)
                if 4 * int(dead.sum()) >= len(index):
                    gone, left = dead.nonzero().flatten(), (~dead).nonzero().flatten()
                    self._narrow(value, index[gone], low[:, gone], high[:, gone])
                    walk.keep(torch.cat([left, left + len(index)]))
                    index = index[left]
                    if not len(index):
                        return
            walk.step(at)
        self._narrow(value, index, *walk.sides())

    def _both(self, value: Value, index: Tensor) -> tuple[dict[Value, Rows], Tensor]:
        """`start` with sign 1, and behind it with sign -1."""
        found = self.first(value, index)
        if found is not None:
            return found
        rows, constant = self.start(value, index, 1.0)
        signed: dict[Value, Rows] = {v: torch.cat([A, -A], 1) for v, A in rows.items()}
        return signed, torch.cat([constant, -constant], 1)

    def _undecided(self, value: Value) -> Tensor:
        """Flat elements that a reader would know better, on any of the sets."""
        found = undecided(self._readers(value), self.interval(value))
        return found.flatten(1).any(0).nonzero().flatten()

    def _narrow(self, value: Value, index: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Take bounds of some elements, where they are better than the known ones."""
        box = self.interval(value)
        low, high = (side.flatten(1) for side in box)
        if len(index) == low.shape[1]:
            low, high = torch.maximum(low, lower), torch.minimum(high, upper)
        else:
            low = low.index_copy(1, index, torch.maximum(low.index_select(1, index), lower))
            high = high.index_copy(1, index, torch.minimum(high.index_select(1, index), upper))
        shape = box.lower.shape
        self.intervals[value] = Interval(low.reshape(shape), high.reshape(shape))

    def is_open(self, value: Value) -> bool:
        """Whether anything of a nonlinear value's arguments is undecided."""
        return any(
            bool(undecided([value], self.interval(argument)).any()) for argument in value.arguments
        )

    def pieces(self, value: Value, wanted: Tensor, num: int) -> tuple[Tensor, ...]:
        """Elements of a value in parts of which `num` rows each can be held at a time."""
        if not len(wanted):
            return ()
        num *= len(self.interval(value).lower)
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

    def run(self) -> None:
        """Intervals of the arguments of every nonlinear operator, in order."""
        for value in self.network.values:
            if isinstance(value.rule, Nonlinear):
                for argument in value.arguments:
                    self.tighten(argument)

    def output(self, C: Tensor, d: Tensor, slopes: Slopes | None = None) -> Linearised:
        """Lower bounds of C . output + d; C (N or 1, R, *shape), d (N or 1, R)."""
        return self.linearise({self.network.output: C}, d, slopes)


@dataclass(eq=False)
class _Walk:
    """Rows on their way backwards.

    Attributes:
        pending: by number, the values that rows have reached, and the rows.
        spent: sum of the absolute values of all that went into the constant, if bounds are
            rounded: adding them up may be wrong by a few ulps of it.
    """

    bounds: Propagation
    pending: dict[int, tuple[Value, Rows]]
    constant: Tensor
    slopes: Slopes
    spent: Tensor | None

    @classmethod
    def of(
        cls,
        bounds: Propagation,
        rows: dict[Value, Rows],
        constant: Tensor,
        slopes: Slopes | None = None,
    ) -> _Walk:
        """Before the first step."""
        spent = constant.detach().abs() if bounds.rounded else None
        pending = {v.number: (v, A) for v, A in rows.items()}
        return cls(bounds, pending, constant, slopes or {}, spent)

    def next(self) -> Value | None:
        """The last value with rows that is not perturbed itself."""
        for number in sorted(self.pending, reverse=True):
            value = self.pending[number][0]
            if value.rule is not None:
                return value
        return None

    def step(self, value: Value) -> None:
        """Pass one value."""
        _, A = self.pending.pop(value.number)
        parts, terms = self.bounds.through(value, A, self.slopes)
        for term in terms:
            self._gain(term)
        for argument, part in zip(value.arguments, parts, strict=True):
            held = self.pending.get(argument.number)
            whole = part if held is None else added(held[1], part)
            self.pending[argument.number] = (argument, whole)

    def _gain(self, term: Tensor) -> None:
        self.constant = self.constant + term
        if self.spent is not None:
            self.spent = self.spent + term.detach().abs()

    def bound(self) -> Tensor:
        """The smallest value over sets and intervals of what the rows have reached, (N, R)."""
        total, spent = self.constant, self.spent
        for value, A in self.pending.values():
            for term in self.bounds.least(value, A):
                total = total + term
                spent = None if spent is None else spent + term.detach().abs()
        if spent is None:
            return total
        num = 2 * len(self.bounds.network.values) + 4  # each value adds three terms at most
        return total - gamma(num, spent.dtype) * spent

    def sides(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, of rows that stand before their negatives."""
        low, high = self.bound().chunk(2, 1)
        return low, -high

    def is_large(self) -> bool:
        """Whether the rows all stand on one value, and are many."""
        if len(self.pending) > 1:
            return False
        ((_, A),) = self.pending.values()
        return (A if isinstance(A, Tensor) else A.A).numel() >= MIN_SETTLED

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.pending = {n: (v, chosen(A, rows)) for n, (v, A) in self.pending.items()}
        self.constant = self.constant.index_select(1, rows)
        self.spent = None if self.spent is None else self.spent.index_select(1, rows)


def undecided(readers: list[Value], box: Interval) -> Tensor:
    """Which elements must be known better: bool (N, *shape)."""
    wanted = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in readers:
        if isinstance(reader.rule, ReLU):
            wanted |= reader.rule.open(box)
        elif isinstance(reader.rule, Nonlinear):
            wanted |= box.upper > box.lower
    return wanted

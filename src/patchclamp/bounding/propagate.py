"""Bounds through a lowered network: intervals forwards, linear bounds backwards (CROWN).

The argument of every nonlinear operator needs an interval before the operator can be replaced
by linear bounds. It comes from interval arithmetic first; what this leaves undecided is bounded
by going backwards to the perturbed sets. Only lower bounds are propagated, of rows and of
their negatives.

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020, arXiv 2002.12920 (general graphs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.sets import Box, PerturbedSet
from patchclamp.rules.base import (
    Affine,
    Interval,
    Lines,
    Nonlinear,
    Relaxation,
    gamma,
    magnitude,
    one_hot,
)
from patchclamp.rules.conv import Conv
from patchclamp.rules.linear import Linear
from patchclamp.rules.relu import ReLU
from patchclamp.rules.sparse import Sparse, dot
from patchclamp.rules.value import Value

Sets = Mapping[str, PerturbedSet]
Slopes = Mapping[Value, Tensor]
"""For a nonlinear value, (num_slopes, N, R, *shape) in [0, 1]."""

MAX_ELEMENTS = 1 << 24
"""How many coefficients of one value are held at a time; more rows go in pieces."""

MOST_ALIVE = 0.9
"""Dead neurons are left out of rows where no more than this share is alive."""

Rows = Tensor | Sparse


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
class Propagation:
    """Bounds of one network on N sets side by side.

    Attributes:
        network: what is bounded.
        sets: for every perturbed value, by name.
        intervals: the best known elementwise bounds of each value.
        rounded: subtract what rounding can do, so that bounds hold over the reals.
        improve: better bounds of elements that were bounded once; see bounding/slopes.py.
    """

    network: Lowered
    sets: Sets
    intervals: dict[Value, Interval] = field(default_factory=dict)
    rounded: bool = False
    improve: Improve | None = None
    relaxed: dict[Value, Relaxation] = field(default_factory=dict)
    _sizes: dict[Value, Tensor] = field(default_factory=dict)
    _columns: dict[Value, Tensor | None] = field(default_factory=dict)
    _weights: dict[tuple[Value, int, int], Tensor] = field(default_factory=dict)
    _lines: dict[Value, Lines] = field(default_factory=dict)

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
        found = self._walk(dict(rows), constant, slopes or {}, met)
        reached, constant, bound = found
        return Linearised({v: _dense(A) for v, A in reached.items()}, constant, bound)

    def _walk(
        self,
        rows: dict[Value, Rows],
        constant: Tensor,
        slopes: Slopes,
        met: dict[Value, Tensor] | None = None,
    ) -> tuple[dict[Value, Rows], Tensor, Tensor]:
        """`linearise`, with rows that may have no zeros: (rows on leaves, constant, bound)."""
        pending = {v.number: (v, A) for v, A in rows.items()}
        reached: dict[Value, Rows] = {}
        spent = constant.detach().abs() if self.rounded else None
        while pending:
            value, A = pending.pop(max(pending))
            if value.rule is None:
                reached[value] = A
                continue
            if isinstance(value.rule, Affine):
                parts, terms = self._through_affine(value, A, slopes)
            else:
                if met is not None:
                    met[value] = _dense(A).detach()
                parts, terms = self._through_nonlinear(value, A, slopes.get(value))
            for term in terms:
                constant = constant + term
                if spent is not None:
                    spent = spent + term.detach().abs()
            for argument, part in zip(value.arguments, parts, strict=True):
                held = pending.get(argument.number)
                pending[argument.number] = (
                    argument,
                    part if held is None else _added(held[1], part),
                )
        bound = constant
        for value, A in reached.items():
            term = self._least(value, A)
            bound = bound + term
            if spent is not None:
                size, num = magnitude(self.interval(value)), math.prod(value.shape)
                bound = bound - _error(A, size, num)
                spent = spent + term.detach().abs()
        if spent is not None:  # each value adds three terms at most to the constant
            bound = bound - gamma(2 * len(self.network.values) + 4, spent.dtype) * spent
        return reached, constant, bound

    def _through_affine(
        self, value: Value, A: Rows, slopes: Slopes
    ) -> tuple[tuple[Rows, ...], list[Tensor]]:
        """Rows on the arguments, and what the constant gains."""
        rule = value.rule
        if not isinstance(rule, Affine):
            raise TypeError(f"{value} is not affine")
        parts: tuple[Rows, ...]
        if isinstance(rule, Linear) and rule.single:
            parts = (self._through_linear(value, rule, A, slopes),)
        elif isinstance(rule, Conv) and isinstance(A, Sparse) and A.window is not None:
            parts = (_worth(rule.backward_in_windows(A)),)
        else:
            A = _dense(A)
            parts = rule.backward(A)
        terms = []
        if rule.offset is not None:
            terms.append(_dot(A, rule.offset[None]))
        if self.rounded and _computes(rule):
            terms.append(-_error(A, self._size(value), rule.num_terms))
        return parts, terms

    def _through_linear(self, value: Value, rule: Linear, A: Rows, slopes: Slopes) -> Rows:
        (argument,) = value.arguments
        kept = None if argument in slopes else self._alive(argument)
        if isinstance(A, Sparse):
            rows, given = A.A, A.columns
            if given is None:
                rows, given = _dense(A).flatten(2), None
        else:
            rows, given = A.flatten(2), None
        made = rows @ self._weight(value, rule, given, kept)
        if kept is None:
            return made.reshape(*made.shape[:2], *rule.inputs[0])
        return Sparse(made, argument.shape, columns=kept)

    def _weight(
        self, value: Value, rule: Linear, rows: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        """The part of a weight that is alive."""
        key = (value, id(rows), id(columns))
        if key not in self._weights:
            weight = rule.weight if rows is None else rule.weight[rows]
            self._weights[key] = weight if columns is None else weight[:, columns]
        return self._weights[key]

    def _alive(self, value: Value) -> Tensor | None:
        """Which elements of a ReLU's result may differ from 0; None if nearly all."""
        if not isinstance(value.rule, ReLU):
            return None
        if value not in self._columns:
            box = self.interval(value.arguments[0])
            alive = (box.upper > 0).flatten(1).any(0)
            few = int(alive.sum()) <= MOST_ALIVE * len(alive)
            self._columns[value] = alive.nonzero().flatten() if few else None
        return self._columns[value]

    def _through_nonlinear(
        self, value: Value, A: Rows, slopes: Tensor | None
    ) -> tuple[tuple[Rows, ...], list[Tensor]]:
        """Rows on the arguments, and what the constant gains."""
        relaxation = self.relaxation(value, slopes)
        if isinstance(A, Sparse) and (slopes is not None or not isinstance(relaxation, Lines)):
            A = A.dense()
        parts: tuple[Rows, ...]
        if isinstance(A, Sparse) and isinstance(relaxation, Lines):
            found, gained = self._lines_of(value, relaxation, A).backward(A.A)
            parts = (replace(A, A=found[0]),)
        else:
            parts, gained = relaxation.backward(_dense(A))
        if not self.rounded:
            return parts, [gained]
        if slopes is None:
            size = self._size(value)
        else:
            size = relaxation.magnitude(*(self.interval(a) for a in value.arguments))
        return parts, [gained, -_error(A, size, relaxation.num_terms)]

    def _lines_of(self, value: Value, lines: Lines, rows: Sparse) -> Lines:
        if rows.columns is None or rows.columns is not self._alive(value):
            return rows.lines(lines)
        if value not in self._lines:
            self._lines[value] = rows.lines(lines)
        return self._lines[value]

    def _least(self, value: Value, A: Rows) -> Tensor:
        """The smallest value of rows over what is perturbed."""
        perturbed = self.sets[value.name]
        if not isinstance(A, Sparse) or not isinstance(perturbed, Box):
            return perturbed.minimum(_dense(A))
        lower, upper = perturbed.lower, perturbed.upper
        middle = (lower + upper) / 2
        radius = torch.maximum(upper - middle, middle - lower)
        return A.dot(middle) - replace(A, A=A.A.abs()).dot(radius)

    def _size(self, value: Value) -> Tensor:
        """What rounding has to be measured by: see `magnitude` of rules and relaxations."""
        if value not in self._sizes:
            rule = value.rule if isinstance(value.rule, Affine) else self.relaxation(value)
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

    def _both(self, value: Value, index: Tensor) -> tuple[dict[Value, Rows], Tensor]:
        """`start` with sign 1, and behind it with sign -1; without the zeros where there are."""
        rule = value.rule
        rows: dict[Value, Rows]
        if isinstance(rule, Linear) and rule.single:
            (argument,) = value.arguments
            kept = self._alive(argument)
            picked = self._weight(value, rule, None, kept)
            picked = picked[index] if len(index) < len(picked) else picked
            signed = torch.cat([picked, -picked])[None]
            rows = {
                argument: signed.reshape(1, -1, *rule.inputs[0])
                if kept is None
                else Sparse(signed, argument.shape, columns=kept)
            }
        elif isinstance(rule, Conv) and rule.has_windows:
            rows = {value.arguments[0]: _worth(rule.start_in_windows(index).signed())}
        else:
            dense, constant = self.start(value, index, 1.0)
            rows = {v: torch.cat([A, -A], 1) for v, A in dense.items()}
            return rows, torch.cat([constant, -constant], 1)
        offset = rule.offset
        constant = torch.zeros(1, len(index), dtype=self.network.dtype)
        if offset is not None:
            constant = offset.flatten()[index][None]
        return rows, torch.cat([constant, -constant], 1)

    # ---- all layers -----------------------------------------------------------

    def tighten(self, value: Value) -> None:
        """Bound a value backwards, where interval arithmetic leaves something undecided."""
        if self._is_exact(value):
            return
        wanted = self._undecided(value)
        for index in self.pieces(value, wanted, 2):
            found = self._walk(*self._both(value, index), {})[2]
            self._narrow(value, index, found[:, : len(index)], -found[:, len(index) :])
        if self.improve is None or len(wanted) == 0:
            return
        for index in self.pieces(value, self._undecided(value), 2):
            self._narrow(value, index, *self.improve(value, index))

    def _undecided(self, value: Value) -> Tensor:
        """Flat elements that a reader would know better, on any of the sets."""
        found = undecided(self._readers(value), self.interval(value))
        return found.flatten(1).any(0).nonzero().flatten()

    def _narrow(self, value: Value, index: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Take bounds of some elements that may be better than the known ones."""
        box = self.interval(value)
        low, high = (
            side.flatten(1).index_copy(1, index, best(side.flatten(1)[:, index], found))
            for side, found, best in zip(
                box, (lower, upper), (torch.maximum, torch.minimum), strict=True
            )
        )
        shape = box.lower.shape
        self.intervals[value] = Interval(low.reshape(shape), high.reshape(shape))

    def is_open(self, value: Value) -> bool:
        """Whether anything of a nonlinear value's arguments is undecided."""
        return any(
            bool(undecided([value], self.interval(argument)).any()) for argument in value.arguments
        )

    def pieces(self, value: Value, wanted: Tensor, num: int) -> tuple[Tensor, ...]:
        """Elements of a value in parts of which `num` rows each can be held at a time."""
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


def _dense(A: Rows) -> Tensor:
    return A.dense() if isinstance(A, Sparse) else A


def _dot(A: Rows, x: Tensor) -> Tensor:
    """Rows applied to x (N or 1, *shape): (N, R)."""
    return A.dot(x) if isinstance(A, Sparse) else dot(A.flatten(2), x.flatten(1)[:, None])


def _added(A: Rows, B: Rows) -> Rows:
    if isinstance(A, Sparse) and isinstance(B, Sparse) and A.columns is B.columns is not None:
        return replace(A, A=A.A + B.A)
    return _dense(A) + _dense(B)


def _worth(rows: Sparse) -> Rows:
    """Rows in windows, as long as windows are smaller than half the value."""
    return rows if 2 * rows.A.shape[2] <= math.prod(rows.shape) else rows.dense()


def _error(A: Rows, size: Tensor, num_terms: int) -> Tensor:
    """What rounding can do to rows that meet values of this size."""
    if isinstance(A, Sparse):
        total, dtype = replace(A, A=A.A.detach().abs()).dot(size), A.A.dtype
    else:
        total, dtype = _dot(A.detach().abs(), size), A.dtype
    return gamma(num_terms + 4, dtype) * total + torch.finfo(dtype).tiny


def undecided(readers: list[Value], box: Interval) -> Tensor:
    """Which elements must be known better: bool (N, *shape)."""
    wanted = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in readers:
        if isinstance(reader.rule, ReLU):
            wanted |= reader.rule.open(box)
        elif isinstance(reader.rule, Nonlinear):
            wanted |= box.upper > box.lower
    return wanted

"""One step of a backward pass: rows on a value become rows on its arguments.

Rows keep no zeros where that saves work: behind a ReLU the neurons that are dead on all sets
are left out, and rows that start at single elements of a convolution keep to their windows.

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020, arXiv 2002.12920 (general graphs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.sets import Box, PerturbedSet
from patchclamp.rules.base import Affine, Interval, Lines, Nonlinear, Relaxation, gamma, magnitude
from patchclamp.rules.conv import Conv
from patchclamp.rules.layout import Reshape
from patchclamp.rules.linear import Linear
from patchclamp.rules.relu import ReLU
from patchclamp.rules.sparse import Sparse, Windows, dot
from patchclamp.rules.value import Value

Sets = Mapping[str, PerturbedSet]
Slopes = Mapping[Value, Tensor]
"""For a nonlinear value, (num_slopes, N, R, *shape) in [0, 1]."""

Rows = Tensor | Sparse

MOST_ALIVE = 0.9
"""Dead neurons are left out of rows where no more than this share is alive."""


@dataclass(eq=False)
class Steps:
    """What is known of one network on N sets side by side, and steps backwards through it.

    Attributes:
        network: what is bounded.
        sets: for every perturbed value, by name.
        intervals: the best known elementwise bounds of each value.
        rounded: subtract what rounding can do, so that bounds hold over the reals.
        relaxed: the linear bounds of nonlinear values with default slopes.
    """

    network: Lowered
    sets: Sets
    intervals: dict[Value, Interval] = field(default_factory=dict)
    rounded: bool = False
    relaxed: dict[Value, Relaxation] = field(default_factory=dict)
    _noises: dict[Value, Tensor] = field(default_factory=dict)
    _columns: dict[Value, Tensor | None] = field(default_factory=dict)
    _weights: dict[tuple[Value, int, int], Tensor] = field(default_factory=dict)
    _lines: dict[Value, Lines] = field(default_factory=dict)
    _middles: dict[Value, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def interval(self, value: Value) -> Interval:
        """Elementwise bounds by interval arithmetic from the best known ones of the arguments."""
        if value not in self.intervals:
            if value.rule is None:
                made = self.sets[value.name].hull()
            elif isinstance(value.rule, Affine) and not self.rounded and self.is_exact(value):
                middle, radius = self._middle_of(value.arguments[0])
                at, reach = value.rule.forward(middle), value.rule.spread(radius)
                made = Interval(at - reach, at + reach)
            else:
                made = value.rule.interval(*(self.interval(a) for a in value.arguments))
            if value.known is not None:
                known = Interval(*(side.to(made.lower) for side in value.known))
                made = made.within(known)
            self.intervals[value] = made
        return self.intervals[value]

    def is_exact(self, value: Value) -> bool:
        """Interval arithmetic is exact one affine rule behind a perturbed box."""
        if isinstance(value.rule, Affine) and len(value.arguments) == 1:
            (value,) = value.arguments
            while isinstance(value.rule, Reshape):
                (value,) = value.arguments
        return value.rule is None and isinstance(self.sets[value.name], Box)

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

    def through(
        self, value: Value, A: Rows, slopes: Slopes
    ) -> tuple[tuple[Rows, ...], list[Tensor]]:
        """Rows on a value as rows on its arguments, and what the constant gains."""
        if isinstance(value.rule, Affine):
            return self._through_affine(value, value.rule, A, slopes)
        return self._through_nonlinear(value, A, slopes.get(value))

    def _through_affine(
        self, value: Value, rule: Affine, A: Rows, slopes: Slopes
    ) -> tuple[tuple[Rows, ...], list[Tensor]]:
        parts: tuple[Rows, ...]
        if isinstance(rule, Linear) and rule.single:
            parts = (self._through_linear(value, rule, A, slopes),)
        elif isinstance(rule, Conv) and isinstance(A, Sparse) and isinstance(A.where, Windows):
            parts = (_worth(rule.backward_in_windows(A)),)
        else:
            A = dense(A)
            parts = rule.backward(A)
        terms = []
        if rule.offset is not None:
            terms.append(_dot(A, rule.offset[None]))
        if self.rounded and (rule.num_terms or rule.offset is not None):
            terms.append(-error(A, self._noise_of(value)))
        return parts, terms

    def _through_linear(self, value: Value, rule: Linear, A: Rows, slopes: Slopes) -> Rows:
        (argument,) = value.arguments
        kept = None if argument in slopes else self._alive(argument)
        given = None
        if isinstance(A, Sparse) and isinstance(A.where, Tensor):
            rows, given = A.A, A.where
        else:
            rows = dense(A).flatten(2)
        made = rows @ self._weight(value, rule, given, kept)
        if kept is None:
            return made.reshape(*made.shape[:2], *rule.inputs[0])
        return Sparse(made, argument.shape, kept)

    def _weight(
        self, value: Value, rule: Linear, rows: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        """The part of a weight that is alive; `rows` and `columns` are what `_alive` holds."""
        key = (value, id(rows), id(columns))
        if key not in self._weights:
            weight = rule.weight if rows is None else rule.weight.index_select(0, rows)
            self._weights[key] = weight if columns is None else weight.index_select(1, columns)
        return self._weights[key]

    def _alive(self, value: Value) -> Tensor | None:
        """Which elements of a ReLU's result may differ from 0; None if nearly all."""
        if not isinstance(value.rule, ReLU):
            return None
        if value not in self._columns:
            dead = (self.interval(value.arguments[0]).upper <= 0).flatten(1).all(0)
            kept = (~dead).nonzero().flatten()
            self._columns[value] = kept if len(kept) <= MOST_ALIVE * len(dead) else None
        return self._columns[value]

    def _through_nonlinear(
        self, value: Value, A: Rows, slopes: Tensor | None
    ) -> tuple[tuple[Rows, ...], list[Tensor]]:
        relaxation = self.relaxation(value, slopes)
        parts: tuple[Rows, ...]
        if isinstance(A, Sparse) and isinstance(relaxation, Lines) and slopes is None:
            found, gained = self._lines_of(value, relaxation, A).backward(A.A)
            parts = (Sparse(found[0], A.shape, A.where),)
        else:
            A = dense(A)
            parts, gained = relaxation.backward(A)
        if not self.rounded:
            return parts, [gained]
        noise = self._noise_of(value) if slopes is None else self._noise(value, relaxation)
        return parts, [gained, -error(A, noise)]

    def _lines_of(self, value: Value, lines: Lines, rows: Sparse) -> Lines:
        if rows.where is not self._alive(value):
            return rows.lines(lines)
        if value not in self._lines:
            self._lines[value] = rows.lines(lines)
        return self._lines[value]

    def least(self, value: Value, A: Rows) -> list[Tensor]:
        """The smallest value of rows over what is perturbed, or over the interval of a value.

        And, where bounds are rounded, minus what rounding can have done to it.
        """
        perturbed = self.sets[value.name] if value.rule is None else None
        if perturbed is None or (isinstance(A, Sparse) and isinstance(perturbed, Box)):
            middle, radius = self._middle_of(value)
            terms = [_dot(A, middle) - _dot(_abs(A), radius)]
        else:
            terms = [perturbed.minimum(dense(A))]
        if self.rounded:
            size = magnitude(self.interval(value))
            terms.append(-error(A, gamma(math.prod(value.shape) + 4, size.dtype) * size))
        return terms

    def _middle_of(self, value: Value) -> tuple[Tensor, Tensor]:
        """Middle and radius of a value's interval."""
        if value not in self._middles:
            lower, upper = self.interval(value)
            middle = (lower + upper) / 2
            self._middles[value] = middle, torch.maximum(upper - middle, middle - lower)
        return self._middles[value]

    def first(self, value: Value, index: Tensor) -> tuple[dict[Value, Rows], Tensor] | None:
        """Rows that read single elements of a value, and behind them their negatives.

        Only where they are a layer's own weights, so that nothing is computed.
        """
        rule = value.rule
        rows: Rows
        if isinstance(rule, Linear) and rule.single:
            kept = self._alive(value.arguments[0])
            picked = self._weight(value, rule, None, kept)
            if len(index) < len(picked):
                picked = picked.index_select(0, index)
            rows = torch.cat([picked, -picked])[None]
            shape = rule.inputs[0]
            rows = rows.reshape(1, -1, *shape) if kept is None else Sparse(rows, shape, kept)
        elif isinstance(rule, Conv) and rule.has_windows:
            rows = _worth(rule.start_in_windows(index).signed())
        else:
            return None
        if rule.offset is None:
            constant = torch.zeros(1, len(index), dtype=rule.dtype)
        else:
            constant = rule.offset.flatten().index_select(0, index)[None]
        return {value.arguments[0]: rows}, torch.cat([constant, -constant], 1)

    def _noise_of(self, value: Value) -> Tensor:
        """`_noise` of a value's rule, or of its default relaxation."""
        if value not in self._noises:
            step = value.rule if isinstance(value.rule, Affine) else self.relaxation(value)
            self._noises[value] = self._noise(value, step)
        return self._noises[value]

    def _noise(self, value: Value, step: Affine | Relaxation) -> Tensor:
        """What rounding can do to a row with coefficients of size 1, for each element (N, *shape).

        One coefficient adds up `num_terms` products, the constant as many as there are elements.
        """
        size = step.magnitude(*(self.interval(a) for a in value.arguments))
        num = math.prod(value.shape)
        if isinstance(step, Lines):
            return gamma(step.num_terms + 4, size.dtype) * size + step.noise(num)
        if isinstance(step, Affine):
            noise = gamma(step.num_terms + 4, size.dtype) * size
            if step.offset is None or num <= step.num_terms:
                return noise
            return noise + gamma(num + 4, size.dtype) * step.offset.abs()
        return gamma(max(num, step.num_terms) + 4, size.dtype) * size


def copies(rule: Affine) -> bool:
    """Whether rows of single elements are a layer's own weights, so that nothing is rounded."""
    return isinstance(rule, Linear) or (isinstance(rule, Conv) and rule.is_plain)


def dense(A: Rows) -> Tensor:
    """Rows with their zeros."""
    return A.dense() if isinstance(A, Sparse) else A


def chosen(A: Rows, index: Tensor) -> Rows:
    """Some of the rows."""
    return A.rows(index) if isinstance(A, Sparse) else A.index_select(1, index)


def added(A: Rows, B: Rows) -> Rows:
    """The sum of rows on one value."""
    if isinstance(A, Sparse) and isinstance(B, Sparse) and A.where is B.where:
        return Sparse(A.A + B.A, A.shape, A.where)
    return dense(A) + dense(B)


def _abs(A: Rows) -> Rows:
    return Sparse(A.A.abs(), A.shape, A.where) if isinstance(A, Sparse) else A.abs()


def _dot(A: Rows, x: Tensor) -> Tensor:
    """Rows applied to x (N or 1, *shape): (N, R)."""
    return A.dot(x) if isinstance(A, Sparse) else dot(A.flatten(2), x.flatten(1)[:, None])


def _worth(rows: Sparse) -> Rows:
    """Rows in windows, as long as windows are smaller than half the value."""
    return rows if 2 * rows.A.shape[2] <= math.prod(rows.shape) else rows.dense()


def error(A: Rows, noise: Tensor) -> Tensor:
    """What rounding can do to rows, from what it can do to each coefficient of size 1."""
    with torch.no_grad():
        return _dot(_abs(A), noise) + torch.finfo(noise.dtype).tiny

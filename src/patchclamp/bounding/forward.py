"""Linear bounds carried forwards: every value between two linear functions of what is perturbed.

One pass bounds all values, where going backwards takes a pass for every layer; the cost grows
with the number of perturbed elements K instead of the number of rows, so it pays where few
elements are perturbed. Affine rules and rules that are replaced by lines or planes elementwise
are carried; behind any other (softmax, matrix products, max pooling) a value's bounds are the
constants of its interval, and `Forward.constants` names these values.

Shapes (next to the legend in rules/base.py)
    K        all perturbed elements, one leaf after the other

Statements hold over the reals for the network as lowered, where the propagation is rounded.

Source: Xu et al. 2020, arXiv 2002.12920, section 3.1 (forward mode).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.propagate import Propagation
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Affine, Interval, Lines, Nonlinear, Shape, gamma, magnitude
from patchclamp.rules.products import Planes
from patchclamp.rules.value import Value

MAX_COEFFICIENTS = 1 << 27
"""Of one value."""


@dataclass(frozen=True, eq=False)
class Function:
    """A linear function of what is perturbed: rows (N, K, *shape), constant (N, *shape)."""

    rows: Tensor
    constant: Tensor

    def __add__(self, other: Function) -> Function:
        return Function(self.rows + other.rows, self.constant + other.constant)

    def times(self, factor: Tensor | float) -> Function:
        """Elementwise; the factor (N, *shape)."""
        by_row = factor[:, None] if isinstance(factor, Tensor) else factor
        return Function(self.rows * by_row, self.constant * factor)

    def moved(self, shift: Tensor) -> Function:
        """With another constant."""
        return Function(self.rows, self.constant + shift)


@dataclass(frozen=True)
class Between:
    """A value's linear bounds; both hold on the sets."""

    lower: Function
    upper: Function


@dataclass(eq=False)
class Forward:
    """Linear bounds of every value of a propagation, whose intervals are sharpened by them.

    Attributes:
        bounds: whose sets, relaxations and intervals are used.
        constants: names of the values whose linear bounds are only their intervals.
    """

    bounds: Propagation
    constants: list[str] = field(default_factory=list)
    held: dict[Value, Between] = field(default_factory=dict)

    def run(self) -> None:
        """Bound every value, in order."""
        leaves = list(self.bounds.network.leaves.values())
        num = sum(math.prod(leaf.shape) for leaf in leaves)
        for value in self.bounds.network.values:
            boxes = self.bounds.interval(value)
            if boxes.lower.numel() * num > MAX_COEFFICIENTS:
                raise BoundError(
                    f"{num} perturbed elements are too many for forward bounds",
                    hint='method="crown" goes backwards and does not depend on their number',
                )
            made = self._made(value, num)
            self.held[value] = made
            sharper = Interval(self.least(made.lower), -self.least(made.upper.times(-1.0)))
            self.bounds.intervals[value] = boxes.within(sharper)

    def least(self, f: Function) -> Tensor:
        """The smallest value over the sets, elementwise: (N, *shape)."""
        total = f.constant.flatten(1)
        rows = f.rows.flatten(2).mT
        for leaf, (first, last) in self.spans():
            A = rows[:, :, first:last].reshape(*rows.shape[:2], *leaf.shape)
            total = total + self.bounds.sets[leaf.name].minimum(A)
        if self.bounds.rounded:
            total = total - _allowed(self._size(f).flatten(1), 2 * f.rows.shape[1] + 8)
        return total.reshape(total.shape[0], *f.constant.shape[1:])

    def combined(self, C: Tensor, of: Between) -> Function:
        """A lower bound of rows C (N or 1, R, *shape) on a value, as a function of shape (R,)."""
        up, down = C.flatten(2).clamp(min=0), C.flatten(2).clamp(max=0)
        low, high = of.lower, of.upper

        def both(x: Tensor, y: Tensor) -> Tensor:
            made: Tensor = up @ x.flatten(2).mT + down @ y.flatten(2).mT
            return made.mT

        constant = both(low.constant[:, None], high.constant[:, None])[:, 0]
        if self.bounds.rounded:
            size = self._size(low).flatten(1) + self._size(high).flatten(1)
            total = (C.flatten(2).abs() @ size[:, :, None])[:, :, 0]
            constant = constant - _allowed(total, 2 * C[0, 0].numel() + 8)
        return Function(both(low.rows, high.rows), constant)

    def spans(self) -> list[tuple[Value, tuple[int, int]]]:
        spans, first = [], 0
        for leaf in self.bounds.network.leaves.values():
            last = first + math.prod(leaf.shape)
            spans.append((leaf, (first, last)))
            first = last
        return spans

    def _far(self) -> Tensor:
        """The largest |x| of every perturbed element: (N or 1, K)."""
        sides = [magnitude(self.bounds.interval(v)).flatten(1) for v, _ in self.spans()]
        num = max(len(s) for s in sides)
        return torch.cat([s.expand(num, -1) for s in sides], 1)

    def _size(self, f: Function) -> Tensor:
        """Sum of the absolute values of all terms: (N, *shape)."""
        far = self._far().reshape(-1, f.rows.shape[1], *(1,) * (f.constant.ndim - 1))
        return (f.rows.abs() * far).sum(1) + f.constant.abs()

    # ---- one value ----------------------------------------------------------

    def _made(self, value: Value, num: int) -> Between:
        if value.rule is None:
            return self._leaf(value, num)
        given = [self.held[a] for a in value.arguments]
        if isinstance(value.rule, Affine):
            return self._affine(value.rule, given)
        relaxation = self.bounds.relaxation(value) if isinstance(value.rule, Nonlinear) else None
        if isinstance(relaxation, Lines):
            zero = torch.zeros_like(relaxation.above)
            below = zero if relaxation.below is None else relaxation.below
            low, high = (relaxation.below_slope, below), (relaxation.above_slope, relaxation.above)
            return self._planes(given, low, high)
        if isinstance(relaxation, Planes):
            return self._planes(given, relaxation.below, relaxation.above)
        self.constants.append(value.name)
        lower, upper = self.bounds.interval(value)
        rows = lower.new_zeros(lower.shape[0], num, *value.shape)
        return Between(Function(rows, lower), Function(rows, upper))

    def _leaf(self, value: Value, num: int) -> Between:
        first, last = dict(self.spans())[value]
        dtype = self.bounds.network.dtype
        rows = torch.zeros(1, num, last - first, dtype=dtype)
        rows[0, first:last] = torch.eye(last - first, dtype=dtype)
        f = Function(rows.reshape(1, num, *value.shape), torch.zeros(1, *value.shape, dtype=dtype))
        return Between(f, f)

    def _affine(self, rule: Affine, given: list[Between]) -> Between:
        """Midpoint and radius as linear functions: the radius is not negative on the sets."""
        middle = [(g.lower + g.upper).times(0.5) for g in given]
        radius = [(g.upper + g.lower.times(-1.0)).times(0.5) for g in given]
        m = Function(
            _by_row(lambda *x: _without_offset(rule, *x), [f.rows for f in middle], rule.output),
            rule.forward(*_alike([f.constant for f in middle])),
        )
        r = Function(
            _by_row(rule.spread, [f.rows for f in radius], rule.output),
            rule.spread(*_alike([f.constant for f in radius])),
        )
        lower, upper = m + r.times(-1.0), m + r
        if self.bounds.rounded:
            sizes = [self._size(g.lower) + self._size(g.upper) for g in given]
            size = rule.spread(*_alike(sizes))
            if rule.offset is not None:
                size = size + rule.offset.abs() * float(2 + self._far().sum(1).max())
            error = _allowed(size, 2 * rule.num_terms + 12)
            lower, upper = lower.moved(-error), upper.moved(error)
        return Between(lower, upper)

    def _planes(
        self, given: list[Between], below: tuple[Tensor, ...], above: tuple[Tensor, ...]
    ) -> Between:
        """A linear function of each argument and a constant, below and above; no rows of R."""
        made = []
        for plane, sign in ((below, 1), (above, -1)):
            *slopes, rest = (t[:, 0] for t in plane)
            total: Function | None = None
            size = rest.abs()
            for slope, g in zip(slopes, given, strict=True):
                near, far = (g.lower, g.upper) if sign > 0 else (g.upper, g.lower)
                part = near.times(slope.clamp(min=0)) + far.times(slope.clamp(max=0))
                total = part if total is None else total + part
                if self.bounds.rounded:
                    size = size + slope.abs() * (self._size(near) + self._size(far))
            if total is None:
                raise ValueError("a relaxation of no arguments")
            total = total.moved(rest)
            made.append(total.moved(-sign * _allowed(size, 16)) if self.bounds.rounded else total)
        return Between(*made)


def _allowed(size: Tensor, num_terms: int) -> Tensor:
    return gamma(num_terms, size.dtype) * size + torch.finfo(size.dtype).tiny


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """With one N for all."""
    num = max(p.shape[0] for p in parts)
    return [p.expand(num, *p.shape[1:]) for p in parts]


def _by_row(function: object, parts: list[Tensor], output: Shape) -> Tensor:
    """A linear operator on every row: each part (N, K, *shape)."""
    alike = _alike(parts)
    made: Tensor = function(*(p.flatten(0, 1) for p in alike))  # type: ignore[operator]  # a function of tensors
    return made.reshape(*alike[0].shape[:2], *output)


def _without_offset(rule: Affine, *values: Tensor) -> Tensor:
    made = rule.forward(*values)
    return made if rule.offset is None else made - rule.offset

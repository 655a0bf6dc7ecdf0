"""One construction of linear bounds for every smooth function of one argument.

A line of slope s lies below f on [l, u] when its intercept is at most the smallest value of
g(x) = f(x) - s x there. Where f is concave, g takes its smallest value at an end; where f is
convex, at the point p with f'(p) = s. So, for a function with one piece [a, b] on which it is
convex and concave pieces beside it, the tangent at any p of the piece is the best line of its
slope once its intercept is lowered to min(g(l), g(p), g(u)).

The lower convex envelope of f on [l, u] is a line from (l, f(l)) that touches f at some p_l,
then f itself up to some p_u, then a line to (u, f(u)). Its supporting lines are the tangents
at p in [p_l, p_u]: one number chooses among them. If p_l > p_u the envelope is the chord. The
default is the supporting line at the midpoint, which has the largest mean of all lines below
f, hence the least area under f. Lines above f are minus lines below -f.

p_l depends on l alone and p_u on u alone: they are read from a table, made once per function
by bisection. An error of the table costs tightness and never soundness: intercepts do not
rely on it, and the chord is taken only where a point q has a tangent that passes neither below
(l, f(l)) nor below (u, f(u)); since the tangents' values at l grow with p and those at u
fall, there is then no point at all at which g could be smaller than at both ends.

Statements hold over the reals for the coefficients as computed.

Source: Zhang et al. 2018 (CROWN: lines for S-shaped functions); Shi et al. 2025,
arXiv 2405.21063 (tables of tangent points, general nonlinearities).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from patchclamp.rules.base import Interval, Lines, Nonlinear, Shape
from patchclamp.rules.domain import ULPS, middle, outward, require_finite

TABLE_SIZE = 4096
TABLE_END = 88.0
"""log(1 + the largest distance) in a table: all of float32."""


class Piece(NamedTuple):
    """An interval on which a function is convex (or concave), between inflections."""

    start: float
    stop: float


@dataclass(frozen=True, eq=False)
class Unary(Nonlinear):
    """An operator that is applied to each element by itself."""

    shape: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    def forward(self, *values: Tensor) -> Tensor:
        return self.value(values[0])

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x)."""


class Touching(NamedTuple):
    """Where tangents may touch: first and last point, and where the piece has no point."""

    first: Tensor
    last: Tensor
    empty: Tensor


@dataclass(frozen=True, eq=False)
class Smooth(Unary):
    """A function with an inflection, or two, and a derivative that never jumps.

    Two slopes: which tangent below, which tangent above.

    Attributes:
        convex: pieces on which f is convex; of several, the last that begins below u counts.
        concave: the same where f is concave. All intervals of the real line between the pieces
            of one kind belong to the other kind, or f is linear there.
        steepest: the smallest and the largest derivative.
        range: the smallest and the largest value.
        turning: where f has its only minimum; None where f grows everywhere.
        size: what is added to |f| and |f'| in the allowance for rounding; 0 where they are
            computed with a small relative error everywhere.
    """

    num_slopes = 2
    convex: ClassVar[tuple[Piece, ...]]
    concave: ClassVar[tuple[Piece, ...]]
    steepest: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    turning: ClassVar[float | None] = None
    size: ClassVar[float] = 0.0

    @abstractmethod
    def derivative(self, x: Tensor) -> Tensor:
        """f'(x)."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and f'(x), for functions that share work between them."""
        return self.value(x), self.derivative(x)

    def interval(self, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        at_lower, at_upper = self.value(lower), self.value(upper)
        require_finite(self, boxes[0], at_lower, at_upper)
        low, high = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
        if self.turning is not None:
            least = self.value(lower.new_tensor(self.turning))
            low = torch.where((lower < self.turning) & (upper > self.turning), least, low)
        return outward(low, high, self.size, self.range)

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        lower, upper = (side[:, None] for side in boxes[0])
        return torch.stack([self.share(sign, lower, upper) for sign in (1, -1)])

    def share(self, sign: int, lower: Tensor, upper: Tensor) -> Tensor:
        """The slope that chooses the tangent at the midpoint, or the nearest one to it."""
        first, last, _ = self.touching(sign, lower, upper)
        width = last - first
        point = torch.clamp(middle(lower, upper), first, last)
        return torch.where(width > 0, (point - first) / torch.where(width > 0, width, 1), 0.5)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        ends = Ends.of(self, boxes[0])
        require_finite(self, boxes[0], ends.at_lower[:, 0], ends.at_upper[:, 0])
        choices = (None, None) if slopes is None else slopes.unbind()
        below_slope, below = self.below(1, ends, choices[0])
        above_slope, above = self.below(-1, ends.negated(), choices[1])
        return Lines(below_slope, below, -above_slope, -above)

    def touching(self, sign: int, lower: Tensor, upper: Tensor) -> Touching:
        """Where tangents below sign * f may touch it; first <= last."""
        pieces = self.convex if sign > 0 else self.concave
        first, last, empty = self._touching_one(sign, 0, lower, upper)
        for number in range(1, len(pieces)):
            later = self._touching_one(sign, number, lower, upper)
            use = upper > pieces[number].start
            first, last, empty = (
                torch.where(use, b, a) for a, b in zip((first, last, empty), later, strict=True)
            )
        return _uncrossed(first, last, empty)

    def _touching_one(self, sign: int, number: int, lower: Tensor, upper: Tensor) -> Touching:
        piece = (self.convex if sign > 0 else self.concave)[number]
        start, stop = lower.clamp(min=piece.start), upper.clamp(max=piece.stop)
        first, last = start, stop
        if math.isfinite(piece.start):
            table = _table(type(self), sign, piece, False, lower.dtype, lower.device)
            first = torch.clamp(_look_up(table, piece.start - lower), start, stop)
        if math.isfinite(piece.stop):
            table = _table(type(self), sign, piece, True, lower.dtype, lower.device)
            last = torch.clamp(_look_up(table, upper - piece.stop), start, stop)
        return Touching(first, last, start > stop)

    def below(self, sign: int, ends: Ends, choice: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slope and intercept of a line below sign * f, of which `ends` knows the values."""
        lower, upper = ends.lower, ends.upper
        first, last, empty = self.touching(sign, lower, upper)
        if choice is None:
            point = middle(lower, upper)
        else:
            point = torch.lerp(first, last, choice)
        point = torch.clamp(point, first, last)
        value, slope = self.both(point)
        if sign < 0:
            value, slope = -value, -slope
        at_point = value - slope * point
        at_lower, at_upper = ends.at_lower - slope * lower, ends.at_upper - slope * upper
        chord = empty | (torch.maximum(at_lower, at_upper) <= at_point)
        slope = torch.where(chord, self._chord(sign, ends), slope)
        at_ends = torch.minimum(ends.at_lower - slope * lower, ends.at_upper - slope * upper)
        intercept = torch.where(chord, at_ends, torch.minimum(at_ends, at_point))
        return slope, intercept - self.allowance(ends, slope)

    def _chord(self, sign: int, ends: Ends) -> Tensor:
        """The slope of the chord, within what the derivative can be: no noise where u - l is 0."""
        least, most = self.steepest if sign > 0 else (-self.steepest[1], -self.steepest[0])
        width = (ends.upper - ends.lower).clamp(min=torch.finfo(ends.far.dtype).tiny)
        return ((ends.at_upper - ends.at_lower) / width).clamp(least, most)

    def allowance(self, ends: Ends, slope: Tensor) -> Tensor:
        """What rounding can have done to an intercept.

        Its terms are f(x) and slope * x; a derivative that is wrong by e moves the true
        minimum of f(x) - slope * x by at most e (u - l).
        """
        info = torch.finfo(slope.dtype)
        size = ends.size + 2 * ends.far * slope.abs()
        if self.size:
            size = size + self.size * (1 + 2 * (ends.upper - ends.lower))
        return size * (ULPS * info.eps) + info.tiny


@dataclass(frozen=True)
class Ends:
    """An interval and a function's values at its ends, each (N, 1, *shape).

    Attributes:
        far: the largest |x|.
        size: the larger |f| of the two ends.
    """

    lower: Tensor
    upper: Tensor
    at_lower: Tensor
    at_upper: Tensor
    far: Tensor
    size: Tensor

    @classmethod
    def of(cls, rule: Unary, box: Interval) -> Ends:
        """Of a box (N, *shape)."""
        lower, upper = (side[:, None] for side in box)
        values = rule.value(lower), rule.value(upper)
        far = torch.maximum(lower.abs(), upper.abs())
        return cls(lower, upper, *values, far, torch.maximum(values[0].abs(), values[1].abs()))

    def negated(self) -> Ends:
        """Of minus the function."""
        return replace(self, at_lower=-self.at_lower, at_upper=-self.at_upper)


def _uncrossed(first: Tensor, last: Tensor, empty: Tensor) -> Touching:
    """Both at their mean where no tangent is below both ends."""
    mean = middle(first, last)
    return Touching(torch.minimum(first, mean), torch.maximum(last, mean), empty)


def _look_up(table: Tensor, distance: Tensor) -> Tensor:
    """The point for an end that lies `distance` outside the piece, interpolated."""
    place = torch.log1p(distance.clamp(min=0)) * ((TABLE_SIZE - 1) / TABLE_END)
    cell = place.detach().clamp(max=TABLE_SIZE - 2).long()
    flat = cell.flatten()
    before = table.index_select(0, flat).reshape(cell.shape)
    after = table.index_select(0, flat + 1).reshape(cell.shape)
    return torch.lerp(before, after, (place - cell).clamp(max=1))


@cache
def _table(
    kind: type[Smooth],
    sign: int,
    piece: Piece,
    from_right: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Touching points for ends at growing distances from a piece: (TABLE_SIZE,).

    From the right, the last point of the piece whose tangent is not above (e, f(e)), for ends
    e beyond its stop; from the left, the first one, for ends before its start.
    """
    rule = kind(())
    places = torch.linspace(0, TABLE_END, TABLE_SIZE, dtype=torch.float64)
    end = piece.stop + torch.expm1(places) if from_right else piece.start - torch.expm1(places)
    near, far = (piece.stop, piece.start) if from_right else (piece.start, piece.stop)
    away = -1 if from_right else 1

    def point(z: Tensor) -> Tensor:
        """0 is at the near end of the piece; a piece without an end is walked in logarithms."""
        if math.isfinite(far):
            return near + (far - near) * z
        return near + away * torch.expm1(z)

    low = torch.zeros_like(places)
    high = torch.ones_like(places) if math.isfinite(far) else torch.full_like(places, TABLE_END)
    at_end = sign * rule.value(end)
    for _ in range(64):
        z = (low + high) / 2
        value, slope = rule.both(point(z))
        below = at_end - sign * value - sign * slope * (end - point(z)) >= 0
        low, high = torch.where(below, low, z), torch.where(below, z, high)
    return point(high).to(device=device, dtype=dtype)

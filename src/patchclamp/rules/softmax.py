"""Softmax over an axis as one rule.

Output i is the sigmoid of z_i = x_i - log(sum over j != i of exp(x_j)). The extremes of z_i
over a box are at corners, so the interval 1 / (1 + sum of exp(u_j - l_i)) is the exact one and
stays in [0, 1]. Taken apart into exp, sum, reciprocal and product, the same logits give bounds
far above 1, because the four no longer know of each other.

Linear bounds: two lines of the sigmoid in z_i, which grow, and a line for the log-sum-exp,
which is convex: below it the tangent at the midpoint m; above it, with chords g_j >= exp,
log(sum of g_j) <= log S + (sum of g_j - S) / S, where S is the sum of the chords at m. Both
have the form log S_i + sum over j != i of w_j (x_j - m_j) / S_i with weights that do not
depend on i, so rows go backwards through sums that leave one element out, and the n x n
matrix of coefficients is never made. For two logits z is their difference, exactly.

Every plane may be mixed with the constant bound of the interval; by default the one with the
larger value at the midpoint is taken.

Statements hold over the reals for the coefficients as computed.

Source: Wei et al. 2023, arXiv 2303.01713 (convex bounds on softmax by log-sum-exp); here a
sigmoid takes the place of their exponential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp.rules.base import Interval, Nonlinear, Relaxation, Shape, gamma, magnitude
from patchclamp.rules.domain import ULPS, middle, refuse, require_finite
from patchclamp.rules.s_shaped import Sigmoid

SMALLEST_SUM = 1e-20
"""Below it, one logit outweighs all others so far that the constant bound is taken."""


def others(x: Tensor) -> Tensor:
    """For each element of the last axis, the sum of all others.

    Sums from both sides; the total minus the element would lose everything where it is large.
    """
    before = torch.nn.functional.pad(x[..., :-1].cumsum(-1), (1, 0))
    after = torch.nn.functional.pad(x[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return before + after


def log_others(x: Tensor) -> Tensor:
    """For each element of the last axis, the logarithm of the sum of all others' exponentials.

    In units of the largest of these others: that is the largest of all, or the second.
    """
    top = x.topk(2, -1)
    largest = torch.nn.functional.one_hot(top.indices[..., 0], x.shape[-1]).bool()
    first, second = top.values[..., :1], top.values[..., 1:]
    among_all = first + torch.log(others(torch.exp(x - first)).clamp(min=0.5))
    rest = torch.where(largest, torch.zeros_like(x), torch.exp((x - second).clamp(max=0)))
    return torch.where(largest, second + torch.log(rest.sum(-1, keepdim=True)), among_all)


class LogSum(NamedTuple):
    """A line for log(sum over j != i of exp(x_j)), see the module. The axis is last."""

    weights: Tensor
    sums: Tensor
    at_middle: Tensor


def _tangent(m: Tensor) -> LogSum:
    """Below the log-sum-exp."""
    reference = m.amax(-1, keepdim=True)
    weights = torch.exp(m - reference)
    return _log_sum(weights, weights, reference)


def _chords(lower: Tensor, upper: Tensor) -> LogSum:
    """Above the log-sum-exp."""
    reference = upper.amax(-1, keepdim=True)
    low, high = torch.exp(lower - reference), torch.exp(upper - reference)
    width = (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
    return _log_sum(torch.clamp((high - low) / width, low, high), (low + high) / 2, reference)


def _log_sum(weights: Tensor, terms: Tensor, reference: Tensor) -> LogSum:
    sums = others(terms).clamp(min=SMALLEST_SUM)
    return LogSum(weights, sums, reference + torch.log(sums))


@dataclass(frozen=True, eq=False)
class Softmax(Nonlinear):
    """exp(x) over its sum along an axis.

    Four slopes: which line below the sigmoid, which above it; then how much of the plane
    below, and of that above, against the constant bound.

    Logits of minus infinity, or of a very large negative number, as masks have them, get
    bounds of 0 and take no part in the others'.

    Attributes:
        axis: of `shape`, from the front or from the back.
    """

    shape: Shape
    axis: int = -1
    num_slopes = 4

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    @property
    def from_back(self) -> int:
        """The axis as a negative number, which N and R in front do not change."""
        return self.axis - len(self.shape) if self.axis >= 0 else self.axis

    def forward(self, *values: Tensor) -> Tensor:
        return torch.softmax(values[0], self.from_back)

    def interval(self, *boxes: Interval) -> Interval:
        odds = _odds(self._turned(boxes[0]))
        made = Sigmoid(tuple(odds.lower.shape[1:])).interval(odds)
        return Interval(*(side.movedim(-1, self.from_back) for side in made))

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        return torch.stack([s.movedim(-1, self.from_back) for s in self._planes(boxes[0], None)[2]])

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> SoftmaxPlanes:
        if slopes is not None:
            slopes = slopes.movedim(self.from_back, -1)
        below, above, _ = self._planes(boxes[0], slopes)
        return SoftmaxPlanes(below, above, self.from_back)

    def _turned(self, box: Interval) -> Interval:
        """With the axis last, and masked logits finite."""
        lower, upper = (side.movedim(self.from_back, -1) for side in box)
        turned = Interval(lower, upper)
        refuse(
            self,
            turned,
            (upper.amax(-1, keepdim=True) == -torch.inf).expand_as(upper),
            "one logit at least that is not masked",
        )
        require_finite(self, turned, lower.clamp(min=-1), upper.clamp(min=-1))
        least = torch.finfo(lower.dtype).min / 4
        return Interval(lower.clamp(min=least), upper.clamp(min=least))

    def _planes(
        self, box: Interval, slopes: Tensor | None
    ) -> tuple[Plane, Plane, tuple[Tensor, ...]]:
        """The planes below and above, and the slopes that were used."""
        x = self._turned(box)
        odds = _odds(x)
        sigmoid = Sigmoid(tuple(odds.lower.shape[1:]))
        lines = sigmoid.relax((odds,), None if slopes is None else slopes[:2])
        flat = sigmoid.interval(odds)
        lower, upper, m = x.lower[:, None], x.upper[:, None], middle(*x)[:, None]
        n = m.shape[-1]
        if n == 1:
            nothing = torch.zeros_like(m)
            over = under = LogSum(nothing, nothing + 1, nothing)
        elif n == 2:
            over = under = LogSum(torch.ones_like(m), torch.ones_like(m), others(m))
        else:
            over, under = _chords(lower, upper), _tangent(m)
        below = lines.below if lines.below is not None else torch.zeros_like(lines.above)
        planes = (
            _plane(m, lines.below_slope, below, over, flat.lower[:, None]),
            _plane(m, lines.above_slope, lines.above, under, flat.upper[:, None]),
        )
        if slopes is None:
            used = (*sigmoid.initial((odds,)),)
            shares = tuple(
                _better(plane, side[:, None], sign)
                for plane, side, sign in zip(planes, flat, (1, -1), strict=True)
            )
        else:
            used, shares = tuple(slopes[:2]), tuple(slopes[2:])
        far = magnitude(x)[:, None]
        made = [
            plane.mixed(side[:, None], share, far, sign)
            for plane, side, share, sign in zip(planes, flat, shares, (1, -1), strict=True)
        ]
        return made[0], made[1], (*used, *shares)


def _odds(x: Interval) -> Interval:
    """Bounds of z, with room for rounding."""
    lower, upper = x
    n = lower.shape[-1]
    if n == 1:
        # the sigmoid of a large number is the 1 that a softmax over one logit is
        return Interval(torch.full_like(lower, 1e4), torch.full_like(upper, 1e4))
    most, least = log_others(upper), log_others(lower)
    info = torch.finfo(lower.dtype)
    eps = gamma(n + 4, lower.dtype) + ULPS * info.eps
    low, high = lower - most, upper - least
    low = low - (lower.abs() + most.abs() + 1) * eps
    high = high + (upper.abs() + least.abs() + 1) * eps
    return Interval(low.clamp(info.min, info.max), high.clamp(info.min, info.max))


@dataclass(frozen=True)
class Plane:
    """slope_i x_i - ratio_i * (sum over j != i of weights_j x_j) + constant_i.

    With the softmax axis last, each (N, R or 1, *lead, n).
    """

    slope: Tensor
    ratio: Tensor
    weights: Tensor
    constant: Tensor
    at_middle: Tensor
    parts: Tensor
    """Sum of the absolute values that the constant was made from, other than those of x."""

    def mixed(self, flat: Tensor, share: Tensor, far: Tensor, sign: int) -> Plane:
        """share of this plane and the rest of a constant bound, with room for rounding."""
        slope, ratio = self.slope * share, self.ratio * share
        n, info = slope.shape[-1], torch.finfo(slope.dtype)
        size = self.parts * share + slope * far + ratio * others(self.weights * far) + 1
        slack = size * (2 * gamma(n + 16, slope.dtype)) + info.tiny
        constant = self.constant * share + flat * (1 - share) - sign * slack
        return Plane(slope, ratio, self.weights, constant, self.at_middle, size)

    def rows(self, A: Tensor) -> Tensor:
        """A on the outputs as rows on the logits."""
        return A * self.slope - self.weights * others(A * self.ratio)

    def size(self, far: Tensor) -> Tensor:
        """Sum of the absolute values of all terms, for logits of this size."""
        return self.slope * far + self.ratio * others(self.weights * far) + self.constant.abs()


def _plane(m: Tensor, slope: Tensor, intercept: Tensor, log_sum: LogSum, flat: Tensor) -> Plane:
    """slope * (x_i - log sum) + intercept; flat where the sum was too small to divide by."""
    usable = log_sum.sums > SMALLEST_SUM
    slope = torch.where(usable, slope, 0.0)
    intercept = torch.where(usable, intercept, flat)
    ratio = slope / log_sum.sums
    at_middle = slope * (m - log_sum.at_middle) + intercept
    constant = intercept - slope * log_sum.at_middle + ratio * others(log_sum.weights * m)
    parts = intercept.abs() + slope * (log_sum.at_middle.abs() + 2)
    return Plane(slope, ratio, log_sum.weights, constant, at_middle, parts)


def _better(plane: Plane, flat: Tensor, sign: int) -> Tensor:
    """1 where the plane is the better bound at the midpoint, else 0."""
    return (sign * (plane.at_middle - flat) > 0).to(flat.dtype)


@dataclass(frozen=True)
class SoftmaxPlanes(Relaxation):
    """The linear bounds of every output in all logits of its row.

    Attributes:
        below: planes below the outputs, above: above them; the softmax axis is last.
        axis: where it is in the rows, from the back.
    """

    below: Plane
    above: Plane
    axis: int

    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        A = A.movedim(self.axis, -1)
        up, down = A.clamp(min=0), A.clamp(max=0)
        rows = self.below.rows(up) + self.above.rows(down)
        total = (up * self.below.constant + down * self.above.constant).flatten(2).sum(2)
        return (rows.movedim(-1, self.axis),), total

    def magnitude(self, *boxes: Interval) -> Tensor:
        far = magnitude(boxes[0]).clamp(max=torch.finfo(boxes[0].lower.dtype).max / 4)
        far = far.movedim(self.axis, -1)[:, None]
        size = self.below.size(far) + self.above.size(far)
        return size.amax(1).movedim(-1, self.axis)

    @property
    def num_terms(self) -> int:
        """A coefficient adds up a row of A."""
        return self.below.slope.shape[-1] + 8

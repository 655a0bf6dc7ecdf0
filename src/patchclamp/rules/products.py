"""Products of two perturbed values: elementwise, and matrices.

On a box [a, b] x [c, d], xy lies above two planes, each tight along two sides of the box, and
above every plane between them (t = 0 and 1 are McCormick's):

    xy >= (c + t (d - c)) x + (a + t (b - a)) y - (1 - t) a c - t b d

because (x - a)(y - c) >= 0 and (b - x)(d - y) >= 0. Above it lie the planes of x (-y).
Between t_x, where the coefficient of x passes zero, and t_y, where that of y does, all planes
have the same minimum over the box, and it is the minimum of xy itself: such a plane is never
worse than interval arithmetic. It is the default.

For matrices t_y depends on the element of the left matrix alone and t_x on that of the right,
so planes with t = t_x, t_y or half of each need products of bound matrices and never the
three-axis tensor of all single products.

Statements hold over the reals for the coefficients as computed.

Source: McCormick 1976; Shi et al. 2020, arXiv 2002.06622 (products of perturbed matrices);
Shi et al. 2025, arXiv 2405.21063 (planes to choose from).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval, Nonlinear, Relaxation, Shape, gamma, magnitude
from patchclamp.rules.domain import ULPS, outward, require_finite

MAX_PRODUCTS = 1 << 22
"""How many single products of a matrix product are held at a time, for its interval."""


@dataclass(frozen=True)
class Planes(Relaxation):
    """Of an elementwise function of two arguments: each coefficient (N, R or 1, *shape)."""

    below: tuple[Tensor, Tensor, Tensor]
    above: tuple[Tensor, Tensor, Tensor]

    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Positive coefficients take the plane below, negative ones the plane above."""
        up, down = A.clamp(min=0), A.clamp(max=0)
        x, y, total = (
            up * low + down * high for low, high in zip(self.below, self.above, strict=True)
        )
        return (x, y), total.flatten(2).sum(2)

    def magnitude(self, *boxes: Interval) -> Tensor:
        x, y = (magnitude(box)[:, None] for box in boxes)
        sizes = [
            plane[0].abs() * x + plane[1].abs() * y + plane[2].abs()
            for plane in (self.below, self.above)
        ]
        return torch.maximum(*sizes).amax(1)


def neutral(lower: Tensor, upper: Tensor) -> Tensor:
    """t in [0, 1] at which l + t (u - l) is as near to zero as it can be."""
    width = (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
    return (-lower / width).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Mul(Nonlinear):
    """x * y, both of one shape. Two slopes: t of the plane below and of the plane above."""

    shape: Shape
    num_slopes = 2

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape, self.shape)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    def forward(self, *values: Tensor) -> Tensor:
        return values[0] * values[1]

    def interval(self, *boxes: Interval) -> Interval:
        (a, b), (c, d) = boxes
        low, high = _extremes(a, b, c, d)
        require_finite(self, boxes[0], low, high)
        return outward(low, high)

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        """As near to a half as it can be where the plane is no worse than interval arithmetic."""
        (a, b), (c, d) = ((side[:, None] for side in box) for box in boxes)
        y = neutral(a, b)
        chosen = []
        for x in (neutral(c, d), neutral(-d, -c)):
            first, last = torch.minimum(x, y), torch.maximum(x, y)
            chosen.append(torch.clamp(torch.full_like(x, 0.5), first, last))
        return torch.stack(torch.broadcast_tensors(*chosen))

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Planes:
        (a, b), (c, d) = ([side[:, None] for side in box] for box in boxes)
        share = self.initial(boxes) if slopes is None else slopes
        x, y = (magnitude(box)[:, None] for box in boxes)
        info = torch.finfo(a.dtype)
        allowance = x * y * (ULPS * info.eps) + info.tiny
        below = _plane(share[0], a, b, c, d)
        # xy = -(x (-y)): -y lies in [-d, -c]
        above = _plane(share[1], a, b, -d, -c)
        require_finite(self, boxes[0], x[:, 0] * y[:, 0])
        return Planes(
            (below[0], below[1], below[2] - allowance),
            (-above[0], above[1], allowance - above[2]),
        )


def _plane(t: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of x, of y, and the constant of the plane below xy on [a, b] x [c, d]."""
    return c + t * (d - c), a + t * (b - a), -((1 - t) * (a * c) + t * (b * d))


def _extremes(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest products of [a, b] and [c, d], which meet at their corners."""
    p, q, r, s = a * c, a * d, b * c, b * d
    low = torch.minimum(torch.minimum(p, q), torch.minimum(r, s))
    high = torch.maximum(torch.maximum(p, q), torch.maximum(r, s))
    return low, high


@dataclass(frozen=True, eq=False)
class MatMul(Nonlinear):
    """x @ y of shapes (*lead, m, k) and (*lead, k, n), the same lead on both.

    Two slopes per element of the result, for the planes below and above, shared by its k
    products: 0 and 1 take McCormick's planes, a half the default, and others lie between.
    """

    inputs: tuple[Shape, ...]
    num_slopes = 2

    def __post_init__(self) -> None:
        x, y = self.inputs
        if len(x) < 2 or x[:-2] != y[:-2] or x[-1] != y[-2]:
            raise BoundError(
                "a product of matrices that do not fit",
                got=f"{x} and {y}",
                expected="(*lead, m, k) and (*lead, k, n)",
            )

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return (*self.inputs[0][:-1], self.inputs[1][-1])

    @property
    def depth(self) -> int:
        """How many products are added up for one element."""
        return self.inputs[0][-1]

    def forward(self, *values: Tensor) -> Tensor:
        return values[0] @ values[1]

    def interval(self, *boxes: Interval) -> Interval:
        """Sums of the exact intervals of the single products, some of the k at a time."""
        (a, b), (c, d) = boxes
        num = max(a.shape[0], c.shape[0])
        size = num * math.prod(self.output)
        at_once = max(1, MAX_PRODUCTS // max(size, 1))
        low = high = a.new_zeros(())
        for start in range(0, self.depth, at_once):
            stop = start + at_once
            left = [side[..., start:stop].unsqueeze(-1) for side in (a, b)]
            right = [side[..., start:stop, :].unsqueeze(-3) for side in (c, d)]
            least, most = _extremes(*left, *right)
            low, high = low + least.sum(-2), high + most.sum(-2)
        size_of_terms = magnitude(boxes[0]) @ magnitude(boxes[1])
        require_finite(self, Interval(low, high), low, high, size_of_terms)
        slack = size_of_terms * gamma(self.depth + 4, low.dtype) + torch.finfo(low.dtype).tiny
        return Interval(low - slack, high + slack)

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        num = max(boxes[0].lower.shape[0], boxes[1].lower.shape[0])
        return boxes[0].lower.new_full((2, num, 1, *self.output), 0.5)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> MatrixPlanes:
        size = magnitude(boxes[0]) @ magnitude(boxes[1])
        require_finite(self, Interval(-size, size), size)
        info = torch.finfo(size.dtype)
        allowance = size * (gamma(self.depth + 8, size.dtype) * 2) + info.tiny
        return MatrixPlanes(boxes[0], boxes[1], slopes, allowance[:, None], self.depth)


@dataclass(frozen=True)
class MatrixPlanes(Relaxation):
    """Planes of every single product of a matrix product, summed.

    Attributes:
        left: interval of x, (N, *lead, m, k).
        right: interval of y, (N, *lead, k, n).
        slopes: (2, N, R, *lead, m, n), or None for the default.
        allowance: what rounding can do to an element's constant, (N, 1, *lead, m, n).
        depth: k.
    """

    left: Interval
    right: Interval
    slopes: Tensor | None
    allowance: Tensor
    depth: int

    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        up, down = A.clamp(min=0), A.clamp(max=0)
        c, d = self.right
        shares = (None, None) if self.slopes is None else tuple(self.slopes)
        x, y, constant = self._half(up, self.right, shares[0])
        # A xy with A < 0 is |A| x (-y)
        x_down, y_down, more = self._half(-down, Interval(-d, -c), shares[1])
        slack = ((up - down) * self.allowance).flatten(2).sum(2)
        return (x + x_down, y - y_down), constant + more - slack

    def _half(
        self, A: Tensor, right: Interval, share: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows on x and y and the constant for A >= 0 times the planes below x @ y.

        A part of A, `late`, goes to the plane t = 1, a part to t = 0, and the rest, `mixed`,
        to planes with t the mean of t_y (of the left element) and t_x (of the right one).
        """
        a, b = (side[:, None] for side in self.left)
        c, d = (side[:, None] for side in right)
        wide, tall = b - a, d - c
        t_left, t_right = neutral(a, b) / 2, neutral(c, d) / 2
        if share is None:
            mixed = A
        else:
            mixed = A * (1 - (2 * share - 1).abs())
        on_tall = mixed @ tall.mT
        x = A @ c.mT + mixed @ (t_right * tall).mT + t_left * on_tall
        on_wide = wide.mT @ mixed
        y = a.mT @ A + (t_left * wide).mT @ mixed + t_right * on_wide
        # constant of t: -(a c + t (b d - a c)), and b d - a c = wide c + a tall + wide tall
        constant = (A * (a @ c)).flatten(2).sum(2)
        t_wide, t_tall = t_left * wide, t_right * tall
        # sum over the three axes of mixed (t_left + t_right) (wide c + a tall + wide tall)
        by_left = t_wide @ (c + tall) + (t_left * a) @ tall
        by_right = wide @ (t_right * (c + tall)) + a @ t_tall
        constant = constant + (mixed * (by_left + by_right)).flatten(2).sum(2)
        if share is not None:
            late = A * (2 * share - 1).clamp(min=0)
            x = x + late @ tall.mT
            y = y + wide.mT @ late
            constant = constant + (late * (b @ d - a @ c)).flatten(2).sum(2)
        return x, y, -constant

    def magnitude(self, *boxes: Interval) -> Tensor:
        """Every coefficient is at most a few times the largest values of its box."""
        size: Tensor = magnitude(boxes[0]) @ magnitude(boxes[1])
        return 8 * size + self.allowance[:, 0]

    @property
    def num_terms(self) -> int:
        """A coefficient adds up a row of A, once for each of three matrices."""
        m, n = self.allowance.shape[-2:]
        return 4 * max(m, n, self.depth) + 4

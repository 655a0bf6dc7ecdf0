"""Maximum and minimum: of two values, over an axis, over pooling windows.

Of two values, max(x, y) = y + relu(x - y), and the lines of ReLU in x - y give the planes.

Over several values: below, every x_j is a bound; slopes choose between the one with the largest
lower end, which is as good as interval arithmetic, and the one with the largest upper end.
Above, take T between the largest lower end and the largest upper end, and

    lambda_j = clamp((u_j - T) / (u_j - l_j), 0, 1):   max_j x_j <= T + sum of lambda_j (x_j - l_j).

If k is where the maximum is, x_k - T <= lambda_k (x_k - l_k), because the right side is linear
in x_k, at least 0 >= l_k - T at l_k, and equal to u_k - T at u_k; all other terms are not
negative. At the midpoint the plane has the value T + sum of (u_j - T)_+ / 2, smallest
between the second and the third largest u_j; the second is the default, since the plane's
largest value over the box is then the largest u. At a T that no other u_j passes, x_k alone is
the maximum, and both planes are exact.

Statements hold over the reals for the coefficients as computed.

Source: Zhang et al. 2018 (CROWN, section on max pooling) for the problem; the planes are derived
here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval, Nonlinear, Relaxation, Shape, gamma, magnitude
from patchclamp.rules.domain import ULPS, require_finite
from patchclamp.rules.products import Planes


@dataclass(frozen=True, eq=False)
class Maximum(Nonlinear):
    """max(x, y), both of one shape. One slope: of the ReLU line below, where it is open."""

    shape: Shape
    num_slopes = 1

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape, self.shape)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    def forward(self, *values: Tensor) -> Tensor:
        return torch.maximum(*values)

    def interval(self, *boxes: Interval) -> Interval:
        x, y = boxes
        return Interval(torch.maximum(x.lower, y.lower), torch.maximum(x.upper, y.upper))

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        return self._initial(boxes)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Planes:
        return self._relax(boxes, slopes)

    def _initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        """Of the maximum: 1, which takes x, where the middle of x is the larger one."""
        x, y = boxes
        return (x.lower + x.upper > y.lower + y.upper).to(x.lower.dtype)[None, :, None]

    def _relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None) -> Planes:
        """Of the maximum."""
        x, y = boxes
        share = self._initial(boxes)[0] if slopes is None else slopes[0]
        gap = Interval((x.lower - y.upper)[:, None], (x.upper - y.lower)[:, None])
        require_finite(self, Interval(gap.lower[:, 0], gap.upper[:, 0]), *(g[:, 0] for g in gap))
        sure, never = gap.lower >= 0, gap.upper <= 0
        share = torch.where(sure, 1.0, torch.where(never, 0.0, share))
        down, up = gap.lower.clamp(max=0), gap.upper.clamp(min=0)
        info = torch.finfo(down.dtype)
        chord = up / (up - down).clamp(min=info.tiny)
        chord = torch.where(sure, 1.0, torch.where(never, 0.0, chord))
        # y + chord * (x - y - down): with any chord in [0, 1], the largest it must be raised by
        # is at an end of the gap, and ends and chord are known to within a few eps
        far = magnitude(x)[:, None] + magnitude(y)[:, None]
        lift = -chord * down + far * (ULPS * info.eps) + info.tiny
        known = sure | never
        zero = torch.zeros_like(lift)
        lift = torch.where(known, zero, lift)
        # 1 - share is rounded: what x and y get may not add up to 1 by half an eps
        slack = torch.where((share == 0) | (share == 1), 0.0, -far * info.eps - info.tiny)
        return Planes((share, 1 - share, slack), (chord, 1 - chord, lift))


@dataclass(frozen=True, eq=False)
class Minimum(Maximum):
    """min(x, y) = -max(-x, -y). One slope, as for the maximum of the negatives."""

    def forward(self, *values: Tensor) -> Tensor:
        return torch.minimum(*values)

    def interval(self, *boxes: Interval) -> Interval:
        x, y = boxes
        return Interval(torch.minimum(x.lower, y.lower), torch.minimum(x.upper, y.upper))

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        return self._initial(_negated(boxes))

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Planes:
        planes = self._relax(_negated(boxes), slopes)
        below, above = planes.below, planes.above
        return Planes((above[0], above[1], -above[2]), (below[0], below[1], -below[2]))


def _negated(boxes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    return tuple(Interval(-box.upper, -box.lower) for box in boxes)


@dataclass(frozen=True)
class Candidates(Relaxation):
    """Linear bounds of the maximum over the last axis of gathered candidates.

    Attributes:
        below, above: coefficients, (N, R or 1, *output, num_candidates).
        constant: of the bound above, (N, R or 1, *output); that below has none but `slack`.
        slack: by how much the bound below is lowered for rounding.
        rule: knows where candidates come from.
    """

    below: Tensor
    above: Tensor
    constant: Tensor
    slack: Tensor
    rule: Over

    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        up, down = A.clamp(min=0), A.clamp(max=0)
        rows = up[..., None] * self.below + down[..., None] * self.above
        total = down * self.constant - up * self.slack
        return (self.rule.scatter(rows),), total.reshape(*total.shape[:2], -1).sum(2)

    def magnitude(self, *boxes: Interval) -> Tensor:
        far = self.rule.gather(magnitude(boxes[0]), 0.0)[:, None]
        above = (self.above.abs() * far).sum(-1) + self.constant.abs()
        return torch.maximum(above, (self.below.abs() * far).sum(-1) + self.slack).amax(1)

    @property
    def num_terms(self) -> int:
        """A coefficient adds up the windows that an element lies in."""
        return 4 + self.below.shape[-1]


@dataclass(frozen=True, eq=False)
class Over(Nonlinear):
    """The maximum over groups of elements.

    Two slopes: of the candidates below; of T above, from the largest lower end to the largest
    upper end.

    Attributes:
        shape: of the argument.
    """

    shape: Shape
    num_slopes = 2

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @abstractmethod
    def gather(self, x: Tensor, fill: float) -> Tensor:
        """(..., *shape) -> (..., *output, num_candidates), `fill` where there is none."""

    @abstractmethod
    def scatter(self, rows: Tensor) -> Tensor:
        """(N, R, *output, num_candidates) -> (N, R, *shape), adding up."""

    def interval(self, *boxes: Interval) -> Interval:
        lower, upper = (self.gather(side, -torch.inf).amax(-1) for side in boxes[0])
        return Interval(lower, upper)

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        x, first, last = self._candidates(boxes[0])
        total = x.lower + x.upper
        below = (total * last).sum(-1) > (total * first).sum(-1)
        least, most = x.lower.amax(-1), x.upper.amax(-1)
        span = most - least
        share = (_second(x.upper).maximum(least) - least) / torch.where(span > 0, span, 1)
        return torch.stack((below.to(least.dtype), share.clamp(0, 1)))

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Candidates:
        x, first, last = self._candidates(boxes[0])
        given = self.initial(boxes) if slopes is None else slopes
        below = first + given[0][..., None] * (last - first)
        least, most = x.lower.amax(-1), x.upper.amax(-1)
        level = least + given[1] * (most - least)
        info = torch.finfo(level.dtype)
        width = x.upper - x.lower
        over = (x.upper - level[..., None]).clamp(min=0)
        weight = (over / torch.where(width > 0, width, 1)).clamp(max=1)
        # the best constant of any weights in [0, 1], so that weights may be rounded
        constant = (x.upper - weight * width).amax(-1) - (weight * x.lower).sum(-1)
        far = magnitude(x)
        size = far.amax(-1) * 3 + (weight * far).sum(-1)
        eps = gamma(far.shape[-1] + 4, far.dtype) + ULPS * info.eps
        mixed = (given[0] > 0) & (given[0] < 1)
        slack = torch.where(mixed, far.amax(-1) * (2 * info.eps), 0.0)
        return Candidates(below, weight, constant + size * eps + info.tiny, slack, self)

    def _candidates(self, box: Interval) -> tuple[Interval, Tensor, Tensor]:
        """(N, 1, *output, num_candidates) each: intervals, and the two choices below as 0 and 1.

        A missing candidate is a constant as low as the lowest end of its group: it can be
        above nothing, and it is never chosen.
        """
        require_finite(self, box, box.lower, box.upper)
        lower, upper = (self.gather(side, -torch.inf)[:, None] for side in box)
        n = lower.shape[-1]
        first, last = (
            torch.nn.functional.one_hot(side.argmax(-1), n).to(side.dtype)
            for side in (lower, upper)
        )
        missing = lower == -torch.inf
        floor = torch.where(missing, torch.inf, lower).amin(-1, keepdim=True)
        x = Interval(torch.where(missing, floor, lower), torch.where(missing, floor, upper))
        return x, first, last


def _second(x: Tensor) -> Tensor:
    """The second largest of the last axis; the largest where there is one only."""
    return x.topk(min(2, x.shape[-1]), -1).values[..., -1]


@dataclass(frozen=True, eq=False)
class AmaxAxis(Over):
    """The maximum over one axis of `shape`, dropped from the result or kept as 1."""

    axis: int = -1
    keep: bool = False

    @property
    def _from_back(self) -> int:
        return self.axis - len(self.shape) if self.axis >= 0 else self.axis

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        at = self._from_back % len(self.shape)
        kept = (1,) if self.keep else ()
        return (*self.shape[:at], *kept, *self.shape[at + 1 :])

    def forward(self, *values: Tensor) -> Tensor:
        return values[0].amax(self._from_back, keepdim=self.keep)

    def gather(self, x: Tensor, fill: float) -> Tensor:
        moved = x.movedim(self._from_back, -1)
        return moved.unsqueeze(self._from_back - 1) if self.keep else moved

    def scatter(self, rows: Tensor) -> Tensor:
        rows = rows.squeeze(self._from_back - 1) if self.keep else rows
        return rows.movedim(-1, self._from_back)


@dataclass(frozen=True, eq=False)
class MaxPool(Over):
    """Max pooling over the last len(kernel) axes of `shape`, as torch has it."""

    kernel: tuple[int, ...] = (2, 2)
    stride: tuple[int, ...] = (2, 2)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    ceil: bool = False

    def __post_init__(self) -> None:
        lengths = {len(t) for t in (self.kernel, self.stride, self.padding, self.dilation)}
        if len(lengths) != 1 or not 1 <= len(self.kernel) <= min(3, len(self.shape)):
            raise BoundError(
                "max pooling with options that do not fit",
                got=f"kernel {self.kernel}, stride {self.stride}, padding {self.padding}, "
                f"dilation {self.dilation} on shape {self.shape}",
                expected="one number each for one, two or three last axes",
            )

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return (*self.shape[: -len(self.kernel)], *self._windows.shape[:-1])

    def forward(self, *values: Tensor) -> Tensor:
        x = values[0]
        num = len(self.kernel)
        flat = x.reshape(-1, 1, *x.shape[-num:])
        pooled = self._pooling(
            flat, self.kernel, self.stride, self.padding, self.dilation, self.ceil
        )
        return pooled.reshape(x.shape[0], *self.output)

    @property
    def _pooling(self) -> Callable[..., Tensor]:
        functional = torch.nn.functional
        return (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[
            len(self.kernel) - 1
        ]

    @cached_property
    def _windows(self) -> Tensor:
        """Flat numbers of the elements of each window, -1 in the padding: (*out, num in one)."""
        num = len(self.kernel)
        space = self.shape[-num:]
        sizes = self._pooling(
            torch.zeros(1, 1, *space),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil,
        ).shape[2:]
        numbers = torch.arange(math.prod(space)).reshape(space)
        for axis in range(num):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            after = (sizes[axis] - 1) * self.stride[axis] + reach
            after = max(0, after - space[axis] - self.padding[axis])
            pads = [0, 0] * (num - 1 - axis) + [self.padding[axis], after]
            numbers = torch.nn.functional.pad(numbers, pads, value=-1)
        for axis in range(num):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            numbers = numbers.unfold(axis, reach, self.stride[axis])
            numbers = numbers[..., :: self.dilation[axis]]
            numbers = numbers.narrow(axis, 0, sizes[axis])
        return numbers.flatten(num)

    def gather(self, x: Tensor, fill: float) -> Tensor:
        windows = self._windows.to(x.device)
        flat = x.flatten(-len(self.kernel))
        picked = flat[..., windows.clamp(min=0)]
        return torch.where(windows >= 0, picked, fill)

    def scatter(self, rows: Tensor) -> Tensor:
        num = len(self.kernel)
        windows = self._windows.to(rows.device)
        lead = rows.shape[: rows.ndim - num - 1]
        flat = rows.new_zeros(*lead, math.prod(self.shape[-num:]))
        # what stands for a missing element has coefficient 0
        index = windows.clamp(min=0).flatten()
        flat = flat.index_add(-1, index, rows.reshape(*lead, -1))
        return flat.reshape(*lead, *self.shape[-num:])

"""Functions made of straight pieces, other than ReLU: their lines are exact at the kinks.

For a line of slope s, f(x) - s x is made of straight pieces too and takes its smallest value at
an end of [l, u] or at a kink: whatever the slope, the best intercept needs a look at those few
points. Slopes come from the lower convex envelope: at the kink v in question they lie between
the slope from (l, f(l)) to the kink and that from the kink to (u, f(u)), and if these are in the
wrong order, the envelope is the chord. One number chooses between them, another above f.

Statements hold over the reals for the coefficients as computed.

Source: Zhang et al. 2018 (CROWN), and Xu et al. 2021, arXiv 2011.13824 for slopes to choose.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.rules.base import Interval, Lines
from patchclamp.rules.domain import ULPS, middle, outward, require_finite
from patchclamp.rules.smooth import Unary


@dataclass(frozen=True, eq=False)
class Kinked(Unary):
    """A function made of straight pieces.

    Two slopes: of the line below, of the line above.

    Attributes:
        turning: where f is smallest, if it does not grow everywhere.
        bent_up: kinks at which the slope may grow; of several, the last before u counts.
        bent_down: kinks at which the slope may fall.
        size: what is added to |f| in the allowance for rounding.
    """

    num_slopes = 2
    turning: ClassVar[float | None] = None
    size: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def bent_up(self) -> tuple[float, ...]:
        """Kinks at which the slope may grow."""

    @property
    @abstractmethod
    def bent_down(self) -> tuple[float, ...]:
        """Kinks at which the slope may fall."""

    @abstractmethod
    def derivative(self, x: Tensor) -> Tensor:
        """The slope of the piece that x lies on."""

    def interval(self, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        at_lower, at_upper = self.value(lower), self.value(upper)
        require_finite(self, boxes[0], at_lower, at_upper)
        low, high = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
        if self.turning is not None:
            least = self.value(lower.new_tensor(self.turning))
            low = torch.where((lower < self.turning) & (upper > self.turning), least, low)
        return outward(low, high, self.size)

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        lower, upper = (side[:, None] for side in boxes[0])
        return torch.stack([self.share(sign, lower, upper) for sign in (1, -1)])

    def share(self, sign: int, lower: Tensor, upper: Tensor) -> Tensor:
        """1 where the midpoint lies after the kink: the right line then has the largest mean."""
        kinks = self.bent_up if sign > 0 else self.bent_down
        return (middle(lower, upper) > _kink(kinks, upper)).to(lower.dtype)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        lower, upper = (side[:, None] for side in boxes[0])
        lines = []
        for i, sign in enumerate((1, -1)):
            choice = None if slopes is None else slopes[i]
            slope, intercept = kinked_line(self, sign, lower, upper, choice)
            lines += [sign * slope, sign * intercept]
        require_finite(self, boxes[0], *(t[:, 0] for t in lines))
        return Lines(*lines)


def kinked_line(
    rule: Kinked, sign: int, lower: Tensor, upper: Tensor, choice: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Slope and intercept of a line below sign * f, for ends (N, 1, *shape)."""
    kinks = rule.bent_up if sign > 0 else rule.bent_down
    at_lower, at_upper = sign * rule.value(lower), sign * rule.value(upper)
    tiny = torch.finfo(lower.dtype).tiny
    chord = (at_upper - at_lower) / (upper - lower).clamp(min=tiny)
    slope = chord
    if kinks:
        kink = _kink(kinks, upper)
        bend = torch.clamp(kink, lower, upper)
        at_bend = sign * rule.value(bend)
        left = (at_bend - at_lower) / (bend - lower).clamp(min=tiny)
        right = (at_upper - at_bend) / (upper - bend).clamp(min=tiny)
        share = rule.share(sign, lower, upper) if choice is None else choice
        inside = (lower < kink) & (kink < upper) & (left <= right)
        slope = torch.where(inside, left + share * (right - left), chord)
    every = sorted({*rule.bent_up, *rule.bent_down})
    straight = torch.ones_like(lower, dtype=torch.bool)
    for kink_at in every:
        straight = straight & ((lower >= kink_at) | (upper <= kink_at))
    # the slope of the piece itself: the quotient of a small interval is mostly noise
    slope = torch.where(straight, sign * rule.derivative(middle(lower, upper)), slope)
    intercept = torch.minimum(at_lower - slope * lower, at_upper - slope * upper)
    size = torch.maximum(at_lower.abs(), at_upper.abs())
    for kink_at in every:
        x = lower.clamp(min=kink_at).minimum(upper)
        value = sign * rule.value(x)
        intercept = torch.minimum(intercept, value - slope * x)
        size = torch.maximum(size, value.abs())
    info = torch.finfo(lower.dtype)
    far = torch.maximum(lower.abs(), upper.abs())
    size = size + rule.size
    return slope, intercept - (size + far * slope.abs()) * (ULPS * info.eps) - info.tiny


def _kink(kinks: tuple[float, ...], upper: Tensor) -> Tensor:
    """The last of the kinks that lies before u, else the first."""
    found = torch.full_like(upper, kinks[0] if kinks else 0.0)
    for kink in kinks[1:]:
        found = torch.where(upper > kink, kink, found)
    return found


@dataclass(frozen=True, eq=False)
class LeakyReLU(Kinked):
    """x, and slope * x where x < 0. A slope above 1 or below 0 is allowed."""

    slope: float = 0.01

    @property
    def bent_up(self) -> tuple[float, ...]:
        return (0.0,) if self.slope <= 1 else ()

    @property
    def bent_down(self) -> tuple[float, ...]:
        return () if self.slope <= 1 else (0.0,)

    @property
    def turning(self) -> float | None:  # type: ignore[override]  # depends on the slope
        return 0.0 if self.slope < 0 else None

    def value(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), self.slope)


@dataclass(frozen=True, eq=False)
class PReLU(Kinked):
    """x, and weight * x where x < 0, with a constant weight (*shape), or one that broadcasts."""

    weight: Tensor
    bent_up = (0.0,)
    bent_down = (0.0,)
    turning = 0.0

    def value(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.weight.to(x))

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), self.weight.to(x))

    def interval(self, *boxes: Interval) -> Interval:
        """Zero lies between the ends wherever the interval meets it and the weight is positive."""
        made = super().interval(*boxes)
        lower, upper = boxes[0]
        ends = outward(
            torch.minimum(self.value(lower), self.value(upper)),
            torch.maximum(self.value(lower), self.value(upper)),
        )
        growing = (self.weight >= 0).expand_as(lower)
        return Interval(torch.where(growing, ends.lower, made.lower), made.upper)


@dataclass(frozen=True, eq=False)
class Clamp(Kinked):
    """min(max(x, low), high): ReLU6, hard tanh, clip. Infinite limits are no limits."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise OptionError(
                "clamp with limits in the wrong order", got=f"{self.low} and {self.high}"
            )

    @property
    def bent_up(self) -> tuple[float, ...]:
        return (self.low,) if math.isfinite(self.low) else ()

    @property
    def bent_down(self) -> tuple[float, ...]:
        return (self.high,) if math.isfinite(self.high) else ()

    def value(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def derivative(self, x: Tensor) -> Tensor:
        return ((x > self.low) & (x < self.high)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class HardSigmoid(Kinked):
    """min(max(x / 6 + 1 / 2, 0), 1)."""

    bent_up = (-3.0,)
    bent_down = (3.0,)
    size = 1.0

    def value(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        return ((x > -3) & (x < 3)).to(x.dtype) / 6


@dataclass(frozen=True, eq=False)
class Abs(Kinked):
    """|x|."""

    bent_up = (0.0,)
    bent_down = ()
    turning = 0.0

    def value(self, x: Tensor) -> Tensor:
        return x.abs()

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), -1.0)

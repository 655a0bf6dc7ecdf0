"""Functions of one argument that bend one way: exp, log, roots, reciprocals, powers, softplus.

Where f is convex, every tangent lies below it and the chord above; where it is concave, the
other way round. One number chooses the tangent: that at l + t (u - l). The default is the
tangent at the midpoint, which has the largest mean of all lines below a convex f.

A reciprocal or a negative power bends one way on positive intervals and maybe another way on
negative ones; on an interval with 0 in it, and wherever a function is not defined, there are no
bounds and the interval is refused.

Statements hold over the reals for the coefficients as computed.

Source: Zhang et al. 2018 (CROWN); Shi et al. 2020, arXiv 2002.06622 (exp, reciprocal, sqrt).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.rules.base import Interval, Lines, Nonlinear, Shape
from patchclamp.rules.domain import ULPS, middle, outward, refuse, require_finite
from patchclamp.rules.smooth import Piece, Smooth, Touching, Unary


@dataclass(frozen=True, eq=False)
class Convex(Unary):
    """A function that is convex, or concave, on each interval that it is defined on.

    One slope: which tangent.

    Attributes:
        range: the smallest and the largest value.
        turning: where f has its only minimum; None where f grows or falls everywhere.
        bend: 1 for a convex function, -1 for a concave one; 0 where `sign` says it.
        size: what is added to |f| and |f'| in the allowance for rounding.
    """

    num_slopes = 1
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    turning: ClassVar[float | None] = None
    bend: ClassVar[int] = 1
    size: ClassVar[float] = 0.0

    @abstractmethod
    def derivative(self, x: Tensor) -> Tensor:
        """f'(x), or a slope between the two where it jumps."""

    def require_domain(self, box: Interval) -> None:
        """Refuse intervals that the function is not defined on."""

    def sign(self, lower: Tensor) -> Tensor | int:
        """1 where f is convex on the interval, -1 where it is concave."""
        return self.bend

    def tangent_point(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Of the default choice."""
        return middle(lower, upper)

    def span(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Between which points the tangent is chosen."""
        return lower, upper

    def interval(self, *boxes: Interval) -> Interval:
        self.require_domain(boxes[0])
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
        first, last = self.span(lower, upper)
        width = last - first
        share = (self.tangent_point(lower, upper) - first) / torch.where(width > 0, width, 1)
        return torch.where(width > 0, share.clamp(0, 1), 0.5)[None]

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        self.require_domain(boxes[0])
        lower, upper = (side[:, None] for side in boxes[0])
        first, last = self.span(lower, upper)
        if slopes is None:
            point = self.tangent_point(lower, upper)
        else:
            point = torch.lerp(first, last, slopes[0])
        # rounded, the point could leave the domain
        point = torch.clamp(point, first, last)
        sign = self.sign(lower)
        value, slope = self.value(point), self.derivative(point)
        at_lower, at_upper = self.value(lower), self.value(upper)
        size = torch.maximum(at_lower.abs(), at_upper.abs())
        if self.size:
            size = size + self.size * (1 + 2 * (upper - lower))
        far = torch.maximum(lower.abs(), upper.abs())
        tangent = value - slope * point - sign * self._allowance(size + value.abs(), far, slope)
        chord = self._chord(lower, upper, at_lower, at_upper)
        at_ends = (at_lower - chord * lower, at_upper - chord * upper)
        if isinstance(sign, int):
            across = torch.maximum(*at_ends) if sign > 0 else torch.minimum(*at_ends)
        else:
            across = torch.where(sign > 0, torch.maximum(*at_ends), torch.minimum(*at_ends))
        across = across + sign * self._allowance(size, far, chord)
        require_finite(self, boxes[0], *(t[:, 0] for t in (slope, tangent, chord, across)))
        if isinstance(sign, int):
            if sign > 0:
                return Lines(slope, tangent, chord, across)
            return Lines(chord, across, slope, tangent)
        up = sign > 0
        return Lines(
            torch.where(up, slope, chord),
            torch.where(up, tangent, across),
            torch.where(up, chord, slope),
            torch.where(up, across, tangent),
        )

    def _chord(self, lower: Tensor, upper: Tensor, at_lower: Tensor, at_upper: Tensor) -> Tensor:
        """Its slope, within the slopes at the ends: no noise where u - l is about 0."""
        a, b = self.derivative(lower), self.derivative(upper)
        width = (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
        slope = (at_upper - at_lower) / width
        return torch.clamp(slope, torch.minimum(a, b), torch.maximum(a, b))

    def _allowance(self, size: Tensor, far: Tensor, slope: Tensor) -> Tensor:
        """What rounding can have done to an intercept; see `Smooth`."""
        info = torch.finfo(slope.dtype)
        return (size + 2 * far * slope.abs()) * (ULPS * info.eps) + info.tiny


def _require(rule: object, box: Interval, bad: Tensor, expected: str) -> None:
    refuse(rule, box, bad | box.lower.isnan() | box.upper.isnan(), expected)


@dataclass(frozen=True, eq=False)
class Exp(Convex):
    """exp(x)."""

    range = (0.0, math.inf)

    def value(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def tangent_point(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Not more than 1 above l, so that the line stays positive, as logarithms need it."""
        return torch.minimum(middle(lower, upper), lower + 0.99)


@dataclass(frozen=True, eq=False)
class Log(Convex):
    """The natural logarithm."""

    bend = -1

    def require_domain(self, box: Interval) -> None:
        _require(self, box, box.lower <= 0, "a positive interval")

    def value(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def derivative(self, x: Tensor) -> Tensor:
        return x.reciprocal()


@dataclass(frozen=True, eq=False)
class Sqrt(Convex):
    """The square root."""

    bend = -1
    range = (0.0, math.inf)

    def require_domain(self, box: Interval) -> None:
        _require(self, box, box.lower < 0, "an interval without negative numbers")

    def value(self, x: Tensor) -> Tensor:
        """With a gradient of 0 at 0, where the true one is infinite."""
        return torch.where(x > 0, torch.sqrt(torch.where(x > 0, x, 1)), 0)

    def derivative(self, x: Tensor) -> Tensor:
        """At 0, where it is infinite, a large number: used as a limit of the chord only."""
        return 0.5 / torch.sqrt(x.clamp(min=torch.finfo(x.dtype).tiny))

    def span(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """From a hundredth of u at least: the tangent at 0 is upright.

        A tangent lies above the root wherever it touches, even outside the interval, so
        that the smallest intervals take one at a point beyond them.
        """
        first = torch.maximum(lower, (upper / 100).clamp(min=1e-12))
        return first, torch.maximum(first, upper)


@dataclass(frozen=True, eq=False)
class Rsqrt(Convex):
    """1 / sqrt(x)."""

    range = (0.0, math.inf)

    def require_domain(self, box: Interval) -> None:
        _require(self, box, box.lower <= 0, "a positive interval")

    def value(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    def derivative(self, x: Tensor) -> Tensor:
        return -0.5 * torch.rsqrt(x) / x


@dataclass(frozen=True, eq=False)
class Reciprocal(Convex):
    """1 / x: convex on positive intervals, concave on negative ones."""

    bend = 0

    def require_domain(self, box: Interval) -> None:
        _require(self, box, (box.lower <= 0) & (box.upper >= 0), "an interval without 0")

    def sign(self, lower: Tensor) -> Tensor | int:
        return torch.where(lower > 0, 1, -1)

    def value(self, x: Tensor) -> Tensor:
        return x.reciprocal()

    def derivative(self, x: Tensor) -> Tensor:
        return -x.reciprocal().square()


@dataclass(frozen=True, eq=False)
class Square(Convex):
    """x^2."""

    range = (0.0, math.inf)
    turning = 0.0

    def value(self, x: Tensor) -> Tensor:
        return x.square()

    def derivative(self, x: Tensor) -> Tensor:
        return 2 * x


@dataclass(frozen=True, eq=False)
class Softplus(Convex):
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold, as torch has it.

    That switch lowers the function by less than log(1 + exp(-threshold)) / beta; the line below
    is lowered by this much.
    """

    beta: float = 1.0
    threshold: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise OptionError("softplus with a beta that is not positive", got=f"{self.beta}")

    @property
    def size(self) -> float:  # type: ignore[override]  # depends on beta
        """beta x is rounded, unless beta is a power of 2: felt where the exponential is small."""
        return 0.0 if math.frexp(self.beta)[0] == 0.5 else 1 + 1 / self.beta

    @property
    def drop(self) -> float:
        """By how much the switch can lower the function."""
        return math.log1p(math.exp(-self.threshold)) / self.beta * (1 + 1e-6)

    def _switched(self, upper: Tensor) -> Tensor:
        """Where a value of the interval may lie beyond the threshold, rounding allowed for."""
        info = torch.finfo(upper.dtype)
        return upper * self.beta > self.threshold * (1 - 4 * info.eps)

    def forward(self, *values: Tensor) -> Tensor:
        return torch.nn.functional.softplus(values[0], self.beta, self.threshold)

    def value(self, x: Tensor) -> Tensor:
        y = x * self.beta
        return (y.clamp(min=0) + torch.log1p(torch.exp(-y.abs()))) / self.beta

    def derivative(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x * self.beta)

    def interval(self, *boxes: Interval) -> Interval:
        made = super().interval(*boxes)
        switched = self._switched(boxes[0].upper)
        drop = switched.to(made.lower.dtype) * self.drop
        return Interval((made.lower - drop).clamp(min=0), made.upper)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        lines = super().relax(boxes, slopes)
        upper = boxes[0].upper[:, None]
        drop = self._switched(upper).to(upper.dtype) * self.drop
        below = -drop if lines.below is None else lines.below - drop
        return Lines(lines.below_slope, below, lines.above_slope, lines.above)


@dataclass(frozen=True, eq=False)
class ELU(Convex):
    """scale * x, and scale * alpha (exp(x / gamma) - 1) where x < 0.

    ELU has gamma = scale = 1; CELU has gamma = alpha. Convex for alpha <= gamma; others, such
    as SELU, are refused.
    """

    alpha: float = 1.0
    gamma: float = 1.0
    scale: float = 1.0

    @property
    def size(self) -> float:  # type: ignore[override]  # depends on the options
        return self.scale * (1 + self.alpha)

    def __post_init__(self) -> None:
        if not (0 < self.alpha <= self.gamma and self.scale > 0):
            raise OptionError(
                "ELU that is not convex has no bound rule",
                got=f"alpha {self.alpha}, gamma {self.gamma}, scale {self.scale}",
                expected="0 < alpha <= gamma and a positive scale",
            )

    def value(self, x: Tensor) -> Tensor:
        low = self.alpha * torch.expm1(x.clamp(max=0) / self.gamma)
        return self.scale * (x.clamp(min=0) + low)

    def derivative(self, x: Tensor) -> Tensor:
        low = torch.exp(x.clamp(max=0) / self.gamma) * (self.alpha / self.gamma)
        return self.scale * torch.where(x > 0, torch.ones_like(x), low)


@dataclass(frozen=True, eq=False)
class EvenPower(Convex):
    """x^exponent with an even positive exponent, or a negative one of either kind."""

    exponent: int = 2

    @property
    def turning(self) -> float | None:  # type: ignore[override]  # depends on the exponent
        return 0.0 if self.exponent > 0 else None

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]  # the same
        return (0.0 if self.exponent % 2 == 0 else -math.inf, math.inf)

    def require_domain(self, box: Interval) -> None:
        if self.exponent < 0:
            _require(self, box, (box.lower <= 0) & (box.upper >= 0), "an interval without 0")

    def sign(self, lower: Tensor) -> Tensor | int:
        return 1 if self.exponent % 2 == 0 else torch.where(lower > 0, 1, -1)

    def value(self, x: Tensor) -> Tensor:
        return x.pow(self.exponent)

    def derivative(self, x: Tensor) -> Tensor:
        return self.exponent * x.pow(self.exponent - 1)


@dataclass(frozen=True, eq=False)
class OddPower(Smooth):
    """x^exponent with an odd exponent from 3 on: concave up to zero, convex after it.

    The tangent through (l, l^n) with l < 0 touches at a fixed multiple of -l: the power is the
    same picture at every scale.
    """

    exponent: int = 3
    convex = (Piece(0.0, math.inf),)
    concave = (Piece(-math.inf, 0.0),)

    @cached_property
    def multiple(self) -> float:
        """c with (n - 1) c^n + n c^(n - 1) = 1: there the tangent at c meets (-1, -1)."""
        n, low, high = self.exponent, 0.0, 1.0
        for _ in range(60):
            c = (low + high) / 2
            low, high = (c, high) if (n - 1) * c**n + n * c ** (n - 1) < 1 else (low, c)
        return high

    def value(self, x: Tensor) -> Tensor:
        return x.pow(self.exponent)

    def derivative(self, x: Tensor) -> Tensor:
        return self.exponent * x.pow(self.exponent - 1)

    def touching(self, sign: int, lower: Tensor, upper: Tensor) -> Touching:
        if sign > 0:
            start = lower.clamp(min=0)
            first = torch.clamp(-lower.clamp(max=0) * self.multiple, start, upper)
            return Touching(torch.maximum(first, start), torch.maximum(upper, first), upper < 0)
        stop = upper.clamp(max=0)
        last = torch.clamp(-upper.clamp(min=0) * self.multiple, lower, stop)
        return Touching(torch.minimum(lower, last), last, lower > 0)


def power(shape: Shape, exponent: int) -> Nonlinear:
    """The rule of x^exponent, for an integer exponent other than 0 and 1."""
    if exponent in (0, 1) or int(exponent) != exponent:
        raise OptionError(
            "this power has no bound rule",
            got=f"{exponent}",
            expected="an integer from 2 on, or a negative one",
        )
    if exponent == 2:
        return Square(shape)
    if exponent == -1:
        return Reciprocal(shape)
    if exponent > 0 and exponent % 2 == 1:
        return OddPower(shape, exponent)
    return EvenPower(shape, exponent)

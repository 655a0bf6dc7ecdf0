"""The contract of a rule: one operator, with its constants inside, applied to perturbed arguments.

Shapes (legend for the whole package)
    N        boxes (sub-problems) that are bounded side by side; 1 broadcasts
    R        rows: linear functions of a value that are bounded from below
    *shape   one example's value, its batch axis kept as an axis of size 1 where it has one

A value is (N, *shape). A row's coefficients on a value are (N, R, *shape), its constant (N, R).
Only lower bounds are propagated: an upper bound of y is minus the lower bound of -y.

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020, arXiv 2002.12920 (general graphs).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Interval(NamedTuple):
    """Elementwise bounds of a value, each (N, *shape)."""

    lower: Tensor
    upper: Tensor

    def within(self, other: Interval) -> Interval:
        """The intersection. Both must be sound for the same value."""
        return Interval(
            torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        )


class Rule(ABC):
    """An operator applied to one or several perturbed arguments.

    Attributes:
        inputs: shapes of the arguments, each without N.
        output: shape of the result, without N.
    """

    inputs: tuple[Shape, ...]
    output: Shape

    @abstractmethod
    def forward(self, *values: Tensor) -> Tensor:
        """The operator itself: values (N, *inputs[i]) -> (N, *output). Differentiable."""

    @abstractmethod
    def interval(self, *boxes: Interval) -> Interval:
        """Elementwise bounds of the result from elementwise bounds of the arguments."""


class Affine(Rule):
    """An operator that is affine in all its perturbed arguments together.

    Attributes:
        offset: what it adds, (*output); None for nothing.
        num_terms: how many products are added up for one element of the result, or in its
            transpose; 0 where nothing is computed (values are only moved).
    """

    num_terms: int = 0

    @property
    def offset(self) -> Tensor | None:
        """What the operator adds, (*output) or None."""
        return None

    @abstractmethod
    def spread(self, *radii: Tensor) -> Tensor:
        """With all constants replaced by their absolute values and without the offset."""

    @abstractmethod
    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        """Rows on the result (N, R, *output) as rows on each argument (N, R, *inputs[i])."""

    def start(self, index: Tensor) -> tuple[Tensor, ...]:
        """`backward` of the rows that read single elements: index (R,) of the flat result."""
        return self.backward(one_hot(index, self.output, self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """In which rows are started."""
        return torch.get_default_dtype() if self.offset is None else self.offset.dtype

    def constant(self, A: Tensor) -> Tensor | None:
        """What the rows gain from the offset: (N, R), or None for nothing."""
        offset = self.offset
        return None if offset is None else A.flatten(2) @ offset.flatten()

    def interval(self, *boxes: Interval) -> Interval:
        """Midpoint and radius, widened by what rounding can do (Rump 1999)."""
        middles = [(b.lower + b.upper) / 2 for b in boxes]
        radii = [
            torch.maximum(b.upper - m, m - b.lower) for b, m in zip(boxes, middles, strict=True)
        ]
        middle, radius = self.forward(*middles), self.spread(*radii)
        if self.num_terms or self.offset is not None:
            radius = radius + rounding(self, *boxes)
        return Interval(middle - radius, middle + radius)

    def magnitude(self, *boxes: Interval) -> Tensor:
        """Sum of the absolute values of all terms of each element, (N, *output)."""
        total = self.spread(*(magnitude(b) for b in boxes))
        return total if self.offset is None else total + self.offset.abs()


def magnitude(box: Interval) -> Tensor:
    """The largest absolute value in each interval."""
    return torch.maximum(box.lower.abs(), box.upper.abs())


def rounding(rule: Affine, *boxes: Interval) -> Tensor:
    """How far a computed result may lie from the exact one, for values within `boxes`.

    A sum of n products in any order is within gamma_n of the sum of their absolute values,
    gamma_n = n u / (1 - n u), u half of eps (Higham 2002, eq. 3.5). Twice that, with a few
    more terms, covers the midpoints, the radius and the computing of this bound itself.
    """
    x = rule.magnitude(*boxes)
    return gamma(rule.num_terms + 4, x.dtype) * x + torch.finfo(x.dtype).tiny


def gamma(num_terms: int, dtype: torch.dtype) -> float:
    """Twice gamma_n, see `rounding`."""
    error = num_terms * torch.finfo(dtype).eps
    if error > 0.5:
        raise ValueError(f"a sum of {num_terms} terms has no error bound in {dtype}")
    return error / (1 - error)


def one_hot(index: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Rows that read single elements of a flat value: (1, R, *shape)."""
    rows = torch.zeros(len(index), math.prod(shape), dtype=dtype)
    rows[torch.arange(len(index)), index] = 1
    return rows.reshape(1, len(index), *shape)


class Relaxation(ABC):
    """Linear bounds of an operator on one box, ready to be substituted into rows."""

    @abstractmethod
    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The largest known linear lower bound of A . f(x): rows on each argument, and (N, R)."""

    @abstractmethod
    def magnitude(self, *boxes: Interval) -> Tensor:
        """Sum of the absolute values of all terms of an element's linear bounds, (N, *output).

        With rows A, rounding in `backward` is at most gamma(num_terms) * |A| . magnitude.
        """

    @property
    def num_terms(self) -> int:
        """How many products `backward` adds up for one coefficient."""
        return 4


class Nonlinear(Rule):
    """An operator that is replaced by linear bounds, which depend on its arguments' intervals.

    Attributes:
        num_slopes: how many numbers in [0, 1] per element of `output` choose among the valid
            linear bounds (0 where there is nothing to choose). Any value in [0, 1] is sound.
    """

    num_slopes: ClassVar[int] = 0

    @abstractmethod
    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Relaxation:
        """Linear bounds on these intervals.

        Args:
            boxes: intervals of the arguments, (N, *inputs[i]).
            slopes: (num_slopes, N, R, *output) with N and R possibly 1, in [0, 1];
                differentiable in it. None for the default choice.
        """

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        """The slopes of the default choice: (num_slopes, N, 1, *output)."""
        raise TypeError(f"{type(self).__name__} has no slopes to choose")


@dataclass(frozen=True)
class Lines(Relaxation):
    """Of an elementwise function of one argument: two lines per element, each (N, R or 1, *shape).

    below_slope * x + below (None for 0) <= f(x) <= above_slope * x + above on the interval.
    """

    below_slope: Tensor
    below: Tensor | None
    above_slope: Tensor
    above: Tensor

    @cached_property
    def _bend(self) -> Tensor:
        return self.above_slope - self.below_slope

    @cached_property
    def _rise(self) -> Tensor:
        return self.above if self.below is None else self.above - self.below

    def backward(self, A: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Positive coefficients take the line below, negative ones the line above."""
        down = A.clamp(max=0)
        rows = (A * self.below_slope).addcmul_(down, self._bend)
        if self.below is None:
            return (rows,), _total(down, self.above)
        return (rows,), _total(A, self.below) + _total(down, self._rise)

    def magnitude(self, *boxes: Interval) -> Tensor:
        """|slope| |x| + |intercept|, of the larger line, twice for the difference of slopes."""
        (box,) = boxes
        slope = self.above_slope.abs() + self.below_slope.abs()
        rest = self.above.abs() if self.below is None else self.above.abs() + self.below.abs()
        return (slope * magnitude(box)[:, None]).amax(1) * 2 + rest.amax(1)

    def noise(self, num_terms: int) -> Tensor:
        """What adding up this many intercepts can do to a constant, for coefficients of size 1."""
        rest = self.above.abs() if self.below is None else self.above.abs() + self.below.abs()
        return gamma(num_terms + 4, rest.dtype) * rest.amax(1)


def _total(A: Tensor, x: Tensor) -> Tensor:
    """A . x over everything behind (N, R); x may have one row for all."""
    A, x = A.flatten(2), x.flatten(2)
    if x.shape[1] == 1:
        return (A @ x.mT)[:, :, 0]
    return (A * x).sum(2)

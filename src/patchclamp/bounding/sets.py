"""What something perturbed may be: boxes, balls, patches, half-spaces, words.

A set knows its interval hull and the smallest value of a linear function over it. Both hold
in exact arithmetic for the set as written; the caller adds what rounding can do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval


class PerturbedSet(ABC):
    """N sets of values of one shape, side by side."""

    @abstractmethod
    def hull(self) -> Interval:
        """The smallest box around each set: (N, *shape) each."""

    @abstractmethod
    def minimum(self, A: Tensor) -> Tensor:
        """A lower bound of A . x over each set: A (N or 1, R, *shape) -> (N, R)."""


@dataclass(frozen=True, eq=False)
class Box(PerturbedSet):
    """lower <= x <= upper, elementwise; (N, *shape) each."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape:
            raise BoundError(
                "the sides of a box differ in shape",
                got=f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}",
            )
        if not bool(torch.isfinite(self.lower).all() and torch.isfinite(self.upper).all()):
            raise BoundError("a box must be finite", got="a side that is infinite or NaN")
        if bool((self.lower > self.upper).any()):
            place = (self.lower > self.upper).nonzero()[0].tolist()
            raise BoundError(
                "an empty box",
                got=f"lower {float(self.lower[tuple(place)])} above upper "
                f"{float(self.upper[tuple(place)])} at {place}",
            )

    def hull(self) -> Interval:
        return Interval(self.lower, self.upper)

    @cached_property
    def _middle(self) -> Tensor:
        return ((self.lower + self.upper) / 2).flatten(1)[:, :, None]

    @cached_property
    def _radius(self) -> Tensor:
        m = self._middle[:, :, 0].reshape(self.lower.shape)
        return torch.maximum(self.upper - m, m - self.lower).flatten(1)[:, :, None]

    def minimum(self, A: Tensor) -> Tensor:
        rows = A.flatten(2)
        return (rows @ self._middle - rows.abs() @ self._radius)[:, :, 0]

"""Boxes: every element within an interval of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.bounding.sets.base import PerturbedSet, require_order
from patchclamp.rules.base import Interval


@dataclass(frozen=True, eq=False)
class Box(PerturbedSet):
    """lower <= x <= upper, elementwise; (N, *shape) each."""

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        require_order("a box", self.lower, self.upper)

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

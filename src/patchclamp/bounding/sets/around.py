"""A neighbourhood of whatever value a site has, to be made a set once that value is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.sets.ball import Ball
from patchclamp.bounding.sets.base import PerturbedSet, outward_sum
from patchclamp.bounding.sets.box import Box
from patchclamp.core.edits import Index
from patchclamp.core.errors import BoundError


@dataclass(frozen=True, eq=False)
class Around:
    """Everything within `radius` of the value that a site has at the inputs.

    Attributes:
        radius: not negative; a number.
        norm: inf, 2 or 1. For 2 and 1 it is the norm of the whole (chosen part of the) value.
        within: limits that elements stay in as well, such as (0, 1) for pixels.
        where: the part that moves, by axis, as in edits: `where={"position": -1}`.
    """

    radius: float
    norm: float = math.inf
    within: tuple[float, float] | None = None
    where: Mapping[str, Index] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise BoundError("a radius is finite and not negative", got=f"{self.radius}")
        if self.norm not in (1, 2, math.inf):
            raise BoundError("a norm is 1, 2 or inf", got=f"{self.norm}")

    def at(self, centre: Tensor) -> PerturbedSet:
        """The sets around values (N, *shape)."""
        limits = None
        if self.within is not None:
            limits = tuple(torch.full_like(centre, side) for side in self.within)
            if bool(((centre < limits[0]) | (centre > limits[1])).any()):
                raise BoundError("a value lies outside the limits around it", got=f"{self.within}")
        if self.norm != math.inf:
            return Ball(centre, self.radius, int(self.norm), *(limits or (None, None)))
        radius = torch.full_like(centre, self.radius)
        lower, upper = outward_sum(centre, -radius, -1), outward_sum(centre, radius, 1)
        if limits is not None:
            lower, upper = torch.maximum(lower, limits[0]), torch.minimum(upper, limits[1])
        return Box(lower, upper)

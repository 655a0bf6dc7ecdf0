"""Balls in the L2 or L1 norm, alone or within a box such as the range of pixels.

Over the whole ball the minimum of A . x is A . c - r |A|*, with the dual norm. Within a box it
is the largest of the Lagrangian dual, which every multiplier bounds from below:

    L2: A . c + sum of min over d of (A d + m d^2) - m r^2, each d within its limits
    L1: A . c - m r - sum of max(|A| - m, 0) * room

A bisection (L2) or a sort (L1) finds the best multiplier; a poor one would only be looser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.sets.base import (
    PerturbedSet,
    allowance,
    outward_sum,
    require_finite,
    require_order,
)
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval

NUM_HALVINGS = 48
"""Of the bisection for the multiplier, over a range of 2^64."""


@dataclass(frozen=True, eq=False)
class Ball(PerturbedSet):
    """|x - centre| <= radius in the L1 or L2 norm; for the largest deviation take a `Box`.

    The hull is the smallest box up to rounding.

    Attributes:
        centre: (N, *shape).
        radius: a number, or (N,).
        norm: 1 or 2.
        lower, upper: a box that holds the centre and that x stays in as well, (N, *shape).
    """

    centre: Tensor
    radius: Tensor | float
    norm: int = 2
    lower: Tensor | None = None
    upper: Tensor | None = None

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise BoundError("a ball has norm 1 or 2", got=str(self.norm), hint="or take a Box")
        require_finite("a ball", centre=self.centre, radius=self._radius)
        if bool((self._radius < 0).any()):
            raise BoundError("a ball with a negative radius is empty", got=f"{self.radius}")
        if (self.lower is None) != (self.upper is None):
            raise BoundError("the box around a ball needs both sides")
        if self.lower is not None and self.upper is not None:
            require_order("the box around a ball", self.lower, self.upper)
            if not bool(((self.centre >= self.lower) & (self.centre <= self.upper)).all()):
                raise BoundError("the centre of a ball must lie within its box")

    @property
    def _radius(self) -> Tensor:
        return torch.as_tensor(self.radius, dtype=self.centre.dtype).reshape(-1, 1)

    def hull(self) -> Interval:
        r = self._radius.reshape(-1, *(1,) * (self.centre.ndim - 1)).expand_as(self.centre)
        lower, upper = outward_sum(self.centre, -r, -1), outward_sum(self.centre, r, 1)
        if self.lower is None or self.upper is None:
            return Interval(lower, upper)
        return Interval(lower, upper).within(Interval(self.lower, self.upper))

    def minimum(self, A: Tensor) -> Tensor:
        rows, centre = A.flatten(2), self.centre.flatten(1)[:, :, None]
        at_centre = (rows @ centre)[:, :, 0]
        if self.lower is None or self.upper is None:
            dual = 2 if self.norm == 2 else math.inf
            lost: Tensor = self._radius * torch.linalg.vector_norm(rows, dual, dim=2)
            return at_centre - lost
        down = self.lower.flatten(1)[:, None] - self.centre.flatten(1)[:, None]
        up = self.upper.flatten(1)[:, None] - self.centre.flatten(1)[:, None]
        least = _least_of_l2 if self.norm == 2 else _least_of_l1
        gained, size = least(rows, down, up, self._radius)
        total = size + (rows.detach().abs() @ centre.abs())[:, :, 0]
        return at_centre + gained - allowance(total, rows.shape[2])


def _least_of_l2(A: Tensor, down: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest A . d, and the size of what it was computed from; (N, R) each."""
    small = math.sqrt(torch.finfo(A.dtype).tiny)
    corner = torch.where(A > 0, down, up)
    with torch.no_grad():  # at the best multiplier its own derivative is zero
        norm = torch.linalg.vector_norm(A, dim=2).clamp(min=small)
        first = (r / norm).clamp(min=small)
        low, high = torch.zeros_like(first), torch.full_like(first, 64.0)
        for _ in range(NUM_HALVINGS):
            half = (low + high) / 2
            moved = (-(first * torch.exp2(half))[:, :, None] * A).clamp(down, up)
            inside = torch.linalg.vector_norm(moved, dim=2) <= r
            low, high = torch.where(inside, half, low), torch.where(inside, high, half)
        step = first * torch.exp2(low)
        moved = (-step[:, :, None] * A).clamp(down, up)
        excess = (moved.square().sum(2) - r * r) / (2 * step)
        spent = (moved.square().sum(2) + r * r) / (2 * step)
    at_step = (A * moved).sum(2) + excess
    everything = (A * corner).sum(2)
    size = (A.detach().abs() * corner.abs()).sum(2) + spent
    return torch.maximum(at_step, everything), size


def _least_of_l1(A: Tensor, down: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """As `_least_of_l2`; what gains most is moved first, until the radius is used up."""
    room = torch.where(A > 0, -down, up)
    gain = A.abs()
    ordered, order = gain.sort(2, descending=True)
    used = room.gather(2, order).cumsum(2)
    last = (used < r[:, :, None]).sum(2, keepdim=True)
    padded = torch.nn.functional.pad(ordered, (0, 1))
    price = padded.gather(2, last)[:, :, 0]
    gained = price * r + ((gain - price[:, :, None]).clamp(min=0) * room).sum(2)
    return -gained, gained.detach()

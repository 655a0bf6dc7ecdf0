"""A box cut by linear constraints.

For multipliers m >= 0 of the constraints G x <= h, the smallest value of (A + m G) . x over the
box, less m . h, is a lower bound over the cut box. The best of a fixed number of steps of
ascent on m is taken; m = 0, the box itself, is the first. One constraint at a time is
searched exactly by bisection, since the bound is concave in it; steps along the supergradient
in between lead out of the corners where no single multiplier helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.bounding.sets.base import (
    PerturbedSet,
    allowance,
    require_finite,
    require_order,
)
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval

MAX_EXACT_HULL = 256
"""Elements up to which the hull is found by minimising each of them; beyond it is the box."""


@dataclass(frozen=True, eq=False)
class HalfSpaces(PerturbedSet):
    """lower <= x <= upper and matrix x <= limits.

    Attributes:
        lower, upper: (N, *shape).
        matrix: (N or 1, num constraints, *shape).
        limits: (N or 1, num constraints).
        num_steps: of ascent on the multipliers.
    """

    lower: Tensor
    upper: Tensor
    matrix: Tensor
    limits: Tensor
    num_steps: int = 60

    def __post_init__(self) -> None:
        require_order("a box with constraints", self.lower, self.upper)
        require_finite("linear constraints", matrix=self.matrix, limits=self.limits)
        if self.matrix.shape[2:] != self.lower.shape[1:] or (
            self.matrix.shape[:2] != self.limits.shape
        ):
            raise BoundError(
                "linear constraints that do not fit their box",
                got=f"matrix {tuple(self.matrix.shape)}, limits {tuple(self.limits.shape)}",
                expected=f"(N, num, {', '.join(map(str, self.lower.shape[1:]))}) and (N, num)",
            )
        G = self.matrix.flatten(2)
        least = _box_minimum(G, *self._sides)
        size = (G.abs() * self._far).sum(2) + self.limits.abs()
        empty = least - allowance(size, G.shape[2]) > self.limits
        if bool(empty.any()):
            raise BoundError(
                "a linear constraint cuts everything off",
                got=f"constraint {int(empty.nonzero()[0, 1])} of box {int(empty.nonzero()[0, 0])}",
            )

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        return self.lower.flatten(1)[:, None], self.upper.flatten(1)[:, None]

    @property
    def _far(self) -> Tensor:
        lower, upper = self._sides
        return torch.maximum(lower.abs(), upper.abs())

    @cached_property
    def _hull(self) -> Interval:
        n = self.lower[0].numel()
        box = Interval(self.lower, self.upper)
        if n > MAX_EXACT_HULL:
            return box
        one = torch.eye(n, dtype=self.lower.dtype).reshape(1, n, *self.lower.shape[1:])
        with torch.no_grad():
            lower, upper = self.minimum(one), -self.minimum(-one)
        cut = Interval(lower.reshape(self.lower.shape), upper.reshape(self.lower.shape)).within(box)
        require_order("a box cut by its constraints", *cut)
        return cut

    def hull(self) -> Interval:
        return self._hull

    def minimum(self, A: Tensor) -> Tensor:
        rows, G = A.flatten(2), self.matrix.flatten(2)
        with torch.no_grad():
            m = self._multipliers(rows.detach(), G)
        moved = rows + m @ G
        size = ((rows.detach().abs() + m @ G.abs()) * self._far).sum(2)
        size = size + (m * self.limits.abs()[:, None]).sum(2)
        found = _box_minimum(moved, *self._sides) - (m * self.limits[:, None]).sum(2)
        plain = _box_minimum(rows, *self._sides)
        return torch.maximum(found, plain) - allowance(size, rows.shape[2] + G.shape[1])

    def _multipliers(self, A: Tensor, G: Tensor) -> Tensor:
        """The best found, (N, R, num constraints)."""
        num = G.shape[1]
        m = A.new_zeros(max(A.shape[0], len(self.lower)), A.shape[1], num)
        best, value = m, _box_minimum(A, *self._sides)
        steepest = A.abs().amax(2, keepdim=True) / G.abs().amax(2)[:, None].clamp(min=1e-30)
        for step in range(self.num_steps):
            if step % 20 == 0:
                m = best
                for j in range(num):
                    m = self._searched(A, G, m, j)
            else:
                slope = (G @ self._at(A + m @ G).mT).mT - self.limits[:, None]
                length = torch.linalg.vector_norm(slope, dim=2, keepdim=True).clamp(min=1e-30)
                m = (m + steepest * slope / length / (1 + step)).clamp(min=0)
            found = _box_minimum(A + m @ G, *self._sides) - (m * self.limits[:, None]).sum(2)
            better = found > value
            value = torch.where(better, found, value)
            best = torch.where(better[:, :, None], m, best)
        return best

    def _at(self, rows: Tensor) -> Tensor:
        """Where a row is smallest over the box: (N, R, n)."""
        lower, upper = self._sides
        return torch.where(rows > 0, lower, upper)

    def _searched(self, A: Tensor, G: Tensor, m: Tensor, j: int) -> Tensor:
        """With multiplier j where the constraint is just met, the others as they are."""
        rest = m.clone()
        rest[:, :, j] = 0
        rows, g = A + rest @ G, G[:, j][:, None]
        ratio = torch.where(g == 0, 0.0, -rows / torch.where(g == 0, 1.0, g)).clamp(min=0)
        low, high = torch.zeros_like(m[:, :, j]), ratio.amax(2) * (1 + 1e-6)
        for _ in range(30):
            half = (low + high) / 2
            at = (g * self._at(rows + half[:, :, None] * g)).sum(2)
            over = at > self.limits[:, j][:, None]
            low, high = torch.where(over, half, low), torch.where(over, high, half)
        rest[:, :, j] = high
        return rest


def _box_minimum(rows: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return (rows.clamp(min=0) * lower + rows.clamp(max=0) * upper).sum(2)

"""Sine and cosine: lines from the tangents of `smooth`, intercepts from all minima in reach.

For a slope s in [-1, 1], sin(x) - s x has its local minima at x = 2 pi k - acos(s). Of those in
[l, u] the smallest value is at the last where s >= 0 and at the first where s <= 0, so that
two points and the ends give the best intercept of any slope. Slopes come from the tangents of
the trough that is nearest to the midpoint. An interval of a whole turn, or one so far out that
the spacing of floats is felt, gets the constants -1 and 1.

Statements hold over the reals for the coefficients as computed.

Source: Shi et al. 2025, arXiv 2405.21063 (bounds for sine); the intercepts are derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.rules.base import Interval, magnitude
from patchclamp.rules.domain import middle, outward, require_finite
from patchclamp.rules.smooth import Ends, Piece, Smooth, Touching

TURN = 2 * math.pi
FAR = 1e-3
"""Times 1 / eps: how far out a sine is still looked at."""


@dataclass(frozen=True, eq=False)
class Sin(Smooth):
    """sin(x)."""

    phase: ClassVar[float] = 0.0
    """f(x) = sin(x + phase)."""
    convex = (Piece(-math.pi, 0.0),)
    concave = (Piece(0.0, math.pi),)
    steepest = (-1.0, 1.0)
    range = (-1.0, 1.0)
    size = 1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def interval(self, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        require_finite(self, boxes[0], lower, upper)
        low, high = self.value(lower), self.value(upper)
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        near = 4 * torch.finfo(lower.dtype).eps * (magnitude(boxes[0]) + 1)
        for extreme in (-1.0, 1.0):
            place = extreme * math.pi / 2 - self.phase
            turns = torch.floor((upper + near - place) / TURN)
            met = turns * TURN + place >= lower - near
            met = met | self._wide(lower, upper)
            if extreme < 0:
                low = torch.where(met, extreme, low)
            else:
                high = torch.where(met, extreme, high)
        return outward(low, high, 1.0, self.range)

    def _wide(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where only constants are used."""
        far = magnitude(Interval(lower, upper))
        return (upper - lower >= TURN) | (far * torch.finfo(far.dtype).eps > FAR)

    def _start(self, sign: int) -> float:
        """Added to x, it turns sign * f into a sine."""
        return self.phase if sign > 0 else self.phase + math.pi

    def touching(self, sign: int, lower: Tensor, upper: Tensor) -> Touching:
        """In the trough nearest to the midpoint, where the interval is not wide."""
        start = self._start(sign)
        turns = torch.round((middle(lower, upper) + (start + math.pi / 2)) / TURN)
        shift = turns * TURN - start
        trough = Sin(self.shape)
        found = Smooth.touching(trough, 1, lower - shift, upper - shift)
        first = torch.clamp(found.first + shift, lower, upper)
        last = torch.clamp(found.last + shift, lower, upper)
        return Touching(first, torch.maximum(first, last), found.empty)

    def below(self, sign: int, ends: Ends, choice: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper = ends.lower, ends.upper
        slope, intercept = super().below(sign, ends, choice)
        wide = self._wide(lower, upper)
        slope = torch.where(wide, 0.0, slope)
        info = torch.finfo(slope.dtype)
        back = torch.acos(slope.detach().clamp(-1, 1)) + self._start(sign)
        places = (
            torch.floor((upper + back) / TURN) * TURN - back,
            torch.ceil((lower + back) / TURN) * TURN - back,
        )
        # places are wrong by a few eps of |x|, which is felt in the second order only
        slack = self.allowance(ends, slope) + (4 * info.eps * ends.far).square()
        for place in places:
            x = torch.clamp(place, lower, upper)
            intercept = torch.minimum(intercept, sign * self.value(x) - slope * x - slack)
        return slope, torch.where(wide, -1.0, intercept)


@dataclass(frozen=True, eq=False)
class Cos(Sin):
    """cos(x)."""

    phase = math.pi / 2

    def value(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def derivative(self, x: Tensor) -> Tensor:
        return -torch.sin(x)

"""Functions that are convex up to zero and concave after it.

Source: Zhang et al. 2018 (CROWN), section 3.2; the construction is that of `smooth`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.rules.smooth import Ends, Piece, Smooth

_BEFORE, _AFTER = Piece(-math.inf, 0.0), Piece(0.0, math.inf)


@dataclass(frozen=True, eq=False)
class SShaped(Smooth):
    """Convex before zero, concave after it, growing."""

    convex = (_BEFORE,)
    concave = (_AFTER,)
    steepest = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Sigmoid(SShaped):
    """1 / (1 + exp(-x))."""

    steepest = (0.0, 0.25)
    range = (0.0, 1.0)

    def value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def derivative(self, x: Tensor) -> Tensor:
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative by two sigmoids: 1 - y would lose the tail."""
        y = torch.sigmoid(x)
        return y, y * torch.sigmoid(-x)


@dataclass(frozen=True, eq=False)
class Tanh(SShaped):
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))."""

    range = (-1.0, 1.0)

    def value(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def derivative(self, x: Tensor) -> Tensor:
        """4 e / (1 + e)^2 with e = exp(-2 |x|): 1 - tanh^2 would lose the tail."""
        e = torch.exp(-2 * x.abs())
        return 4 * e / (1 + e).square()


@dataclass(frozen=True, eq=False)
class Atan(SShaped):
    """The inverse tangent."""

    range = (-math.pi / 2 - 1e-7, math.pi / 2 + 1e-7)

    def value(self, x: Tensor) -> Tensor:
        return torch.atan(x)

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + x.square()).reciprocal()


@dataclass(frozen=True, eq=False)
class Softsign(SShaped):
    """x / (1 + |x|)."""

    range = (-1.0, 1.0)

    def value(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + x.abs()).reciprocal().square()


@dataclass(frozen=True, eq=False)
class Erf(SShaped):
    """2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x."""

    steepest = (0.0, 2 / math.sqrt(math.pi))
    range = (-1.0, 1.0)

    def value(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.exp(-x.square()) * (2 / math.sqrt(math.pi))

    def allowance(self, ends: Ends, slope: Tensor) -> Tensor:
        """The square is rounded before the exponential: x^2 more eps in the derivative at x."""
        info = torch.finfo(slope.dtype)
        square = -torch.log((slope.abs() / self.steepest[1]).clamp(min=info.tiny))
        more = 2 * ends.far * slope.abs() * square.clamp(min=0) * info.eps
        return super().allowance(ends, slope) + more

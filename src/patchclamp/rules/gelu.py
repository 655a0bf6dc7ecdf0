"""Gated activations: GELU in both forms, SiLU, Mish, hard swish.

Each is concave, convex between two inflections around zero, and concave again; beyond the left
one it falls and beyond the right one it grows with a slope above 1, so that a line above f that
touches on the right never cuts off the left. The construction is that of `smooth`.

Inflections and minima were computed to 18 digits from the second and first derivative.

Source: Hendrycks and Gimpel 2016 (GELU); Misra 2019 (Mish); Howard et al. 2019 (hard swish);
Shi et al. 2025, arXiv 2405.21063 (bounds for GELU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.rules.leaky import Kinked, kinked_line
from patchclamp.rules.smooth import Ends, Piece, Smooth


@dataclass(frozen=True, eq=False)
class Gate(Smooth):
    """x times something that grows from 0 to 1. Values near 0 come from terms of size 1."""

    size = 1.0
    range = (-0.5, math.inf)


@dataclass(frozen=True, eq=False)
class Gelu(Gate):
    """x Phi(x), Phi the normal distribution function."""

    convex = (Piece(-math.sqrt(2), math.sqrt(2)),)
    concave = (Piece(-math.inf, -math.sqrt(2)), Piece(math.sqrt(2), math.inf))
    steepest = (-0.13, 1.13)
    turning = -0.751791524693564457

    def value(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def derivative(self, x: Tensor) -> Tensor:
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By erfc, which keeps the left tail."""
        phi = 0.5 * torch.erfc(x * -math.sqrt(0.5))
        density = torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))
        return x * phi, phi + x * density


@dataclass(frozen=True, eq=False)
class GeluTanh(Gate):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

    convex = (Piece(-1.41850400879082836, 1.41850400879082836),)
    concave = (Piece(-math.inf, -1.41850400879082836), Piece(1.41850400879082836, math.inf))
    steepest = (-0.13, 1.13)
    turning = -0.752461422071016258

    def value(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def derivative(self, x: Tensor) -> Tensor:
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate is the sigmoid of twice the argument of tanh; beyond 30 it does not move."""
        near = x.clamp(-30, 30)
        scale = 2 * math.sqrt(2 / math.pi)
        argument = scale * (near + 0.044715 * near * near.square())
        gate = torch.sigmoid(argument)
        growth = scale * (1 + 3 * 0.044715 * near.square())
        return x * gate, gate + near * gate * torch.sigmoid(-argument) * growth


@dataclass(frozen=True, eq=False)
class SiLU(Gate):
    """x / (1 + exp(-x))."""

    convex = (Piece(-2.39935728051546767, 2.39935728051546767),)
    concave = (Piece(-math.inf, -2.39935728051546767), Piece(2.39935728051546767, math.inf))
    steepest = (-0.1, 1.1)
    turning = -1.2784645427610738

    def value(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def derivative(self, x: Tensor) -> Tensor:
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x * gate, gate + x * gate * torch.sigmoid(-x)


@dataclass(frozen=True, eq=False)
class Mish(Gate):
    """x tanh(log(1 + exp(x)))."""

    convex = (Piece(-2.25637639636079312, 1.49057117948542846),)
    concave = (Piece(-math.inf, -2.25637639636079312), Piece(1.49057117948542846, math.inf))
    steepest = (-0.12, 1.09)
    turning = -1.19243121451549521

    def value(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def derivative(self, x: Tensor) -> Tensor:
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """With e = exp(x): tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); beyond 30 it is 1."""
        near = x.clamp(max=30)
        e = torch.exp(near)
        top = e * (e + 2)
        gate = top / (top + 2)
        # the derivative of the gate is 4 e (e + 1) / (top + 2)^2
        return x * gate, gate + near * (4 * e / (top + 2)) * ((e + 1) / (top + 2))


@dataclass(frozen=True, eq=False)
class _HardSwishAbove(Kinked):
    """Hard swish above the chord: bent downwards at both its kinks, and convex between them."""

    bent_up = ()
    bent_down = (-3.0, 3.0)

    def value(self, x: Tensor) -> Tensor:
        return x * (x / 6 + 0.5).clamp(0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 3, 1.0, torch.where(x < -3, 0.0, x / 3 + 0.5))


@dataclass(frozen=True, eq=False)
class HardSwish(Gate):
    """x min(max(x / 6 + 1 / 2, 0), 1): a parabola between two straight pieces."""

    convex = (Piece(-3.0, 3.0),)
    concave = ()
    steepest = (-0.5, 1.5)
    turning = -1.5

    def value(self, x: Tensor) -> Tensor:
        return x * (x / 6 + 0.5).clamp(0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        """At a kink, that of the parabola."""
        return torch.where(x > 3, 1.0, torch.where(x < -3, 0.0, x / 3 + 0.5))

    def share(self, sign: int, lower: Tensor, upper: Tensor) -> Tensor:
        if sign > 0:
            return super().share(sign, lower, upper)
        return _HardSwishAbove(self.shape).share(sign, lower, upper)

    def below(self, sign: int, ends: Ends, choice: Tensor | None) -> tuple[Tensor, Tensor]:
        if sign > 0:
            return super().below(sign, ends, choice)
        above = _HardSwishAbove(self.shape)
        slope, intercept = kinked_line(above, sign, ends.lower, ends.upper, choice)
        # the parabola's terms are larger than its values
        return slope, intercept - self.allowance(ends, slope)

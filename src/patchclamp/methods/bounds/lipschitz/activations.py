"""The elementwise activations that are known by name, with their slopes.

Slopes hold over the reals. Those of GELU and SiLU are rounded outward from the exact
extremes (-0.1290 and 1.1290; -0.0999 and 1.0999); on an interval no more is used of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.methods.bounds.lipschitz.layers import Elementwise, GroupSort

_SlopesOn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def relu() -> Elementwise:
    """max(x, 0)."""
    return Elementwise(
        name="relu", function=torch.relu, slopes=(0.0, 1.0), slopes_on=_kink(below=0.0, above=1.0)
    )


def leaky_relu(slope: float = 0.01) -> Elementwise:
    """x above zero, slope * x below."""
    return Elementwise(
        name="leaky_relu",
        function=lambda x: functional.leaky_relu(x, slope),
        slopes=(min(slope, 1.0), max(slope, 1.0)),
        slopes_on=_kink(below=slope, above=1.0),
        increasing=slope >= 0,
    )


def tanh() -> Elementwise:
    """The hyperbolic tangent: slopes in [0, 1]."""
    slopes_on = _bell(lambda x: 1 - torch.tanh(x).square(), top=1.0)
    return Elementwise(name="tanh", function=torch.tanh, slopes=(0.0, 1.0), slopes_on=slopes_on)


def sigmoid() -> Elementwise:
    """1 / (1 + exp(-x)): slopes in [0, 1/4]."""
    slopes_on = _bell(lambda x: torch.sigmoid(x) * torch.sigmoid(-x), top=0.25)
    return Elementwise(
        name="sigmoid", function=torch.sigmoid, slopes=(0.0, 0.25), slopes_on=slopes_on
    )


def gelu() -> Elementwise:
    """x times the normal distribution function, exact or by its tanh approximation."""
    return Elementwise(
        name="gelu", function=functional.gelu, slopes=(-0.13, 1.13), increasing=False
    )


def silu() -> Elementwise:
    """x times the sigmoid of x."""
    return Elementwise(name="silu", function=functional.silu, slopes=(-0.1, 1.1), increasing=False)


def max_min() -> GroupSort:
    """(max, min) of neighbouring pairs."""
    return GroupSort(size=2, descending=True)


def _kink(*, below: float, above: float) -> _SlopesOn:
    """Slopes of a function with one slope below zero and another above."""

    def slopes(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.full_like(lower, below), torch.full_like(lower, above)
        left = torch.where(lower >= 0, high, low)
        right = torch.where(upper <= 0, low, high)
        return torch.minimum(left, right), torch.maximum(left, right)

    return slopes


def _bell(slope: Callable[[Tensor], Tensor], *, top: float) -> _SlopesOn:
    """Slopes of an S-shaped function: the slope is even and falls away from zero."""

    def slopes(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ends = lower.abs(), upper.abs()
        near = torch.where((lower <= 0) & (upper >= 0), 0.0, torch.minimum(*ends))
        # The formulae lose a few units in the last place of numbers up to 1.
        least = (slope(torch.maximum(*ends)) - 1e-15).clamp(min=0)
        return least, (slope(near) + 1e-15).clamp(max=top)

    return slopes

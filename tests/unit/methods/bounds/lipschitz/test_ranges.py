"""Samples and corners lie inside the ranges; bad boxes are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz import (
    Activation,
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Linear,
    Residual,
    activation_ranges,
    gelu,
    leaky_relu,
    max_min,
    sigmoid,
    tanh,
)
from patchclamp.methods.bounds.lipschitz.layers import through

ACTIVATIONS: list[Activation] = [
    leaky_relu(0.1),
    leaky_relu(-0.5),
    tanh(),
    sigmoid(),
    gelu(),
    max_min(),
    GroupSort(size=3),
    Householder(directions=torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]])),
]


@pytest.mark.parametrize(
    "activation", ACTIVATIONS, ids=lambda a: getattr(a, "name", type(a).__name__)
)
@pytest.mark.parametrize("radius", [0.0, 0.05, 2.0])
def test_samples_lie_inside(activation: Activation, radius: float) -> None:
    torch.manual_seed(1)
    first = [Linear(torch.randn(6, 4), torch.randn(6)), activation]
    block = Residual((Linear(torch.randn(6, 6)),))
    layers = [*first, block, _identity()]
    middle = torch.randn(4, dtype=torch.float64)
    box = middle - radius, middle + radius
    found = activation_ranges(Chain(tuple(layers), 4), box)
    share = torch.rand(5000, 4, dtype=torch.float64)
    share = torch.where(torch.rand(5000, 4) < 0.5, share.round(), share)
    x = torch.minimum(box[0] + share * (box[1] - box[0]), box[1])
    for (lower, upper), depth in zip(found, (1, 3), strict=True):
        value = through(layers[:depth], x)
        # A sample's own rounding in float64 may lie outside of what holds over the reals.
        assert bool((value >= lower - 1e-13).all())
        assert bool((value <= upper + 1e-13).all())
    # Of a linear layer the ranges are exact up to rounding.
    weight = first[0].weight  # type: ignore[union-attr]
    width = (found[0][1] - found[0][0]) - 2 * radius * weight.abs().sum(1)
    assert bool((width.abs() < 1e-12).all())


def _identity() -> Elementwise:
    return Elementwise(name="identity", function=_same, slopes=(1.0, 1.0))


def _same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ([0.0, 0.0], [1.0, -1.0], "empty box"),
        ([0.0], [1.0], "does not fit"),
        ([0.0, float("nan")], [1.0, 1.0], "NaN or infinite"),
        ([0.0, 0.0], [1.0, float("inf")], "NaN or infinite"),
    ],
)
def test_bad_boxes_are_refused(lower: list[float], upper: list[float], message: str) -> None:
    chain = Chain((max_min(),), 2)
    with pytest.raises(InputError, match=message):
        activation_ranges(chain, (torch.tensor(lower), torch.tensor(upper)))

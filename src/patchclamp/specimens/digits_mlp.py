"""A multilayer perceptron on flattened 8 x 8 images.

Shapes: images (batch, 1, 8, 8) in [0, 1]; logits (batch, class).
Source: Rumelhart, Hinton & Williams 1986, with the ReLU of Nair & Hinton 2010.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class DenseBlock(nn.Module):
    """Linear, then ReLU. Shapes: (batch, in_units) to (batch, out_units)."""

    def __init__(self, in_units: int, out_units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_units, out_units)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.linear(x))
        return y


class DigitsMLP(nn.Module):
    """Dense blocks, then a linear head.

    Shapes: images (batch, 1, size, size); logits (batch, class).
    """

    def __init__(
        self, hidden: Sequence[int] = (64, 32), num_classes: int = 10, size: int = 8
    ) -> None:
        super().__init__()
        widths = [size * size, *hidden]
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(
            *(DenseBlock(before, after) for before, after in itertools.pairwise(widths))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.flatten(images)))
        return logits

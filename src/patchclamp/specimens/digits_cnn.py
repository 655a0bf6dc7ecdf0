"""A small convolutional classifier of 8 x 8 images: conv, batch norm, ReLU, pool, head.

Shapes: images (batch, 1, 8, 8) in [0, 1]; logits (batch, class).
Source: LeCun et al. 1998 (LeNet), with batch normalisation of Ioffe & Szegedy 2015.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """conv 3 x 3, batch norm, ReLU and, where asked for, max pooling by two.

    Shapes: (batch, in_channels, row, column) to (batch, out_channels, row / p, column / p)
    with p = 2 if `pool` else 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()
        self.pool: nn.Module = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(self.act(self.norm(self.conv(x))))
        return y


class DigitsCNN(nn.Module):
    """Convolutional blocks, then a linear head on the flattened map.

    The first block keeps the resolution and every later one halves it, so that
    8 x 8 images leave three blocks as 2 x 2 maps.

    Shapes: images (batch, 1, size, size); logits (batch, class).
    """

    def __init__(
        self, channels: Sequence[int] = (16, 32, 32), num_classes: int = 10, size: int = 8
    ) -> None:
        super().__init__()
        widths = [1, *channels]
        self.blocks = nn.Sequential(
            *(
                ConvBlock(before, after, pool=index > 0)
                for index, (before, after) in enumerate(itertools.pairwise(widths))
            )
        )
        self.flatten = nn.Flatten()
        side = size // 2 ** (len(channels) - 1)
        self.head = nn.Linear(channels[-1] * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flatten(self.blocks(images)))
        return logits

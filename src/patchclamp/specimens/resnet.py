"""A small residual CNN with the habits of the networks that people download.

Those habits are what it is for: in-place ReLU, one ReLU module called twice in
a block, batch norm, and additions that no module owns.

Shapes: images (batch, 1, row, column); logits (batch, class).
Source: He et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    `act` works in place and is called twice.
    Shapes: (batch, in_channels, row, column) to
    (batch, out_channels, row / stride, column / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        z: Tensor = self.act(y + self.shortcut(x))
        return z


class SmallResNet(nn.Module):
    """Stem, residual stages (each after the first halves the resolution), mean pool, head.

    Shapes: images (batch, in_channels, row, column); logits (batch, class).
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        blocks_per_stage: int = 2,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        self.act = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        before = channels[0]
        for index, width in enumerate(channels):
            blocks: list[nn.Module] = []
            for block in range(blocks_per_stage):
                stride = 2 if index > 0 and block == 0 else 1
                blocks.append(ResidualBlock(before, width, stride=stride))
                before = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.act(self.norm(self.conv(images))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits

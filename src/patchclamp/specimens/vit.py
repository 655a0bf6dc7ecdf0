"""A small vision transformer with a class token, built on `nn.MultiheadAttention`.

`nn.MultiheadAttention` packs query, key and value into one weight, calls its
output projection without calling the module, and takes a fused path in eval
mode without gradients: three habits that a recorder has to cope with.

Shapes: images (batch, 1, size, size); logits (batch, class).
Source: Dosovitskiy et al. 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EncoderBlock(nn.Module):
    """x + attn(norm1(x)), then + mlp(norm2(.)). Shapes: (batch, token, width) to the same."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        z: Tensor = x + self.mlp(self.norm2(x))
        return z


class SmallViT(nn.Module):
    """Patches by strided convolution, class token, learned positions, encoder, head.

    Shapes: images (batch, in_channels, size, size); logits (batch, class); inside,
    tokens are (batch, 1 + (size / patch)^2, width) with the class token first.
    """

    def __init__(
        self,
        size: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        width: int = 32,
        num_layers: int = 2,
        num_heads: int = 4,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, num_heads, 4 * width) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(tokens.shape[0], -1, -1)
        x = torch.cat([first, tokens], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits

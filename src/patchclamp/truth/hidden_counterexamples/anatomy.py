"""The kinds of network that counterexamples are hidden in.

A `Sequential` of parts each of which `files.py` can write as ONNX: dense layers, strided
convolutions, or one block of attention over strips of two rows, with ReLU, sigmoid or tanh.

Shapes: T tokens of D numbers each. They keep an axis of 1 from the convolution that makes them:
a reshape in ONNX takes its shape as a tensor, which not every reader follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError


class Kind(StrEnum):
    """What comes before the last dense layers."""

    DENSE = "dense"
    CONV = "conv"
    ATTENTION = "attention"


class Activation(StrEnum):
    """The nonlinearity of all layers but the softmax of attention."""

    RELU = "relu"
    SIGMOID = "sigmoid"
    TANH = "tanh"


ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    Activation.RELU: nn.ReLU,
    Activation.SIGMOID: nn.Sigmoid,
    Activation.TANH: nn.Tanh,
}


class Tokens(nn.Module):
    """Channels of rows as tokens: (N, D, T, 1) to (N, 1, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 2, 1)


class Attention(nn.Module):
    """One head, added to what it reads: (N, 1, T, D) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.scale = 1 / math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(2, 3) * self.scale
        mixed: Tensor = scores.softmax(3) @ self.value(x)
        return x + mixed


class Beside(nn.Module):
    """A body added to what it reads."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.body(x)
        return made


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A network without its weights.

    Attributes:
        kind: what reads the input.
        activation: of every layer but the last.
        shape: of one input: (features,) for dense, (channels, height, width) for the others;
            attention leaves out the last row of an odd height.
        widths: of the dense layers.
        channels: of the convolutions, of stride 2 from the second on, or the width of a token.
        num_classes: outputs.
    """

    kind: Kind = Kind.DENSE
    activation: Activation = Activation.RELU
    shape: tuple[int, ...] = (10,)
    widths: tuple[int, ...] = (64, 64)
    channels: tuple[int, ...] = (8,)
    num_classes: int = 2

    def build(self) -> nn.Sequential:
        """The network with weights from torch's own random state.

        Raises: OptionError for a shape that the kind cannot read, or a size below 1.
        """
        self._require()
        before: list[nn.Module] = []
        if self.kind is Kind.CONV:
            before = self._convolutions()
        elif self.kind is Kind.ATTENTION:
            before = self._block()
        parts = nn.Sequential(*before, nn.Flatten())
        with torch.no_grad():
            size = parts(torch.zeros(1, *self.shape)).shape[1]
        sizes = [size, *self.widths, self.num_classes]
        for n, (inner, outer) in enumerate(pairwise(sizes)):
            parts.append(nn.Linear(inner, outer))
            if n < len(self.widths):
                parts.append(self._act())
        if self.activation is Activation.SIGMOID:
            _centre(parts)
        return parts

    def _act(self) -> nn.Module:
        return ACTIVATIONS[self.activation]()

    def _convolutions(self) -> list[nn.Module]:
        parts: list[nn.Module] = []
        for n, (inner, outer) in enumerate(pairwise((self.shape[0], *self.channels))):
            stride = 1 if n == 0 else 2
            parts += [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), self._act()]
        return parts

    def _block(self) -> list[nn.Module]:
        width = self.channels[0]
        body = nn.Sequential(nn.Linear(width, 2 * width), self._act(), nn.Linear(2 * width, width))
        return [
            nn.Conv2d(self.shape[0], width, (2, self.shape[2]), stride=(2, 1)),
            Tokens(),
            Attention(width),
            Beside(body),
        ]

    def _require(self) -> None:
        axes = 1 if self.kind is Kind.DENSE else 3
        if len(self.shape) != axes:
            raise OptionError(
                f"a network of kind '{self.kind}' reads another shape",
                got=f"shape={self.shape}",
                expected="(features,)" if axes == 1 else "(channels, height, width)",
            )
        if self.kind is Kind.ATTENTION and self.shape[1] < 2:
            raise OptionError("a strip has two rows", got=f"shape={self.shape}")
        if min(*self.shape, *self.widths, *self.channels) < 1 or self.num_classes < 2:
            raise OptionError(
                "sizes are at least 1 and classes at least 2",
                got=f"{self.shape}, {self.widths}, {self.channels}, {self.num_classes}",
            )


def _centre(parts: nn.Sequential) -> None:
    """Weights of sigmoid layers: slopes of 1/4 and values about 1/2 would else fade with depth."""
    linear = [p for p in parts if isinstance(p, nn.Linear)]
    for layer in linear[1:]:
        nn.init.normal_(layer.weight, std=4 / math.sqrt(layer.in_features))
        with torch.no_grad():
            layer.bias.copy_(-layer.weight.sum(1) / 2)

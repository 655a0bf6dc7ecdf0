"""Rows that are zero outside a few elements of a value, kept without the zeros.

Two kinds occur. Behind a ReLU, neurons that are dead on every box are left out of all rows
alike. And a row that starts at one element of a convolution's result is zero outside the
window of the layer before that this element reads: a few elements of thousands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.rules.base import Lines, Shape


@dataclass(frozen=True, eq=False)
class Window:
    """Where each row's window lies in a value (1, channels, height, width).

    Attributes:
        origin: row and column of its first element, (R, 2); outside the value where it is padded.
        size: channels, height and width of all windows.
    """

    origin: Tensor
    size: tuple[int, int, int]

    @property
    def num(self) -> int:
        """Elements of one window."""
        return math.prod(self.size)

    def index(self, shape: Shape) -> Tensor:
        """The flat elements of a value of this shape, (R, num); its size where outside of it."""
        channels, height, width = shape[-3:]
        down = self.origin[:, :1] + torch.arange(self.size[1])
        right = self.origin[:, 1:] + torch.arange(self.size[2])
        inside = ((down >= 0) & (down < height))[:, :, None] & ((right >= 0) & (right < width))[
            :, None
        ]
        places = down[:, :, None] * width + right[:, None]
        planes = torch.arange(channels) * (height * width)
        index = torch.where(
            inside[:, None], places[:, None] + planes[:, None, None], math.prod(shape)
        )
        return index.flatten(1)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Rows on a value, zero but for some elements of it.

    Attributes:
        A: coefficients, (N, R, K).
        shape: of the value.
        columns: which elements of the flat value they belong to, (K,), if the same in every row.
        window: where the rows lie, if each has a window of its own.
    """

    A: Tensor
    shape: Shape
    columns: Tensor | None = None
    window: Window | None = None

    @cached_property
    def index(self) -> Tensor:
        """Which elements of the flat value: (R or 1, K); the value's size stands for none."""
        if self.columns is not None:
            return self.columns[None]
        if self.window is None:
            raise TypeError("rows have neither columns nor a window")
        return self.window.index(self.shape)

    def take(self, x: Tensor) -> Tensor:
        """What lies under the coefficients of x (M, 1, *shape): (M, R or 1, K), 0 outside."""
        flat = x.reshape(x.shape[0], -1)
        if self.columns is not None:
            return flat.index_select(1, self.columns)[:, None]
        padded = functional.pad(flat, (0, 1))
        return padded.index_select(1, self.index.flatten()).reshape(-1, *self.index.shape)

    def dot(self, x: Tensor) -> Tensor:
        """The rows applied to x (N or 1, *shape): (N, R)."""
        return dot(self.A, self.take(x[:, None]))

    def lines(self, lines: Lines) -> Lines:
        """The lines of the elements that the rows have coefficients for."""
        return Lines(
            self.take(lines.below_slope),
            None if lines.below is None else self.take(lines.below),
            self.take(lines.above_slope),
            self.take(lines.above),
        )

    def dense(self) -> Tensor:
        """The rows with their zeros, (N, R, *shape)."""
        lead, size = self.A.shape[:2], math.prod(self.shape)
        flat = self.A.new_zeros(*lead, size + 1)
        flat = flat.scatter(2, self.index.expand(*lead, -1), self.A)
        return flat[:, :, :size].reshape(*lead, *self.shape)

    def signed(self) -> Sparse:
        """The rows, and behind them their negatives."""
        window = self.window
        if window is not None:
            window = replace(window, origin=window.origin.repeat(2, 1))
        return replace(self, A=torch.cat([self.A, -self.A], 1), window=window)


def dot(A: Tensor, x: Tensor) -> Tensor:
    """Sums of products: A (N or 1, R, K) with x (N or 1, R or 1, K) as (N, R)."""
    if x.shape[1] == 1:
        return (A @ x.mT)[:, :, 0]
    return (A * x).sum(2)

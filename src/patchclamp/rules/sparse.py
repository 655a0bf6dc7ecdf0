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
class Windows:
    """Where rows lie in a value (1, channels, height, width), each in a window of its own.

    Attributes:
        origin: row and column of the first element of every place, (P, 2); outside the value
            where that is padded.
        place: which place each row has, (R,).
        size: channels, height and width of all windows.
    """

    origin: Tensor
    place: Tensor
    size: tuple[int, int, int]

    def index(self, shape: Shape) -> Tensor:
        """Flat elements of a value of this shape for every place; its size where outside of it."""
        channels, height, width = shape[-3:]
        down = self.origin[:, :1] + torch.arange(self.size[1])
        right = self.origin[:, 1:] + torch.arange(self.size[2])
        inside_down = (down >= 0) & (down < height)
        inside_right = (right >= 0) & (right < width)
        planes = torch.arange(channels)[:, None, None] * (height * width)
        index = planes + (down * width)[:, None, :, None] + right[:, None, None]
        inside = inside_down[:, None, :, None] & inside_right[:, None, None]
        return torch.where(inside, index, math.prod(shape)).flatten(1)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Rows on a value, zero but for some elements of it.

    Attributes:
        A: coefficients, (N, R, K).
        shape: of the value.
        where: which elements of the flat value they belong to, (K,) in every row alike; or
            windows.
    """

    A: Tensor
    shape: Shape
    where: Tensor | Windows

    @cached_property
    def _index(self) -> Tensor:
        """Which elements of the flat value, for every place (or the only one): (P, K)."""
        return self.where.index(self.shape) if isinstance(self.where, Windows) else self.where[None]

    def take(self, x: Tensor) -> Tensor:
        """What lies under the coefficients of x (M, *shape): (M, R or 1, K), 0 outside."""
        flat = x.reshape(x.shape[0], -1)
        if not isinstance(self.where, Windows):
            return flat.index_select(1, self.where)[:, None]
        padded = functional.pad(flat, (0, 1))
        taken = padded.index_select(1, self._index.flatten()).reshape(-1, *self._index.shape)
        return taken.index_select(1, self.where.place)

    def within(self) -> Tensor:
        """The coefficients, 0 where a window lies outside of the value."""
        if not isinstance(self.where, Windows):
            return self.A
        inside = (self._index < math.prod(self.shape)).to(self.A.dtype)
        return self.A * inside.index_select(0, self.where.place)

    def dot(self, x: Tensor) -> Tensor:
        """The rows applied to x (N or 1, *shape): (N, R)."""
        return dot(self.A, self.take(x))

    def lines(self, lines: Lines) -> Lines:
        """The lines of the elements that the rows have coefficients for."""
        return Lines(
            self.take(lines.below_slope[:, 0]),
            None if lines.below is None else self.take(lines.below[:, 0]),
            self.take(lines.above_slope[:, 0]),
            self.take(lines.above[:, 0]),
        )

    def dense(self) -> Tensor:
        """The rows with their zeros, (N, R, *shape)."""
        lead, size = self.A.shape[:2], math.prod(self.shape)
        index = self._index
        if isinstance(self.where, Windows):
            index = index.index_select(0, self.where.place)
        flat = self.A.new_zeros(*lead, size + 1).scatter(2, index.expand(*lead, -1), self.A)
        return flat[:, :, :size].reshape(*lead, *self.shape)

    def rows(self, index: Tensor) -> Sparse:
        """Some of the rows."""
        where = self.where
        if isinstance(where, Windows):
            where = replace(where, place=where.place.index_select(0, index))
        return Sparse(self.A.index_select(1, index), self.shape, where)

    def signed(self) -> Sparse:
        """The rows, and behind them their negatives."""
        where = self.where
        if isinstance(where, Windows):
            where = replace(where, place=where.place.repeat(2))
        return Sparse(torch.cat([self.A, -self.A], 1), self.shape, where)


def dot(A: Tensor, x: Tensor) -> Tensor:
    """Sums of products: A (N or 1, R, K) with x (N or 1, R or 1, K) as (N, R)."""
    if x.shape[1] == 1:
        return (A @ x.mT)[:, :, 0]
    return (A * x).sum(2)

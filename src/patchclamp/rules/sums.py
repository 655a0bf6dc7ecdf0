"""Elementwise scaling, sums of several values, and sums over axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.rules.base import Affine, Shape


@dataclass(frozen=True, eq=False)
class Scale(Affine):
    """x -> x * factor + shift, elementwise; both (*shape), or None for 1 and 0."""

    shape: Shape
    factor: Tensor | None
    shift: Tensor | None

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    num_terms = 2

    @property
    def offset(self) -> Tensor | None:
        return self.shift

    @property
    def dtype(self) -> torch.dtype:
        given = self.factor if self.factor is not None else self.shift
        return torch.get_default_dtype() if given is None else given.dtype

    def forward(self, *values: Tensor) -> Tensor:
        x = values[0] if self.factor is None else values[0] * self.factor
        return x if self.shift is None else x + self.shift

    def spread(self, *radii: Tensor) -> Tensor:
        return radii[0] if self.factor is None else radii[0] * self.factor.abs()

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A if self.factor is None else A * self.factor,)


@dataclass(frozen=True, eq=False)
class Sum(Affine):
    """Values of one shape added up, each times a number."""

    shape: Shape
    factors: tuple[float, ...]

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,) * len(self.factors)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return len(self.factors) + 1

    def forward(self, *values: Tensor) -> Tensor:
        return _weighted(values, self.factors)

    def spread(self, *radii: Tensor) -> Tensor:
        return _weighted(radii, tuple(abs(f) for f in self.factors))

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return tuple(A if f == 1 else A * f for f in self.factors)


def _weighted(values: tuple[Tensor, ...], factors: tuple[float, ...]) -> Tensor:
    total: Tensor | None = None
    for x, f in zip(values, factors, strict=True):
        part = x if f == 1 else x * f
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a sum of nothing")
    return total


@dataclass(frozen=True, eq=False)
class Averaging(Affine):
    """A linear operator with weights that are not negative: sums, means, average pooling.

    Attributes:
        function: maps (M, *before) to (M, *output), each row by itself.
        before: shape of the argument.
        terms: how many elements are added up for one of the result, at most.
    """

    function: Callable[[Tensor], Tensor]
    before: Shape
    terms: int

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.before,)

    @cached_property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return tuple(self.function(torch.zeros(1, *self.before)).shape[1:])

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return self.terms + 1

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(values[0])

    def spread(self, *radii: Tensor) -> Tensor:
        return self.function(radii[0])

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        """The transpose, which is the gradient at any point."""
        flat = A.flatten(0, 1)
        with torch.enable_grad():
            at = flat.new_zeros(flat.shape[0], *self.before).requires_grad_()
            (rows,) = torch.autograd.grad(self.function(at), at, flat, create_graph=A.requires_grad)
        return (rows.reshape(*A.shape[:2], *self.before),)

"""Operators that only move values: reshapes, transposes, slices, gathers, concatenation, padding.

What such an operator does is found by running it on the numbers of its elements, so that one
rule serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.rules.base import Affine, Interval, Shape


@dataclass(frozen=True, eq=False)
class Reshape(Affine):
    """The same elements in the same order, in another shape."""

    before: Shape
    after: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.before,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.after

    def forward(self, *values: Tensor) -> Tensor:
        return values[0].reshape(values[0].shape[0], *self.after)

    def spread(self, *radii: Tensor) -> Tensor:
        return self.forward(*radii)

    def interval(self, *boxes: Interval) -> Interval:
        return Interval(self.forward(boxes[0].lower), self.forward(boxes[0].upper))

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A.reshape(*A.shape[:2], *self.before),)


@dataclass(frozen=True, eq=False)
class Take(Affine):
    """Element i of the result is element index[i] of the flat argument; (*output) of int64."""

    index: Tensor
    before: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.before,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return tuple(self.index.shape)

    @cached_property
    def _flat(self) -> Tensor:
        return self.index.flatten()

    @cached_property
    def _most(self) -> int:
        """How often the most wanted element is taken."""
        return int(torch.bincount(self._flat, minlength=1).max())

    @cached_property
    def _inverse(self) -> Tensor | None:
        """Where each element went, if the operator is a permutation."""
        if self._most > 1 or len(self._flat) != math.prod(self.before):
            return None
        return torch.argsort(self._flat)

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return 0 if self._most <= 1 else self._most

    def forward(self, *values: Tensor) -> Tensor:
        x = values[0].flatten(1)
        return x[:, self._flat].reshape(x.shape[0], *self.output)

    def spread(self, *radii: Tensor) -> Tensor:
        return self.forward(*radii)

    def interval(self, *boxes: Interval) -> Interval:
        return Interval(self.forward(boxes[0].lower), self.forward(boxes[0].upper))

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        flat, lead = A.flatten(2), A.shape[:2]
        if self._inverse is not None:
            return (flat[:, :, self._inverse].reshape(*lead, *self.before),)
        rows = A.new_zeros(*lead, math.prod(self.before)).index_add(2, self._flat, flat)
        return (rows.reshape(*lead, *self.before),)


@dataclass(frozen=True, eq=False)
class Join(Affine):
    """Arguments written into a constant: concatenation, stacking, padding.

    Attributes:
        places: for every argument, where its elements go in the flat result.
        template: the result where no argument goes, 0 where one does; (*output).
        shapes: of the arguments.
    """

    places: tuple[Tensor, ...]
    template: Tensor
    shapes: tuple[Shape, ...]

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return self.shapes

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return tuple(self.template.shape)

    @cached_property
    def _offset(self) -> Tensor | None:
        return self.template if bool((self.template != 0).any()) else None

    @property
    def offset(self) -> Tensor | None:
        return self._offset

    @property
    def dtype(self) -> torch.dtype:
        return self.template.dtype

    def _written(self, onto: Tensor, values: Sequence[Tensor]) -> Tensor:
        num = values[0].shape[0]
        flat = onto.flatten().expand(num, -1).clone()
        for place, value in zip(self.places, values, strict=True):
            flat[:, place] = value.flatten(1)
        return flat.reshape(num, *self.output)

    def forward(self, *values: Tensor) -> Tensor:
        return self._written(self.template, values)

    def spread(self, *radii: Tensor) -> Tensor:
        return self._written(torch.zeros_like(self.template), radii)

    def interval(self, *boxes: Interval) -> Interval:
        return Interval(
            self.forward(*(b.lower for b in boxes)), self.forward(*(b.upper for b in boxes))
        )

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        flat, lead = A.flatten(2), A.shape[:2]
        return tuple(
            flat[:, :, place].reshape(*lead, *shape)
            for place, shape in zip(self.places, self.shapes, strict=True)
        )


def moved(shape: Shape, operator: Callable[[Tensor], Tensor]) -> Reshape | Take:
    """The rule of an operator that only moves elements of one argument of this shape."""
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    index = operator(numbers)
    if index.numel() == numbers.numel() and torch.equal(index.flatten(), numbers.flatten()):
        return Reshape(shape, tuple(index.shape))
    return Take(index.contiguous(), shape)


def joined(
    parts: Sequence[Tensor | Shape],
    operator: Callable[[Sequence[Tensor]], Tensor],
    dtype: torch.dtype,
) -> Join:
    """The rule of an operator that joins arguments (given as shapes) with constants."""
    start, numbers, template = 0, [], []
    spans: list[tuple[int, Shape]] = []
    for part in parts:
        shape = tuple(part.shape) if isinstance(part, Tensor) else part
        size = math.prod(shape)
        if isinstance(part, Tensor):
            numbers.append(torch.full(shape, -1))
            template.append(part.to(dtype))
        else:
            numbers.append(torch.arange(start, start + size).reshape(shape))
            template.append(torch.zeros(shape, dtype=dtype))
            spans.append((start, shape))
            start += size
    places = torch.empty(start, dtype=torch.int64)
    flat = operator(numbers).flatten()
    taken = flat >= 0
    places[flat[taken]] = torch.arange(len(flat))[taken]
    return Join(
        tuple(places[begin : begin + math.prod(shape)] for begin, shape in spans),
        operator(template).contiguous(),
        tuple(shape for _, shape in spans),
    )

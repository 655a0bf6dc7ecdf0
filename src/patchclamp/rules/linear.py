"""Matrix products with a constant: linear layers, and constants on the left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.rules.base import Affine, Interval, Shape, gamma, magnitude


@dataclass(frozen=True, eq=False)
class Linear(Affine):
    """x (*lead, in) -> x @ weight.T + bias (*lead, out)."""

    weight: Tensor
    bias: Tensor | None
    lead: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return ((*self.lead, self.weight.shape[1]),)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return (*self.lead, self.weight.shape[0])

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return max(self.weight.shape) + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @cached_property
    def _sizes(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def _offset(self) -> Tensor | None:
        return None if self.bias is None else self.bias.expand(self.output).contiguous()

    @property
    def offset(self) -> Tensor | None:
        return self._offset

    def forward(self, *values: Tensor) -> Tensor:
        return functional.linear(values[0], self.weight, self.bias)

    def interval(self, *boxes: Interval) -> Interval:
        """As for all affine rules, with radius and size in one product."""
        lower, upper = boxes[0]
        middle = (lower + upper) / 2
        radius = torch.maximum(upper - middle, middle - lower)
        both = torch.cat([radius, magnitude(boxes[0])])
        spread, size = functional.linear(both, self._sizes).chunk(2)
        if self.bias is not None:
            size = size + self.bias.abs()
        spread = spread + gamma(self.num_terms + 4, size.dtype) * size
        spread = spread + torch.finfo(size.dtype).tiny
        made = self.forward(middle)
        return Interval(made - spread, made + spread)

    def spread(self, *radii: Tensor) -> Tensor:
        return functional.linear(radii[0], self._sizes)

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A @ self.weight,)

    @cached_property
    def single(self) -> bool:
        """Whether the weight meets one vector, and not several side by side."""
        return math.prod(self.lead) == 1

    def start(self, index: Tensor) -> tuple[Tensor, ...]:
        """Rows of the weight itself: nothing is multiplied."""
        num_out, num_in = self.weight.shape
        picked = self.weight.index_select(0, index % num_out)
        if self.single:
            return (picked.reshape(1, len(index), *self.inputs[0]),)
        rows = self.weight.new_zeros(len(index), math.prod(self.lead), num_in)
        rows[torch.arange(len(index)), index // num_out] = picked
        return (rows.reshape(1, len(index), *self.inputs[0]),)


@dataclass(frozen=True, eq=False)
class LeftProduct(Affine):
    """x (*batch, k, n) -> left (*batch or less, m, k) @ x."""

    left: Tensor
    shape: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return (*self.shape[:-2], self.left.shape[-2], self.shape[-1])

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return max(self.left.shape[-2:])

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def forward(self, *values: Tensor) -> Tensor:
        return self.left @ values[0]

    def spread(self, *radii: Tensor) -> Tensor:
        return self.left.abs() @ radii[0]

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return (self.left.mT @ A,)


@dataclass(frozen=True, eq=False)
class RightProduct(Affine):
    """x (*batch, m, k) -> x @ right (*batch or less, k, n), where right differs along the batch."""

    right: Tensor
    shape: Shape

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return (*self.shape[:-1], self.right.shape[-1])

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return max(self.right.shape[-2:])

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    def forward(self, *values: Tensor) -> Tensor:
        return values[0] @ self.right

    def spread(self, *radii: Tensor) -> Tensor:
        return radii[0] @ self.right.abs()

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A @ self.right.mT,)

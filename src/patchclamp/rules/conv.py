"""Convolutions with constant weights, in one, two or three dimensions, and their transposes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.rules.base import Affine, Shape
from patchclamp.rules.sparse import Sparse, Window

_FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@dataclass(frozen=True, eq=False)
class Conv(Affine):
    """x (batch, in, *space) -> (batch, out, *space'); weight (out, in / groups, *kernel)."""

    weight: Tensor
    bias: Tensor | None
    before: Shape
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.before,)

    @cached_property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.before[2:],
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.stride,
                strict=True,
            )
        ]
        return (self.before[0], self.weight.shape[0], *size)

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        per_output = math.prod(self.weight.shape[1:])
        per_input = self.weight.shape[0] // self.groups * math.prod(self.weight.shape[2:])
        return max(per_output, per_input) + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @cached_property
    def _sizes(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def _offset(self) -> Tensor | None:
        if self.bias is None:
            return None
        ones = (1,) * (len(self.before) - 2)
        return self.bias.reshape(1, -1, *ones).expand(self.output).contiguous()

    @property
    def offset(self) -> Tensor | None:
        return self._offset

    @cached_property
    def _left_over(self) -> tuple[int, ...]:
        """Elements at the far edge that no kernel position reaches."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) % s
            for n, p, d, k, s in zip(
                self.before[2:],
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.stride,
                strict=True,
            )
        )

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, *self.before[1:])
        y = _FORWARD[len(self.before) - 2](
            flat,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y.reshape(x.shape[0], *self.output)

    def forward(self, *values: Tensor) -> Tensor:
        return self._run(values[0], self.weight, self.bias)

    def spread(self, *radii: Tensor) -> Tensor:
        return self._run(radii[0], self._sizes, None)

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        rows = _TRANSPOSED[len(self.before) - 2](
            A.reshape(-1, *self.output[1:]),
            self.weight,
            None,
            stride=self.stride,
            padding=self.padding,
            output_padding=self._left_over,
            groups=self.groups,
            dilation=self.dilation,
        )
        return (rows.reshape(*A.shape[:2], *self.before),)

    def start(self, index: Tensor) -> tuple[Tensor, ...]:
        """One kernel for each row, put where the element reads; two dimensions, one group."""
        if len(self.before) != 4 or self.groups != 1 or self.before[0] != 1:
            return super().start(index)
        num_places = math.prod(self.output[2:])
        reads = self._reads[:, index % num_places].T
        kernels = self.weight[index // num_places].flatten(1)
        rows = self.weight.new_zeros(len(index), math.prod(self.before) + 1)
        rows.scatter_(1, reads, kernels)
        return (rows[:, :-1].reshape(1, len(index), *self.before),)

    @cached_property
    def has_windows(self) -> bool:
        """Whether rows are followed through this rule in windows: two dimensions, one group."""
        plain = self.groups == 1 and set(self.dilation) == {1}
        return len(self.before) == 4 and self.before[0] == 1 and plain

    def start_in_windows(self, index: Tensor) -> Sparse:
        """`start`, without the zeros around the kernels."""
        place = index % math.prod(self.output[2:])
        width = self.output[3]
        origin = self._origin(torch.stack([place // width, place % width], 1))
        window = Window(origin, self._reached((1, 1)))
        kernels = self.weight[index // math.prod(self.output[2:])]
        return Sparse(kernels.flatten(1)[None], self.before, window=window)

    def backward_in_windows(self, rows: Sparse) -> Sparse:
        """`backward` of rows with a window each; the windows grow by the kernel."""
        if rows.window is None:
            raise TypeError("rows have no windows")
        _, height, width = rows.window.size
        A = rows.A.reshape(*rows.A.shape[:2], *rows.window.size)
        size = self._reached((height, width))
        return Sparse(
            self._spread_out(A, (height, width)),
            self.before,
            window=Window(self._origin(rows.window.origin), size),
        )

    def _origin(self, origin: Tensor) -> Tensor:
        """Where the window of the argument begins, for windows of the result."""
        return origin * torch.tensor(self.stride) - torch.tensor(self.padding)

    def _reached(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """How large a window of the argument a window of the result reads."""
        high, wide = (
            (n - 1) * s + k
            for n, s, k in zip(size, self.stride, self.weight.shape[2:], strict=True)
        )
        return self.before[1], high, wide

    def _spread_out(self, A: Tensor, size: tuple[int, int]) -> Tensor:
        """Windows (N, R, out, *size) as windows of the argument, (N, R, K)."""
        spread = self.weight.flatten(1).T @ A.reshape(-1, A.shape[2], math.prod(size))
        made = functional.fold(
            spread, self._reached(size)[1:], self.weight.shape[2:], stride=self.stride
        )
        return made.reshape(*A.shape[:2], -1)

    @cached_property
    def _reads(self) -> Tensor:
        """Input elements that a kernel meets at every place; their number stands for padding."""
        size = math.prod(self.before)
        numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(self.before)
        met = functional.unfold(
            numbers,
            self.weight.shape[2:],
            dilation=self.dilation,
            padding=self.padding,
            stride=self.stride,
        )[0].long()
        return torch.where(met == 0, size, met - 1)


@dataclass(frozen=True, eq=False)
class TransposedConv(Affine):
    """x (batch, in, *space) -> (batch, out, *space'); weight (in, out / groups, *kernel)."""

    weight: Tensor
    bias: Tensor | None
    before: Shape
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.before,)

    @cached_property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return tuple(self._run(self.weight.new_zeros(1, *self.before), self.weight, None).shape[1:])

    @property
    def num_terms(self) -> int:  # type: ignore[override]  # computed, not stored
        return max(self.weight.shape[:2]) * math.prod(self.weight.shape[2:]) + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @cached_property
    def _offset(self) -> Tensor | None:
        if self.bias is None:
            return None
        ones = (1,) * (len(self.before) - 2)
        return self.bias.reshape(1, -1, *ones).expand(self.output).contiguous()

    @property
    def offset(self) -> Tensor | None:
        return self._offset

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _TRANSPOSED[len(self.before) - 2](
            x.reshape(-1, *self.before[1:]),
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=self.groups,
            dilation=self.dilation,
        )
        return y.reshape(x.shape[0], self.before[0], *y.shape[1:])

    def forward(self, *values: Tensor) -> Tensor:
        return self._run(values[0], self.weight, self.bias)

    def spread(self, *radii: Tensor) -> Tensor:
        return self._run(radii[0], self.weight.abs(), None)

    def backward(self, A: Tensor) -> tuple[Tensor, ...]:
        rows = _FORWARD[len(self.before) - 2](
            A.reshape(-1, *self.output[1:]),
            self.weight,
            None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return (rows.reshape(*A.shape[:2], *self.before),)

"""Convolutions with constant weights, in one, two or three dimensions, and their transposes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.rules.base import Affine, Shape
from patchclamp.rules.sparse import Sparse, Windows

_FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}

FEW_CHANNELS = 8
"""Library code for transposed convolutions is several times slower on fewer channels."""

MAX_MATRIX = 1 << 16
"""Elements of the matrix that stands for a convolution on small windows."""


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
        if self.has_windows and self.before[1] < FEW_CHANNELS:
            rows = self._folded(A.reshape(-1, *self.output[1:]), self.before[2:], self.padding)
            return (rows.reshape(*A.shape[:2], *self.before),)
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

    def _folded(self, A: Tensor, size: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """The transpose as a matrix product whose columns are then added up where they meet."""
        columns = self.weight.flatten(1).T @ A.flatten(2)
        return functional.fold(
            columns, size, self.weight.shape[2:], padding=padding, stride=self.stride
        )

    def start(self, index: Tensor) -> tuple[Tensor, ...]:
        """One kernel for each row, put where the element reads; two dimensions, one group."""
        if not self.is_plain:
            return super().start(index)
        num_places = math.prod(self.output[2:])
        reads = self._reads[:, index % num_places].T
        kernels = self.weight.flatten(1).index_select(0, index // num_places)
        rows = self.weight.new_zeros(len(index), math.prod(self.before) + 1)
        rows.scatter_(1, reads, kernels)
        return (rows[:, :-1].reshape(1, len(index), *self.before),)

    @cached_property
    def is_plain(self) -> bool:
        """Two dimensions, one example, one group."""
        return len(self.before) == 4 and self.before[0] == 1 and self.groups == 1

    @cached_property
    def has_windows(self) -> bool:
        """Whether rows are followed through this rule in windows."""
        return self.is_plain and set(self.dilation) == {1}

    def start_in_windows(self, index: Tensor) -> Sparse:
        """`start`, without the zeros around the kernels."""
        num_places, width = math.prod(self.output[2:]), self.output[3]
        place = index % num_places
        if len(index) < num_places:
            places, place = place.unique(return_inverse=True)
        else:
            places = torch.arange(num_places)
        origin = self._origin(torch.stack([places // width, places % width], 1))
        kernels = self.weight.flatten(1).index_select(0, index // num_places)
        return Sparse(kernels[None], self.before, Windows(origin, place, self._reached((1, 1))))

    def backward_in_windows(self, rows: Sparse) -> Sparse:
        """`backward` of rows with a window each; the windows grow by the kernel."""
        if not isinstance(rows.where, Windows):
            raise TypeError("rows have no windows")
        before = rows.where
        where = Windows(self._origin(before.origin), before.place, self._reached(before.size[1:]))
        A = rows.within()
        size = math.prod(before.size) * math.prod(where.size)
        if size <= MAX_MATRIX and not self.weight.requires_grad:
            made = A @ self._matrix(before.size)
        else:
            made = self._through_window(A.reshape(-1, *before.size))
        return Sparse(made.reshape(*rows.A.shape[:2], -1), self.before, where)

    def _through_window(self, A: Tensor) -> Tensor:
        """The transpose of rows (M, *size) on a window of the result."""
        if self.before[1] < FEW_CHANNELS:
            return self._folded(A, self._reached(A.shape[2:])[1:], (0, 0))
        return functional.conv_transpose2d(A, self.weight, stride=self.stride)

    def _matrix(self, size: tuple[int, int, int]) -> Tensor:
        """`_through_window` as a matrix: one product is faster than many small ones."""
        if size not in self._matrices:
            num = math.prod(size)
            one = torch.eye(num, dtype=self.dtype).reshape(num, *size)
            self._matrices[size] = self._through_window(one).flatten(1)
        return self._matrices[size]

    @cached_property
    def _matrices(self) -> dict[tuple[int, int, int], Tensor]:
        return {}

    def _origin(self, origin: Tensor) -> Tensor:
        """Where the window of the argument begins, for windows of the result."""
        return origin * torch.tensor(self.stride) - torch.tensor(self.padding)

    def _reached(self, size: tuple[int, ...]) -> tuple[int, int, int]:
        """How large a window of the argument a window of the result reads."""
        high, wide = (
            (n - 1) * s + k
            for n, s, k in zip(size, self.stride, self.weight.shape[2:], strict=True)
        )
        return self.before[1], high, wide

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

"""Sums and means over axes, and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchclamp.rules.base import Shape
from patchclamp.rules.maximum import AmaxAxis, MaxPool
from patchclamp.rules.operators.builder import Build, Builder
from patchclamp.rules.operators.matrices import per_axis
from patchclamp.rules.sums import Averaging
from patchclamp.rules.value import Value


def averaging(function: Callable[..., Tensor], terms: Callable[[Shape, Shape], int]) -> Build:
    """The builder of a linear operator with weights that are not negative."""

    def build(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
        """A sum with constant weights, exact."""
        kwargs.pop("dtype", None)

        def run(t: Tensor) -> Tensor:
            flat = [function(row, *args, **kwargs) for row in t]
            return torch.stack(flat)

        out = tuple(run(torch.zeros(1, *x.shape)).shape[1:])

        def all_rows(t: Tensor) -> Tensor:
            """At once where the operator takes one axis more, else row by row."""
            return torch.func.vmap(lambda row: function(row, *args, **kwargs))(t)

        return b.add(Averaging(all_rows, x.shape, terms(x.shape, out)), x)

    return build


def share(before: Shape, after: Shape) -> int:
    """How many elements go into one, where all go into one alike."""
    return -(-math.prod(before) // max(math.prod(after), 1))


def everything(before: Shape, after: Shape) -> int:
    """All elements may go into one."""
    return math.prod(before)


def average_pooled(
    b: Builder,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """A sum with constant weights, exact."""

    def pool(t: Tensor) -> Tensor:
        flat = t.reshape(-1, *x.shape[-3:])
        y = torch.nn.functional.avg_pool2d(
            flat,
            tuple(kernel),
            tuple(stride) or None,
            tuple(padding),
            ceil_mode,
            count_include_pad,
            divisor_override,
        )
        return y.reshape(t.shape[0], *x.shape[:-3], *y.shape[1:])

    return b.add(Averaging(pool, x.shape, math.prod(per_axis(kernel, 2))), x)


def max_pooled(num_axes: int) -> Build:
    """The builder of max pooling over the last axes."""

    def build(
        b: Builder,
        x: Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Value:
        """The maximum of each window."""
        size = per_axis(kernel, num_axes)
        steps = per_axis(stride, num_axes) if stride else size
        rule = MaxPool(
            x.shape,
            kernel=size,
            stride=steps,
            padding=per_axis(padding, num_axes),
            dilation=per_axis(dilation, num_axes),
            ceil=ceil_mode,
        )
        return b.add(rule, x)

    return build


def largest(b: Builder, x: Value, axes: Sequence[int] = (), keepdim: bool = False) -> Value:
    """The maximum over axes, one after the other."""
    wanted = sorted((a % len(x.shape) for a in (axes or range(len(x.shape)))), reverse=True)
    for axis in wanted:
        x = b.add(AmaxAxis(x.shape, axis=axis, keep=keepdim), x)
    return x


def largest_with_index(b: Builder, x: Value, axis: int, keepdim: bool = False) -> list[Value]:
    """The maximum over one axis; where it lies has no bounds, and nobody may read it."""
    return [b.add(AmaxAxis(x.shape, axis=axis, keep=keepdim), x)]


def max_pooled_with_index(b: Builder, x: Value, *args: object, **kwargs: object) -> list[Value]:
    """The maximum of each window; where it lies has no bounds, and nobody may read it."""
    made = max_pooled(2)(b, x, *args, **kwargs)
    if not isinstance(made, Value):
        raise b.refuse("max pooling of this form")
    return [made]


def adaptively_max_pooled(num_axes: int) -> Build:
    """The builder of max pooling to so many places, where all windows are of one size."""

    def build(b: Builder, x: Value, places: Sequence[int]) -> list[Value]:
        """The maximum of each window; where it lies has no bounds, and nobody may read it."""
        before, after = x.shape[-num_axes:], per_axis(places, num_axes)
        if any(n % m for n, m in zip(before, after, strict=True)):
            raise b.refuse(f"adaptive max pooling from {before} to {after} places")
        size = tuple(n // m for n, m in zip(before, after, strict=True))
        made = max_pooled(num_axes)(b, x, size)
        if not isinstance(made, Value):
            raise b.refuse("max pooling of this form")
        return [made]

    return build

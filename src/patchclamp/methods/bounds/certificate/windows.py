"""ONNX operators whose outputs are weighted sums: matrix products, convolutions, pooling, means.

Each becomes one matrix, by arithmetic on the index of its input: the windows of the index
say which columns a row of the matrix has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchclamp.core.errors import EngineError
from patchclamp.methods.bounds.certificate.network import Matrix, csr
from patchclamp.methods.bounds.certificate.operators import Handler, Node, Value
from patchclamp.methods.bounds.certificate.rounding import Numbers
from patchclamp.methods.bounds.certificate.steps import MOST_ENTRIES, Index, Steps, View, moved

OUTSIDE = -1
"""Index of an element that a window has beyond the edge; its value is 0."""


def matrix(columns: Index, weights: Numbers, width: int) -> Matrix:
    """The matrix whose row i has weights[i] at columns[i] (both (rows, entries)), dense if full."""
    num_rows = len(columns)
    if num_rows * width <= max(4 * columns.size, 10_000):
        dense = np.zeros((num_rows, width + 1))
        np.put_along_axis(dense, np.where(columns < 0, width, columns), weights, axis=1)
        return np.ascontiguousarray(dense[:, :width])
    inside = columns != OUTSIDE
    ends = np.cumsum(inside.sum(axis=1))
    data, index = weights[inside], columns[inside]
    return csr(data, index, np.append(0, ends), width)


def _linear(
    steps: Steps, view: View, columns: Index, weights: Numbers, relative: float = 0.0
) -> View:
    """Output (*shape) from columns (*shape, entries) of the view's step and their weights."""
    shape = columns.shape[:-1]
    if columns.size > MOST_ENTRIES:
        raise EngineError(
            "a matrix of the network is too large",
            got=f"{columns.size} entries",
            expected=f"at most {MOST_ENTRIES}",
        )
    weights = np.broadcast_to(weights, columns.shape).reshape(-1, columns.shape[-1])
    flat = columns.reshape(-1, columns.shape[-1])
    built = matrix(flat, weights, steps.steps[view.step].size)
    return steps.linear(view, built, shape, relative)


def _matmul(steps: Steps, node: Node) -> Value:
    a, b = node.value(0), node.value(1)
    if isinstance(a, View) == isinstance(b, View):
        raise node.error("multiplies two constants, or two values that depend on the input")
    if isinstance(b, View):
        return _product(steps, b, np.asarray(a, np.float64), left=False)
    if isinstance(a, View):
        return _product(steps, a, np.asarray(b, np.float64), left=True)
    raise node.error("has no constant operand")


def _product(steps: Steps, view: View, weights: Numbers, *, left: bool) -> View:
    """view @ weights (left) or weights @ view, with the broadcasting of matmul."""
    view = steps.distinct(view)
    index = view.index
    drop_view, drop_weights = index.ndim == 1, weights.ndim == 1
    if left:
        index = index[None, :] if drop_view else index
        weights = weights[:, None] if drop_weights else weights
        columns, entries = index[..., :, None, :], np.swapaxes(weights, -1, -2)[..., None, :, :]
    else:
        index = index[:, None] if drop_view else index
        weights = weights[None, :] if drop_weights else weights
        columns, entries = np.swapaxes(index, -1, -2)[..., None, :, :], weights[..., :, None, :]
    shape = np.broadcast_shapes(columns.shape, entries.shape)
    if columns.shape[-1] != entries.shape[-1]:
        raise EngineError("a matrix product does not fit", got=f"{view.shape} and {weights.shape}")
    result = _linear(steps, view, np.broadcast_to(columns, shape), entries)
    row_dropped, column_dropped = (drop_view, drop_weights) if left else (drop_weights, drop_view)
    out = result.index[..., 0] if column_dropped else result.index
    if row_dropped:
        out = out[..., 0] if column_dropped else out[..., 0, :]
    return moved(result, out)


def _gemm(steps: Steps, node: Node) -> Value:
    view, weights = node.view(0), node.numbers(1)
    index = view.index.T if node.get("transA", 0) else view.index
    weights = weights.T if node.get("transB", 0) else weights
    alpha, beta = (float(np.float32(node.get(name, 1.0))) for name in ("alpha", "beta"))
    result = _product(steps, moved(view, index), weights, left=True)
    shift = np.zeros(())
    error: Numbers | float = 0.0
    if node.input(2) is not None:
        shift = beta * node.numbers(2)
        error = 0.0 if beta == 1.0 else 2.0**-52 * np.abs(shift)
    return steps.scaled(result, np.full((), alpha), shift, shift_error=error)


def _per_axis(node: Node, name: str, num_axes: int, default: int) -> list[int]:
    found = list(node.get(name, [default] * num_axes))
    if len(found) != num_axes:
        raise node.error(f"has {len(found)} {name} for {num_axes} axes")
    return found


def _windows(node: Node, index: Index, kernel: Sequence[int]) -> Index:
    """Index (N, C, *space) -> windows (N, C, *output, *kernel), OUTSIDE in the padding."""
    num = len(kernel)
    strides, dilations = (_per_axis(node, name, num, 1) for name in ("strides", "dilations"))
    auto = node.get("auto_pad", "NOTSET")
    extents = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    if auto == "NOTSET":
        pads = list(node.get("pads", [0] * 2 * num))
    elif auto == "VALID":
        pads = [0] * 2 * num
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = index.shape[2:]
        needed = [
            max((-(-size // stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, strides, extents, strict=True)
        ]
        small, large = [n // 2 for n in needed], [n - n // 2 for n in needed]
        pads = small + large if auto == "SAME_UPPER" else large + small
    else:
        raise node.error("pads in an unknown way", got=auto)
    if len(pads) != 2 * num or min(pads) < 0:
        raise node.error("has pads that are negative or do not fit its axes", got=str(pads))
    widths = [(0, 0), (0, 0)] + [(pads[i], pads[i + num]) for i in range(num)]
    padded = np.pad(index, widths, constant_values=OUTSIDE)
    if node.get("ceil_mode", 0):
        extra = [
            -(size - extent) % stride
            for size, extent, stride in zip(padded.shape[2:], extents, strides, strict=True)
        ]
        if any(extra):
            raise node.error("rounds its size up", expected="ceil_mode 0")
    axes = tuple(range(2, 2 + num))
    cut = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    cut += tuple(slice(None, None, d) for d in dilations)
    view = np.lib.stride_tricks.sliding_window_view
    if any(size < extent for size, extent in zip(padded.shape[2:], extents, strict=True)):
        raise node.error("has a window larger than its input")
    return view(padded, extents, axis=axes)[cut]


def _conv(steps: Steps, node: Node) -> Value:
    view, weights, groups = steps.distinct(node.view(0)), node.numbers(1), node.get("group", 1)
    kernel = weights.shape[2:]
    if tuple(node.get("kernel_shape", kernel)) != kernel or len(view.shape) != weights.ndim:
        raise node.error("has a kernel that does not fit its input or its kernel_shape")
    num_out, per_group = weights.shape[:2]
    if view.shape[1] != per_group * groups or num_out % groups:
        raise node.error("has channels that do not fit its groups")
    found = _windows(node, view.index, kernel)
    num, space = len(kernel), found.shape[2 : 2 + len(kernel)]
    # (N, groups, C / groups, *out, *kernel) -> (N, groups, 1, *out, C / groups * kernel)
    grouped = found.reshape(found.shape[0], groups, per_group, *space, *kernel)
    grouped = np.moveaxis(grouped, 2, 2 + num).reshape(found.shape[0], groups, 1, *space, -1)
    per_out = weights.reshape(1, groups, num_out // groups, *(1,) * num, -1)
    shape = np.broadcast_shapes(grouped.shape, per_out.shape)
    result = _linear(steps, view, np.broadcast_to(grouped, shape), per_out)
    result = moved(result, result.index.reshape(found.shape[0], num_out, *space))
    if node.input(2) is None:
        return result
    return steps.scaled(result, np.ones(()), node.numbers(2).reshape(-1, *(1,) * num))


def _average_pool(steps: Steps, node: Node) -> Value:
    view, kernel = steps.distinct(node.view(0)), list(node.get("kernel_shape", ()))
    if len(kernel) != len(view.shape) - 2:
        raise node.error("has a kernel that does not fit its input")
    found = _windows(node, view.index, kernel)
    columns = found.reshape(*found.shape[: -len(kernel)], -1)
    inside = columns != OUTSIDE
    counted = np.ones_like(inside) if node.get("count_include_pad", 0) else inside
    number = counted.sum(axis=-1, keepdims=True)
    if number.min() < 1:
        raise node.error("has a window without elements")
    return _linear(steps, view, columns, 1.0 / number, relative=2.0**-52)


def _reduce(steps: Steps, node: Node) -> Value:
    view = steps.distinct(node.view(0))
    num_axes = len(view.shape)
    if node.kind == "GlobalAveragePool":
        axes, keep = list(range(2, num_axes)), True
    else:
        given, keep = node.integers(1, "axes"), bool(node.get("keepdims", 1))
        if not given and node.get("noop_with_empty_axes", 0):
            return view
        axes = [axis % num_axes for axis in given] if given else list(range(num_axes))
    kept = [axis for axis in range(num_axes) if axis not in axes]
    columns = view.index.transpose(kept + axes).reshape([view.shape[i] for i in kept] + [-1])
    mean = node.kind != "ReduceSum"
    weight = np.full((1,), 1.0 / columns.shape[-1] if mean else 1.0)
    result = _linear(steps, view, columns, weight, relative=2.0**-52 if mean else 0.0)
    if not keep:
        return result
    return moved(result, np.expand_dims(result.index, tuple(axes)))


_POOL = "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides"

WEIGHTED_SUMS: dict[str, tuple[Handler, frozenset[str]]] = {
    "MatMul": (_matmul, frozenset()),
    "Gemm": (_gemm, frozenset({"alpha", "beta", "transA", "transB", "broadcast"})),
    "Conv": (
        _conv,
        frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}),
    ),
    "AveragePool": (_average_pool, frozenset(_POOL.split())),
    "GlobalAveragePool": (_reduce, frozenset()),
    "ReduceMean": (_reduce, frozenset({"axes", "keepdims", "noop_with_empty_axes"})),
    "ReduceSum": (_reduce, frozenset({"axes", "keepdims", "noop_with_empty_axes"})),
}

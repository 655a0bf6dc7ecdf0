"""ONNX operators as steps: one function for each, listed in `OPERATORS`.

A function gets the node and its inputs, each a constant array or a `View`, and returns the
node's outputs. It names the attributes that it knows; a node with others is refused, since
an attribute that is not understood may change what the operator computes. Source: the ONNX
operator specification, opsets 1 to 22.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import EngineError
from patchclamp.methods.bounds.certificate.network import Function
from patchclamp.methods.bounds.certificate.rounding import Numbers
from patchclamp.methods.bounds.certificate.steps import Steps, View, moved

Constant: TypeAlias = "NDArray[Any]"
Value: TypeAlias = "View | Constant"


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """A node of the graph: its name for messages, attributes, opset and inputs (None: left out)."""

    kind: str
    name: str
    attributes: dict[str, Any]
    opset: int
    inputs: tuple[Value | None, ...]
    num_outputs: int

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def input(self, number: int) -> Value | None:
        return self.inputs[number] if number < len(self.inputs) else None

    def value(self, number: int) -> Value:
        found = self.input(number)
        if found is None:
            raise self.error(f"has no input {number}")
        return found

    def view(self, number: int) -> View:
        found = self.value(number)
        if not isinstance(found, View):
            raise self.error(f"has a constant as input {number}", expected="the network's value")
        return found

    def constant(self, number: int) -> Constant:
        found = self.value(number)
        if isinstance(found, View):
            raise self.error(
                f"computes input {number} from the network's input", expected="a constant"
            )
        return found

    def numbers(self, number: int) -> Numbers:
        return np.asarray(self.constant(number), np.float64)

    def integers(self, number: int, attribute: str) -> list[int] | None:
        """A list of integers that older opsets keep in an attribute and newer ones in an input."""
        if attribute in self.attributes:
            return [int(i) for i in np.atleast_1d(self.attributes[attribute])]
        if self.input(number) is None:
            return None
        return [int(i) for i in self.constant(number).ravel()]

    def error(
        self, what: str, *, got: str | None = None, expected: str | None = None
    ) -> EngineError:
        return EngineError(f"node '{self.name}' ({self.kind}) {what}", got=got, expected=expected)


Handler: TypeAlias = "Callable[[Steps, Node], Value | list[Value]]"
OPERATORS: dict[str, tuple[Handler, frozenset[str]]] = {}


def _operator(*kinds: str, attributes: str = "") -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for kind in kinds:
            OPERATORS[kind] = (handler, frozenset(attributes.split()))
        return handler

    return register


def _move(value: Value, move: Callable[[Constant], Constant]) -> Value:
    """The same movement of elements, of a constant or of a view."""
    return moved(value, move(value.index)) if isinstance(value, View) else move(value)


# Elements moved around.


@_operator("Identity")
def _identity(steps: Steps, node: Node) -> Value:
    return node.value(0)


@_operator("Dropout", attributes="ratio seed is_test")
def _dropout(steps: Steps, node: Node) -> Value:
    training = node.opset < 7 and not node.get("is_test", 0)
    if training or (node.input(2) is not None and bool(node.constant(2))) or node.num_outputs > 1:
        raise node.error("is meant for training", expected="a network in inference mode")
    return node.value(0)


@_operator("Cast", attributes="to saturate")
def _cast(steps: Steps, node: Node) -> Value:
    from onnx import helper

    value, to = node.value(0), node.get("to")
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(to))
    if isinstance(value, View):
        if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise node.error("rounds the network's value", got=str(kind), expected="float32")
        return value
    cast = value.astype(kind)
    if not np.array_equal(cast.astype(np.float64), value.astype(np.float64)):
        raise node.error("rounds a constant", got=str(kind), expected="an exact cast")
    return cast


@_operator("Flatten", attributes="axis")
def _flatten(steps: Steps, node: Node) -> Value:
    value = node.value(0)
    axis = node.get("axis", 1)
    axis = axis + len(value.shape) if axis < 0 else axis
    first = int(np.prod(value.shape[:axis], dtype=np.int64))
    return _move(value, lambda a: a.reshape(first, -1))


@_operator("Reshape", attributes="shape allowzero")
def _reshape(steps: Steps, node: Node) -> Value:
    value, shape = node.value(0), node.integers(1, "shape")
    if shape is None:
        raise node.error("has no shape")
    if not node.get("allowzero", 0):
        shape = [value.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return _move(value, lambda a: a.reshape(shape))


@_operator("Squeeze", attributes="axes")
def _squeeze(steps: Steps, node: Node) -> Value:
    axes = node.integers(1, "axes")
    return _move(node.value(0), lambda a: np.squeeze(a, None if axes is None else tuple(axes)))


@_operator("Unsqueeze", attributes="axes")
def _unsqueeze(steps: Steps, node: Node) -> Value:
    return _move(node.value(0), lambda a: np.expand_dims(a, tuple(node.integers(1, "axes") or ())))


@_operator("Transpose", attributes="perm")
def _transpose(steps: Steps, node: Node) -> Value:
    return _move(node.value(0), lambda a: np.transpose(a, node.get("perm")))


@_operator("Expand")
def _expand(steps: Steps, node: Node) -> Value:
    value = node.value(0)
    shape = np.broadcast_shapes(value.shape, tuple(int(i) for i in node.constant(1)))
    return _move(value, lambda a: np.broadcast_to(a, shape))


@_operator("Slice", attributes="starts ends axes")
def _slice(steps: Steps, node: Node) -> Value:
    value = node.value(0)
    starts, ends = node.integers(1, "starts"), node.integers(2, "ends")
    if starts is None or ends is None:
        raise node.error("has no starts or ends")
    axes = node.integers(3, "axes") or list(range(len(starts)))
    strides = node.integers(4, "steps") or [1] * len(starts)
    cut: list[slice] = [slice(None)] * len(value.shape)
    for start, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
        size = value.shape[axis]
        if stride < 0 and end < -size:
            cut[axis] = slice(start, None, stride)
        else:
            cut[axis] = slice(start, end, stride)
    return _move(value, lambda a: a[tuple(cut)])


@_operator("Gather", attributes="axis")
def _gather(steps: Steps, node: Node) -> Value:
    value, index = node.value(0), node.constant(1).astype(np.int64)
    return _move(value, lambda a: np.take(a, index, axis=node.get("axis", 0)))


@_operator("Split", attributes="axis split num_outputs")
def _split(steps: Steps, node: Node) -> list[Value]:
    value, axis, sizes = node.value(0), node.get("axis", 0), node.integers(1, "split")
    if sizes is None:
        each = -(-value.shape[axis] // node.num_outputs)
        sizes = [each] * (node.num_outputs - 1)
        sizes.append(value.shape[axis] - sum(sizes))
    ends = np.cumsum(sizes)
    if ends[-1] != value.shape[axis] or len(sizes) != node.num_outputs:
        raise node.error("does not divide its input", got=f"{sizes} of {value.shape[axis]}")
    ranges = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [_move(value, partial(np.take, indices=part, axis=axis)) for part in ranges]


@_operator("Concat", attributes="axis")
def _concat(steps: Steps, node: Node) -> Value:
    values, axis = [node.value(i) for i in range(len(node.inputs))], node.get("axis", 1)
    if all(not isinstance(value, View) for value in values):
        return np.concatenate([np.asarray(value) for value in values], axis=axis)
    if len({value.step for value in values if isinstance(value, View)}) == 1 and all(
        isinstance(value, View) for value in values
    ):
        views = [value for value in values if isinstance(value, View)]
        return moved(views[0], np.concatenate([view.index for view in views], axis=axis))
    blank = [np.zeros(v.shape) if isinstance(v, View) else v.astype(np.float64) for v in values]
    marks = [np.full(value.shape, i) for i, value in enumerate(values)]
    constant, mark = np.concatenate(blank, axis=axis), np.concatenate(marks, axis=axis)
    chosen = [(i, value) for i, value in enumerate(values) if isinstance(value, View)]
    places = [np.flatnonzero(mark.ravel() == i) for i, _ in chosen]
    # Within one part, flat order of the whole is flat order of the part.
    return steps.placed([view for _, view in chosen], places, constant)


@_operator("Pad", attributes="pads paddings value mode")
def _pad(steps: Steps, node: Node) -> Value:
    value = node.value(0)
    pads = node.integers(1, "paddings" if "paddings" in node.attributes else "pads")
    if pads is None:
        raise node.error("has no pads")
    fill = float(node.constant(2)) if node.input(2) is not None else float(node.get("value", 0.0))
    axes = node.integers(3, "axes") or list(range(len(value.shape)))
    widths = [(0, 0)] * len(value.shape)
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    cut = tuple(
        slice(max(-before, 0), size - max(-after, 0))
        for (before, after), size in zip(widths, value.shape, strict=True)
    )
    value = _move(value, lambda a: a[cut])
    grown = [(max(before, 0), max(after, 0)) for before, after in widths]
    mode = node.get("mode", "constant")
    if mode in ("edge", "reflect", "wrap"):
        return _move(value, lambda a: np.pad(a, grown, mode=mode))
    if mode != "constant":
        raise node.error("pads in an unknown mode", got=mode)
    if not isinstance(value, View):
        return np.pad(value, grown, constant_values=fill)
    place = np.pad(np.ones(value.shape, bool), grown)
    return steps.placed([value], [np.flatnonzero(place)], np.where(place, 0.0, fill))


# Constants.


@_operator(
    "Constant",
    attributes="value value_float value_floats value_int value_ints",
)
def _constant(steps: Steps, node: Node) -> Value:
    if len(node.attributes) != 1:
        raise node.error("has no value, or several")
    (name, value), *_ = node.attributes.items()
    if name == "value":
        return np.asarray(value)
    return np.asarray(value, np.float64 if "float" in name else np.int64)


@_operator("Shape", attributes="start end")
def _shape(steps: Steps, node: Node) -> Value:
    return np.asarray(node.value(0).shape[node.get("start", 0) : node.get("end")], np.int64)


@_operator("ConstantOfShape", attributes="value")
def _constant_of_shape(steps: Steps, node: Node) -> Value:
    value = np.asarray(node.get("value", np.zeros(1, np.float32))).ravel()[0]
    return np.full(tuple(int(i) for i in node.constant(0)), value)


# Arithmetic.


def _aligned(node: Node) -> tuple[Value, Value]:
    """Both operands; opsets below 7 broadcast the second one from a given axis."""
    a, b = node.value(0), node.value(1)
    if node.get("broadcast", 0) and "axis" in node.attributes:
        axis = node.attributes["axis"]
        axis = axis + len(a.shape) if axis < 0 else axis
        tail = (1,) * (len(a.shape) - axis - len(b.shape))
        b = _move(b, lambda x: x.reshape(x.shape + tail))
    return a, b


@_operator("Add", "Sub", attributes="broadcast axis consumed_inputs")
def _add(steps: Steps, node: Node) -> Value:
    (a, b), sign = _aligned(node), 1.0 if node.kind == "Add" else -1.0
    if isinstance(a, View) and isinstance(b, View):
        return steps.total([a, b], [1.0, sign])
    if isinstance(a, View):
        shift = sign * np.asarray(b, np.float64)
        return steps.scaled(a, np.ones(()), shift)
    if isinstance(b, View):
        return steps.scaled(b, np.full((), sign), np.asarray(a, np.float64))
    return _folded(node, a, b)


@_operator("Sum")
def _sum(steps: Steps, node: Node) -> Value:
    views = [node.view(i) for i in range(len(node.inputs))]
    return steps.total(views, [1.0] * len(views))


@_operator("Neg")
def _neg(steps: Steps, node: Node) -> Value:
    value = node.value(0)
    if isinstance(value, View):
        return steps.scaled(value, np.full((), -1.0), np.zeros(()))
    return np.asarray(-value)


@_operator("Mul", "Div", attributes="broadcast axis consumed_inputs")
def _mul(steps: Steps, node: Node) -> Value:
    a, b = _aligned(node)
    if not isinstance(a, View) and not isinstance(b, View):
        return _folded(node, a, b)
    if isinstance(a, View) and isinstance(b, View):
        raise node.error("combines two values that both depend on the input")
    if isinstance(b, View):
        if node.kind == "Div":
            raise node.error("divides by a value that depends on the input")
        a, b = b, a
    if not isinstance(a, View) or isinstance(b, View):
        raise node.error("has no constant operand")
    scale = np.asarray(b, np.float64)
    if node.kind == "Mul":
        return steps.scaled(a, scale, np.zeros(()))
    if not np.all(np.abs(scale) > 0):
        raise node.error("divides by 0")
    return steps.scaled(a, 1.0 / scale, np.zeros(()), relative=2.0**-52)


def _folded(node: Node, a: Constant, b: Constant) -> Constant:
    """Arithmetic of constants, where it is exact: of integers, or of floats without rounding."""
    whole = np.issubdtype(a.dtype, np.integer) and np.issubdtype(b.dtype, np.integer)
    if whole and node.kind == "Div":
        if np.any(b == 0):
            raise node.error("divides by 0")
        return np.asarray(np.trunc(a / b), np.int64)
    if not whole:
        a, b = a.astype(np.float64), b.astype(np.float64)
    if node.kind == "Add":
        result = a + b
        exact = np.array_equal(result - a, b + 0 * a) and np.array_equal(result - b, a + 0 * b)
    elif node.kind == "Sub":
        result = a - b
        exact = np.array_equal(a - result, b + 0 * a) and np.array_equal(result + b, a + 0 * b)
    elif node.kind == "Mul":
        result = a * b
        # Two numbers of 24 bits have a product of 48.
        exact = whole or (_is_float32(a) and _is_float32(b))
    else:
        result = a / b
        exact = _is_float32(result) and _is_float32(b) and np.array_equal(result * b, a + 0 * b)
    if not exact:
        raise node.error("computes a constant that float64 rounds", expected="exact constants")
    return np.asarray(result)


def _is_float32(x: Constant) -> bool:
    return np.array_equal(x, x.astype(np.float32))


@_operator(
    "BatchNormalization",
    attributes="epsilon momentum spatial is_test training_mode consumed_inputs",
)
def _batch_norm(steps: Steps, node: Node) -> Value:
    if (
        node.get("training_mode", 0)
        or not node.get("spatial", 1)
        or (node.opset < 7 and not node.get("is_test", 0))
        or node.num_outputs > 1
    ):
        raise node.error("is meant for training, or not spatial", expected="inference mode")
    view = node.view(0)
    scale, shift, mean, variance = (node.numbers(i) for i in range(1, 5))
    variance = variance + float(np.float32(node.get("epsilon", 1e-5)))
    if not np.all(variance > 0):
        raise node.error("divides by the root of a variance that is not positive")
    # Sum, root and quotient are rounded once each: 2^-51 covers their relative errors.
    scale = scale / np.sqrt(variance)
    moved_mean = mean * scale
    total = shift - moved_mean
    error = 2.0**-50 * np.abs(moved_mean) + 2.0**-52 * np.abs(total) + 1e-300
    tail = (-1,) + (1,) * (len(view.shape) - 2)
    return steps.scaled(
        view,
        scale.reshape(tail),
        total.reshape(tail),
        relative=2.0**-51,
        shift_error=error.reshape(tail),
    )


@_operator("Relu", "Sigmoid", "Tanh", "LeakyRelu", attributes="alpha consumed_inputs")
def _elementwise(steps: Steps, node: Node) -> Value:
    slope = 0.0
    if node.kind == "LeakyRelu":
        slope = float(np.float32(node.get("alpha", 0.01)))
        if not 0.0 <= slope <= 1.0:
            raise node.error("has a slope outside [0, 1]", got=f"{slope:g}")
    return steps.elementwise(node.view(0), Function(node.kind), slope)

"""Which axes an operator is applied over one index at a time, and which operators are linear.

For every index of such an axis the operator does the same thing to that index alone:
a linear layer does it for every example and position, a softmax for every axis but its
own. These facts are what a neural circuit diagram shows of an operator. They are read
from the operator's name and options; an operator that is not in the tables is unknown,
never guessed. Tests check each fact by running the operator.

Source: Abbott 2024.
"""

from __future__ import annotations

from collections.abc import Callable

from patchclamp.engine.ir import Kind, Node

_JOINING = frozenset({"add", "sub", "mul", "div", "where", "maximum", "minimum", "masked_fill"})
_POINTWISE = _JOINING | {
    *("relu", "gelu", "silu", "mish", "sigmoid", "tanh", "elu", "leaky_relu", "softplus"),
    *("hardtanh", "clamp", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "pow", "square"),
    *("sin", "cos", "reciprocal", "to", "eq", "ne", "lt", "le", "gt", "ge", "sign"),
    *("detach", "rsub", "erf", "log1p", "expm1", "bitwise_not", "logical_not"),
}
_MOVING = frozenset({"transpose", "permute", "unsqueeze", "squeeze", "expand", "numpy_T", "t"})
_RESHAPING = frozenset({"view", "reshape", "flatten", "unflatten"})
_PARTS = frozenset({"slice", "select", "cat", "stack", "split", "chunk", "getitem", "unbind"})
REARRANGING = _MOVING | _RESHAPING | _PARTS
"""Operators that move, repeat or drop numbers and compute none."""

_ALONG = frozenset({"softmax", "log_softmax", "cumsum", "slice"})
_SUMMING = frozenset({"sum", "mean"})
_CONV = frozenset(f"conv{d}d" for d in "123")
_POOLS = {f"{kind}pool{d}d": int(d) for kind in ("max_", "avg_", "adaptive_avg_") for d in "123"}
_PRODUCTS = frozenset({"matmul", "bmm", "mm"})
_LINEAR_ALWAYS = (
    {"add", "sub", "rsub", "neg", "cumsum", "detach"}
    | _SUMMING
    | {name for name in _POOLS if "avg" in name}
)
_LINEAR_BY_WEIGHTS = _CONV | _PRODUCTS | {"linear", "batch_norm", "mul", "einsum"}


def applied_over(op: Node) -> tuple[int, ...] | None:
    """Axes of the operator's value along which it works on one index at a time.

    None where this is not known, or where the operator gives several values.
    """
    if op.shape is None:
        return None
    rank = len(op.shape)
    every = tuple(range(rank))
    name = op.operation
    if name in _POINTWISE or name in _MOVING or name == "batch_norm":
        return every
    if name in ("linear", "embedding"):
        return every[:-1]
    rules: tuple[tuple[bool, Callable[[Node], tuple[int, ...] | None]], ...] = (
        (name in _ALONG, lambda n: _all_but(n, _option(n, 1, "dim", 0))),
        (name == "layer_norm", _layer_norm),
        (name in _RESHAPING, _kept_in_front),
        (name == "select", _select),
        (name == "cat", lambda n: _all_but(n, _option(n, 1, "dim", 0))),
        (name in _SUMMING, _summed),
        (name in _CONV, lambda n: (0,) if rank == int(name[4]) + 2 else ()),
        (name in _POOLS, lambda n: every[: rank - _POOLS[name]]),
        (name in _PRODUCTS, lambda n: every[:-2] if _rows_and_columns(n) else None),
        (name == "attention", _attention),
    )
    return next((rule(op) for holds, rule in rules if holds), None)


def is_linear(op: Node) -> bool:
    """Whether, its weights held fixed, it is a linear map of what it reads, up to a constant."""
    num = len(_computed(op))
    name = op.operation
    if name in _LINEAR_ALWAYS or name in REARRANGING:
        return num > 0
    if name == "div":
        return num == 1 and not _is_computed(_argument(op, 1, "other"))
    return name in _LINEAR_BY_WEIGHTS and num == 1


def repeats(source: Node, op: Node) -> tuple[int, ...]:
    """Axes of the operator's value along which it repeats `source` to fit the others."""
    if op.shape is None or source.shape is None or op.operation not in _JOINING | {"expand"}:
        return ()
    before = len(op.shape) - len(source.shape)
    return tuple(
        i
        for i, size in enumerate(op.shape)
        if size != 1 and (i < before or source.shape[i - before] == 1)
    )


def origin(node: Node) -> Node:
    """The value itself: tags mark places, they compute nothing."""
    while node.kind is Kind.TAG:
        node = node.inputs()[0]
    return node


def _is_computed(x: object) -> bool:
    return isinstance(x, Node) and origin(x).kind is not Kind.CONST and x.shape is not None


def _computed(op: Node) -> list[Node]:
    """What the operator reads that is no weight and no size."""
    return [x for x in op.inputs() if _is_computed(x)]


def _argument(op: Node, place: int, name: str) -> object:
    return op.args[place] if len(op.args) > place else op.kwargs.get(name)


def _option(op: Node, place: int, name: str, default: int) -> object:
    found = _argument(op, place, name)
    return default if found is None else found


def _all_but(op: Node, dims: object) -> tuple[int, ...] | None:
    """Every axis but these; None where the options are not plain numbers."""
    listed = dims if isinstance(dims, list | tuple) else [dims]
    rank = len(op.shape or ())
    if not all(isinstance(d, int) for d in listed):
        return None
    taken = {d % rank for d in listed if isinstance(d, int)} if rank else set()
    return tuple(i for i in range(rank) if i not in taken)


def _layer_norm(op: Node) -> tuple[int, ...] | None:
    over = _argument(op, 1, "normalized_shape")
    rank = len(op.shape or ())
    return tuple(range(rank - len(over))) if isinstance(over, list | tuple) else None


def _kept_in_front(op: Node) -> tuple[int, ...]:
    """A reshape keeps the order of the numbers, so sizes that agree from the front stay axes."""
    before, after = _first_shape(op), op.shape or ()
    kept = []
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            break
        kept.append(i)
    return tuple(kept)


def _select(op: Node) -> tuple[int, ...]:
    return tuple(range(len(op.shape or ())))  # the axis that was selected from is gone


def _summed(op: Node) -> tuple[int, ...] | None:
    dims = _argument(op, 1, "dim")
    if not isinstance(dims, list | tuple | int) or dims == []:
        return ()
    keeps = _argument(op, 2, "keepdim") is True
    return _all_but(op, dims) if keeps else tuple(range(len(op.shape or ())))


def _attention(op: Node) -> tuple[int, ...]:
    """Every example, and every head where each has keys of its own."""
    shapes = [x.shape or () for x in _computed(op)[:3]]
    rank = len(op.shape or ())
    same = len({shape[:-2] for shape in shapes}) == 1
    return tuple(range(rank - 2)) if same else (0,)


def _first_shape(op: Node) -> tuple[int | str, ...]:
    return next((x.shape for x in op.inputs() if x.shape is not None), ())


def _rows_and_columns(op: Node) -> bool:
    return all(len(x.shape) >= 2 for x in op.inputs() if x.shape is not None)

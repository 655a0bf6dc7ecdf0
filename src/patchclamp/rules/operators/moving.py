"""Operators that only move elements, or join them with constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchclamp.rules.layout import joined, moved
from patchclamp.rules.operators.builder import Build, Builder, Operand, expanded, shape_of
from patchclamp.rules.operators.parts import replaced
from patchclamp.rules.value import Value

aten = torch.ops.aten


def concatenated(b: Builder, parts: Sequence[Operand], dim: int = 0) -> Value:
    """Values and constants written behind each other."""
    return _joined(b, parts, lambda ts: torch.cat(list(ts), dim))


def stacked(b: Builder, parts: Sequence[Operand], dim: int = 0) -> Value:
    """Values and constants written beside each other."""
    return _joined(b, parts, lambda ts: torch.stack(list(ts), dim))


def _joined(
    b: Builder, parts: Sequence[Operand], operator: Callable[[Sequence[Tensor]], Tensor]
) -> Value:
    given = [p.shape if isinstance(p, Value) else b.constant(p) for p in parts]
    rule = joined(given, operator, b.dtype)
    return b.add(rule, *(p for p in parts if isinstance(p, Value)))


def moving(target: Callable[..., Tensor], *, real: bool = False) -> Build:
    """The builder of an operator that only moves the elements of its first argument.

    Args:
        real: the operator takes no whole numbers, in which elements are counted.
    """

    def build(b: Builder, x: Operand, *args: object, **kwargs: object) -> Operand:
        """Moves elements; nothing is computed."""
        rest = [torch.empty(a.shape) if isinstance(a, Value) else a for a in args]
        if not isinstance(x, Value):  # only its new shape comes from a perturbed value
            return target(b.constant(x), *rest, **kwargs)
        if real:
            return b.add(moved(x.shape, lambda t: target(t.double(), *rest, **kwargs).long()), x)
        return b.add(moved(x.shape, lambda t: target(t, *rest, **kwargs)), x)

    return build


def embedding(b: Builder, weight: Operand, index: Operand, *rest: object) -> Value:
    """Rows of a perturbed table."""
    if not isinstance(weight, Value) or not isinstance(index, Tensor):
        raise b.refuse("an embedding of perturbed numbers")
    return b.add(moved(weight.shape, lambda t: t[index]), weight)


def shaped(target: Callable[..., Tensor]) -> Build:
    """The builder of a constant of which only the shape comes from a perturbed value."""

    def build(b: Builder, x: Value, *args: object, **kwargs: object) -> Operand:
        """A constant of the same shape."""
        made = target(torch.empty(x.shape, dtype=b.dtype), *args, **kwargs)
        return made.to(b.dtype) if made.is_floating_point() else made

    return build


def copied(b: Builder, x: Operand, source: Operand, *rest: object) -> Operand:
    """The source, broadcast to the shape of what it is copied over."""
    shape = shape_of(x)
    if isinstance(source, Value):
        return expanded(b, source, shape)
    return b.constant(source).expand(shape)


def scattered(target: Callable[..., Tensor]) -> Build:
    """The builder of an operator that writes its second argument over a part of its first."""

    def build(b: Builder, x: Operand, source: Operand, *args: object, **kwargs: object) -> Operand:
        """Part of a value replaced by another."""
        size = math.prod(shape_of(source))
        marks = target(
            torch.full(shape_of(x), -1),
            torch.arange(size).reshape(shape_of(source)),
            *args,
            **kwargs,
        ).flatten()
        at = (marks >= 0).nonzero().flatten()
        index = at[marks[at].argsort()]
        flat = shape_of(source)
        return replaced(b, x, index.reshape(flat), source)

    return build


def splitting(target: Callable[..., Sequence[Tensor]]) -> Build:
    """The builder of an operator that gives several pieces of its first argument."""

    def build(b: Builder, x: Value, *args: object, **kwargs: object) -> list[Value]:
        """Pieces; nothing is computed."""
        numbers = torch.arange(math.prod(x.shape)).reshape(x.shape)

        def piece(i: int) -> Callable[[Tensor], Tensor]:
            return lambda t: target(t, *args, **kwargs)[i]

        num = len(target(numbers, *args, **kwargs))
        return [b.add(moved(x.shape, piece(i)), x) for i in range(num)]

    return build


def indexed(b: Builder, x: Value, indices: Sequence[Operand | None]) -> Value:
    """Elements picked by constant numbers."""
    if not isinstance(x, Value) or any(isinstance(i, Value) for i in indices):
        raise b.refuse("indexing with perturbed numbers")
    return b.add(moved(x.shape, lambda t: aten.index.Tensor(t, list(indices))), x)


def same(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
    """The identity."""
    return x


def cast(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
    """The identity between real types: bounds are of the function in exact arithmetic."""
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if any(not k.is_floating_point for k in kinds):
        raise b.refuse("a perturbed value made an integer")
    return x

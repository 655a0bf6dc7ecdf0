"""Operators that only move elements, or join them with constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchclamp.rules.layout import joined, moved
from patchclamp.rules.operators.builder import Build, Builder, Operand
from patchclamp.rules.value import Value

aten = torch.ops.aten


def concatenated(b: Builder, parts: Sequence[Operand], dim: int = 0) -> Value:
    return _joined(b, parts, lambda ts: torch.cat(list(ts), dim))


def stacked(b: Builder, parts: Sequence[Operand], dim: int = 0) -> Value:
    return _joined(b, parts, lambda ts: torch.stack(list(ts), dim))


def _joined(
    b: Builder, parts: Sequence[Operand], operator: Callable[[Sequence[Tensor]], Tensor]
) -> Value:
    given = [p.shape if isinstance(p, Value) else b.constant(p) for p in parts]
    rule = joined(given, operator, b.dtype)
    return b.add(rule, *(p for p in parts if isinstance(p, Value)))


def moving(target: Callable[..., Tensor]) -> Build:
    """The builder of an operator that only moves the elements of its first argument."""

    def build(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
        return b.add(moved(x.shape, lambda t: target(t, *args, **kwargs)), x)

    return build


def splitting(target: Callable[..., Sequence[Tensor]]) -> Build:
    """The builder of an operator that gives several pieces of its first argument."""

    def build(b: Builder, x: Value, *args: object, **kwargs: object) -> list[Value]:
        numbers = torch.arange(math.prod(x.shape)).reshape(x.shape)

        def piece(i: int) -> Callable[[Tensor], Tensor]:
            return lambda t: target(t, *args, **kwargs)[i]

        num = len(target(numbers, *args, **kwargs))
        return [b.add(moved(x.shape, piece(i)), x) for i in range(num)]

    return build


def indexed(b: Builder, x: Value, indices: Sequence[Operand | None]) -> Value:
    if not isinstance(x, Value) or any(isinstance(i, Value) for i in indices):
        raise b.refuse("indexing with perturbed numbers")
    return b.add(moved(x.shape, lambda t: aten.index.Tensor(t, list(indices))), x)


def same(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
    return x


def cast(b: Builder, x: Value, *args: object, **kwargs: object) -> Value:
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if any(not k.is_floating_point for k in kinds):
        raise b.refuse("a perturbed value made an integer")
    return x

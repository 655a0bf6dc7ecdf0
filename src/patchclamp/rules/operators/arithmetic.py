"""Sums, products, quotients, powers and choices, of values and constants."""

from __future__ import annotations

import torch
from torch import Tensor

from patchclamp.rules import convex, products
from patchclamp.rules.operators.builder import Builder, Operand, expanded, scaled, shape_of, summed
from patchclamp.rules.value import Value


def add(b: Builder, x: Operand, y: Operand, *, alpha: float = 1) -> Value:
    """Sum of two values, exact; of a value and a constant, a shift."""
    if isinstance(x, Value) and isinstance(y, Value):
        return summed(b, x, y, alpha)
    if isinstance(x, Value):
        return scaled(b, x, None, b.constant(y) * alpha)  # type: ignore[arg-type]  # no Value here
    if not isinstance(y, Value):
        raise b.refuse("a sum of constants")
    return scaled(b, y, alpha if alpha != 1 else None, x)


def sub(b: Builder, x: Operand, y: Operand, *, alpha: float = 1) -> Value:
    """Difference, as a sum."""
    return add(b, x, y, alpha=-alpha)


def rsub(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> Value:
    """The second minus the first."""
    return add(b, y, x, alpha=-alpha)


def neg(b: Builder, x: Value) -> Value:
    """A factor of -1."""
    return scaled(b, x, -1.0, None)


def mul(b: Builder, x: Operand, y: Operand) -> Value:
    """By a constant, a factor; of two values, planes; of a value with itself, a square."""
    if isinstance(x, Value) and isinstance(y, Value):
        if x is y:
            return b.add(convex.Square(x.shape), x)
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        return b.add(products.Mul(shape), expanded(b, x, shape), expanded(b, y, shape))
    if isinstance(x, Value):
        return scaled(b, x, y, None)
    if not isinstance(y, Value):
        raise b.refuse("a product of constants")
    return scaled(b, y, x, None)


def div(b: Builder, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> Value:
    """By a constant, a factor; by a value of one sign, a product with its reciprocal."""
    if rounding_mode is not None:
        raise b.refuse("division that rounds")
    if isinstance(y, Value):
        return mul(b, x, b.add(convex.Reciprocal(y.shape), y))
    if not isinstance(x, Value):
        raise b.refuse("a quotient of constants")
    return scaled(b, x, b.constant(y).double().reciprocal(), None)


def power(b: Builder, x: Operand, exponent: Operand) -> Value:
    """Whole powers, roots and inverse roots."""
    if not isinstance(x, Value) or isinstance(exponent, (Value, Tensor)):
        raise b.refuse("a power with a perturbed exponent")
    if exponent == 0.5:
        return b.add(convex.Sqrt(x.shape), x)
    if exponent == -0.5:
        return b.add(convex.Rsqrt(x.shape), x)
    if exponent == 1:
        return x
    if exponent == 1.5:
        return mul(b, x, b.add(convex.Sqrt(x.shape), x))
    if float(exponent).is_integer() and exponent != 0:
        return b.add(convex.power(x.shape, int(exponent)), x)
    raise b.refuse(f"the power {exponent}")


def chosen(b: Builder, condition: Operand, x: Operand, y: Operand) -> Value:
    """By a constant condition: each side times 1 or 0."""
    if not isinstance(condition, Tensor):
        raise b.refuse("a choice by a perturbed condition")
    shape = tuple(torch.broadcast_shapes(condition.shape, shape_of(x), shape_of(y)))
    keep = condition.expand(shape)
    picked: list[Value] = []
    shift = torch.zeros(shape, dtype=b.dtype)
    for operand, mask in ((x, keep), (y, ~keep)):
        if isinstance(operand, Value):
            picked.append(scaled(b, expanded(b, operand, shape), mask.to(b.dtype), None))
        else:
            shift = torch.where(mask, b.constant(operand).expand(shape), shift)
    total = picked[0] if len(picked) == 1 else summed(b, picked[0], picked[1], 1.0)
    return scaled(b, total, None, shift) if bool((shift != 0).any()) else total


def masked_fill(b: Builder, x: Value, mask: Operand, fill: Operand) -> Value:
    """A choice by a constant mask."""
    if isinstance(mask, Value) or isinstance(fill, Value):
        raise b.refuse("a perturbed mask")
    return chosen(b, torch.as_tensor(mask), fill, x)


def dropout(b: Builder, x: Value, rate: float, train: bool) -> Value:
    """The identity, in evaluation mode."""
    if train:
        raise b.refuse("dropout in training mode")
    return x

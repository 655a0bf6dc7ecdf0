"""How captured operators become values: the builder, and broadcasting and scaling with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval, Rule, Shape
from patchclamp.rules.layout import moved
from patchclamp.rules.sums import Scale, Sum
from patchclamp.rules.value import Value


@dataclass
class Builder:
    """Collects the values of one network, in the order of computing."""

    dtype: torch.dtype
    values: list[Value]
    name: str = ""
    """Address of the captured operator that is being lowered, for messages."""
    native: torch.dtype = torch.float32
    """Precision of that operator in the network itself, for options that depend on it."""

    def add(self, rule: Rule, *arguments: Value, known: Interval | None = None) -> Value:
        """The value of a rule."""
        if not rule.output:
            raise self.refuse("a single number, without axes,")
        value = Value(rule, arguments, rule.output, self.name, len(self.values), known)
        self.values.append(value)
        return value

    def leaf(self, shape: Shape, name: str) -> Value:
        """A perturbed value of its own."""
        value = Value(None, (), shape, name, len(self.values))
        self.values.append(value)
        return value

    def constant(self, x: Tensor | float) -> Tensor:
        """A constant in the precision of the bounds."""
        return torch.as_tensor(x, dtype=self.dtype)

    def refuse(self, what: str) -> BoundError:
        """An error about the operator that is being lowered."""
        return BoundError(
            f"{what} at '{self.name}' has no bound rule",
            hint="docs/bounds.md has the table of operators, and so has "
            "patchclamp.rules.operators.listing.markdown()",
        )


Operand = Value | Tensor | float | int
Build = Callable[..., "Operand | Sequence[Operand]"]


def shape_of(x: Operand) -> Shape:
    return tuple(x.shape) if isinstance(x, (Value, Tensor)) else ()


def expanded(b: Builder, x: Value, shape: Shape) -> Value:
    """Broadcast to a shape."""
    if x.shape == shape:
        return x
    return b.add(moved(x.shape, lambda t: t.expand(shape)), x)


def scaled(b: Builder, x: Value, factor: Operand | None, shift: Operand | None) -> Value:
    """x * factor + shift with constants, broadcast."""
    shape = torch.broadcast_shapes(
        x.shape, *(shape_of(c) for c in (factor, shift) if c is not None)
    )
    x = expanded(b, x, tuple(shape))

    def full(c: Operand | None) -> Tensor | None:
        if c is None:
            return None
        if isinstance(c, Value):
            raise b.refuse("scaling by a perturbed value")
        return b.constant(c).expand(shape).contiguous()

    return b.add(Scale(tuple(shape), full(factor), full(shift)), x)


def summed(b: Builder, x: Value, y: Value, factor: float) -> Value:
    """x + factor * y of two perturbed values, broadcast."""
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    if x is y:
        return scaled(b, x, 1 + factor, None)
    return b.add(Sum(shape, (1.0, float(factor))), expanded(b, x, shape), expanded(b, y, shape))


def unary(rule: Callable[[Shape], Rule]) -> Build:
    """The builder of an elementwise operator without options."""

    def build(b: Builder, x: Value) -> Value:
        return b.add(rule(x.shape), x)

    build.__doc__ = f"{getattr(rule, '__name__', '')}: {rule.__doc__}"
    return build

"""Operators that are written as others: their bounds are those of the parts taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.rules.base import Interval
from patchclamp.rules.convex import ELU, Exp, Log, Softplus, Sqrt, Square
from patchclamp.rules.layout import moved
from patchclamp.rules.leaky import Abs
from patchclamp.rules.operators.arithmetic import add, mul, neg
from patchclamp.rules.operators.builder import (
    Build,
    Builder,
    Operand,
    expanded,
    scaled,
    summed,
)
from patchclamp.rules.operators.pooling import largest
from patchclamp.rules.relu import ReLU
from patchclamp.rules.s_shaped import Erf, Sigmoid
from patchclamp.rules.sums import Averaging
from patchclamp.rules.value import Value


def totalled(b: Builder, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """The sum over axes (all of them where none is named)."""
    wanted = sorted({a % len(x.shape) for a in axes} or range(len(x.shape)))
    behind = tuple(a + 1 for a in wanted)
    terms = math.prod(x.shape[a] for a in wanted)
    return b.add(Averaging(lambda t: t.sum(behind, keepdim), x.shape, terms), x)


def elu(
    b: Builder, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    """One rule where convex; else ReLU and an exponential of the negative part, added up."""
    if 0 < alpha * input_scale <= 1 and scale > 0:
        return b.add(ELU(x.shape, float(alpha), 1 / input_scale, float(scale)), x)
    up = b.add(ReLU(x.shape), x)
    down = neg(b, b.add(ReLU(x.shape), neg(b, x)))
    low = b.add(Exp(x.shape), scaled(b, down, input_scale, None))
    return summed(b, scaled(b, up, scale, None), scaled(b, low, alpha * scale, -alpha * scale), 1.0)


def celu(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    """ELU in units of alpha."""
    return elu(b, x, alpha, 1.0, 1 / alpha)


def selu(b: Builder, x: Value) -> Value:
    """ReLU and an exponential of the negative part, added up: it is not convex."""
    return elu(b, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def log_sigmoid(b: Builder, x: Value) -> Value:
    """-softplus(-x)."""
    return neg(b, b.add(Softplus(x.shape), neg(b, x)))


def glu(b: Builder, x: Value, dim: int = -1) -> Value:
    """The first half times the sigmoid of the second."""
    half = x.shape[dim] // 2
    first = b.add(moved(x.shape, lambda t: t.narrow(dim, 0, half)), x)
    second = b.add(moved(x.shape, lambda t: t.narrow(dim, half, half)), x)
    return mul(b, first, b.add(Sigmoid(second.shape), second))


def softshrink(b: Builder, x: Value, limit: float = 0.5) -> Value:
    """relu(x - limit) - relu(-x - limit)."""
    up = b.add(ReLU(x.shape), scaled(b, x, None, -limit))
    return summed(b, up, b.add(ReLU(x.shape), scaled(b, x, -1.0, -limit)), -1.0)


def log1p(b: Builder, x: Value) -> Value:
    """log(1 + x)."""
    return b.add(Log(x.shape), scaled(b, x, None, 1.0))


def expm1(b: Builder, x: Value) -> Value:
    """exp(x) - 1."""
    return scaled(b, b.add(Exp(x.shape), x), None, -1.0)


def erfc(b: Builder, x: Value) -> Value:
    """1 - erf(x)."""
    return scaled(b, b.add(Erf(x.shape), x), -1.0, 1.0)


def power_of(b: Builder, base: float, x: Value) -> Value:
    """A positive constant to a perturbed power: exp(x log(base))."""
    if not base > 0:
        raise b.refuse(f"a power of {base}")
    return b.add(Exp(x.shape), scaled(b, x, math.log(base), None))


def exp2(b: Builder, x: Value) -> Value:
    """2 to the power of x."""
    return power_of(b, 2.0, x)


def log2(b: Builder, x: Value) -> Value:
    """log(x) / log(2)."""
    return scaled(b, b.add(Log(x.shape), x), 1 / math.log(2), None)


def log10(b: Builder, x: Value) -> Value:
    """log(x) / log(10)."""
    return scaled(b, b.add(Log(x.shape), x), 1 / math.log(10), None)


def logsumexp(b: Builder, x: Value, axes: Sequence[int] | int, keepdim: bool = False) -> Value:
    """The mean plus log of the sum of exp(x - mean), so that exponentials stay small."""
    wanted = [axes] if isinstance(axes, int) else list(axes)
    wanted = [a % len(x.shape) for a in wanted]
    num = math.prod(x.shape[a] for a in wanted)
    middle = scaled(b, totalled(b, x, wanted, True), 1 / num, None)
    powers = b.add(Exp(x.shape), summed(b, x, middle, -1.0))
    total = totalled(b, powers, wanted, True)
    made = summed(b, b.add(Log(total.shape), total), middle, 1.0)
    if keepdim:
        return made
    return b.add(moved(made.shape, lambda t: t.squeeze(wanted)), made)


def log_softmax(b: Builder, x: Value, axis: int, *rest: object, **kwargs: object) -> Value:
    """x minus its log-sum-exp."""
    return summed(b, x, logsumexp(b, x, axis, True), -1.0)


def vector_norm(
    b: Builder,
    x: Value,
    order: float = 2,
    axes: Sequence[int] | int | None = None,
    keepdim: bool = False,
    **kwargs: object,
) -> Value:
    """Norm 2 as the root of a sum of squares; 1 and inf as sum and largest of absolute values."""
    wanted = [axes] if isinstance(axes, int) else list(axes or range(len(x.shape)))
    if order == 2:
        total = totalled(b, b.add(Square(x.shape), x), wanted, keepdim)
        total.known = _not_negative(b, total)
        return b.add(Sqrt(total.shape), total)
    if order == 1:
        return totalled(b, b.add(Abs(x.shape), x), wanted, keepdim)
    if order == math.inf:
        return largest(b, b.add(Abs(x.shape), x), wanted, keepdim)
    raise b.refuse(f"the norm {order}")


def variance(
    b: Builder,
    x: Value,
    axes: Sequence[int] | bool | None = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Value:
    """The mean square after the mean was taken off."""
    if isinstance(axes, bool):
        axes, unbiased = None, axes
    wanted = [a % len(x.shape) for a in (axes or range(len(x.shape)))]
    num = math.prod(x.shape[a] for a in wanted)
    less = (1.0 if unbiased in (None, True) else 0.0) if correction is None else float(correction)
    if num - less <= 0:
        raise b.refuse("a variance of too few elements")
    middle = scaled(b, totalled(b, x, wanted, True), 1 / num, None)
    square = b.add(Square(x.shape), summed(b, x, middle, -1.0))
    made = scaled(b, totalled(b, square, wanted, keepdim), 1 / (num - less), None)
    made.known = _not_negative(b, made)
    return made


def deviation(
    b: Builder,
    x: Value,
    axes: Sequence[int] | bool | None = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Value:
    """The root of the variance."""
    made = variance(b, x, axes, unbiased, keepdim, correction=correction)
    return b.add(Sqrt(made.shape), made)


def smallest(b: Builder, x: Value, axes: Sequence[int] = (), keepdim: bool = False) -> Value:
    """Minus the largest of the negatives."""
    return neg(b, largest(b, neg(b, x), axes, keepdim))


def smallest_with_index(b: Builder, x: Value, axis: int, keepdim: bool = False) -> list[Value]:
    """The minimum over one axis; where it lies has no bounds, and nobody may read it."""
    return [smallest(b, x, [axis], keepdim)]


def addcmul(b: Builder, x: Operand, y: Operand, z: Operand, *, value: float = 1) -> Operand:
    """x + value * y * z."""
    if not isinstance(y, Value) and not isinstance(z, Value):
        return add(b, x, b.constant(y) * b.constant(z) * value)
    return add(b, mul(b, y, z), x) if value == 1 else add(b, x, mul(b, y, z), alpha=value)


def lerp(b: Builder, x: Operand, y: Operand, share: float) -> Value:
    """(1 - share) x + share y."""
    own = scaled(b, x, 1 - share, None) if isinstance(x, Value) else b.constant(x) * (1 - share)
    return add(b, own, y, alpha=share)


def triangle(keep: str) -> Build:
    """The builder of tril and triu."""

    def build(b: Builder, x: Value, diagonal: int = 0) -> Value:
        """Zero above or below a diagonal."""
        mask = getattr(torch.ones(x.shape[-2:], dtype=b.dtype), keep)(diagonal)
        return scaled(b, x, mask, None)

    return build


def _not_negative(b: Builder, x: Value) -> Interval:
    low = torch.zeros(1, *x.shape, dtype=b.dtype)
    return Interval(low, torch.full_like(low, math.inf))


def either(b: Builder, x: Value, limits: Tensor, sign: int) -> Value:
    """The larger (sign 1) or smaller of a value and constants: the constants and a ReLU."""
    shape = tuple(torch.broadcast_shapes(x.shape, limits.shape))
    over = scaled(b, expanded(b, x, shape), float(sign), limits * -sign)
    return scaled(b, b.add(ReLU(shape), over), float(sign), limits)


def clamp_tensors(
    b: Builder, x: Value, low: Tensor | None = None, high: Tensor | None = None
) -> Value:
    """Between constant limits of each element."""
    if isinstance(low, Value) or isinstance(high, Value):
        raise b.refuse("a clamp with perturbed limits")
    if low is not None:
        x = either(b, x, b.constant(low), 1)
    return x if high is None else either(b, x, b.constant(high), -1)

"""Elementwise functions: which rule each operator has, with its options."""

from __future__ import annotations

import torch

from patchclamp.rules.convex import ELU, Exp, Log, Reciprocal, Rsqrt, Softplus, Sqrt, Square
from patchclamp.rules.gelu import Gelu, GeluTanh, HardSwish, Mish, SiLU
from patchclamp.rules.leaky import Abs, Clamp, HardSigmoid, LeakyReLU, PReLU
from patchclamp.rules.maximum import Maximum, Minimum
from patchclamp.rules.operators.builder import Build, Builder, Operand, expanded, unary
from patchclamp.rules.relu import ReLU
from patchclamp.rules.s_shaped import Atan, Erf, Sigmoid, Tanh
from patchclamp.rules.sine import Cos, Sin
from patchclamp.rules.value import Value

aten = torch.ops.aten


def gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    """Both forms."""
    return b.add(GeluTanh(x.shape) if approximate == "tanh" else Gelu(x.shape), x)


def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    """With a constant slope."""
    return b.add(LeakyReLU(x.shape, slope=float(slope)), x)


def prelu(b: Builder, x: Value, weight: Operand) -> Value:
    """With constant slopes, one for all or one for each channel."""
    if isinstance(weight, Value):
        raise b.refuse("PReLU with a perturbed slope")
    slopes = b.constant(weight)
    if slopes.numel() > 1:
        slopes = slopes.reshape(1, -1, *(1,) * (len(x.shape) - 2))
    return b.add(PReLU(x.shape, slopes), x)


def clamp(b: Builder, x: Value, low: float | None = None, high: float | None = None) -> Value:
    """Between constant limits, either of which may be missing."""
    limits = {k: float(v) for k, v in (("low", low), ("high", high)) if v is not None}
    return b.add(Clamp(x.shape, **limits), x)


def hardtanh(b: Builder, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    """Between -1 and 1 unless said otherwise."""
    return clamp(b, x, low, high)


def relu6(b: Builder, x: Value) -> Value:
    """Between 0 and 6."""
    return clamp(b, x, 0.0, 6.0)


def elu(
    b: Builder, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    """With alpha of 1, for which it is smooth."""
    if (alpha, scale, input_scale) != (1, 1, 1):
        raise b.refuse("ELU with factors")
    return b.add(ELU(x.shape), x)


def softplus(b: Builder, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """log(1 + exp(x)); torch's own switch to x above the threshold is below rounding."""
    if beta != 1:
        raise b.refuse("softplus with beta")
    return b.add(Softplus(x.shape), x)


def maximum(b: Builder, x: Operand, y: Operand) -> Value:
    """The larger of two values, or of a value and a constant number."""
    return _either(b, x, y, Maximum)


def minimum(b: Builder, x: Operand, y: Operand) -> Value:
    """The smaller of two values, or of a value and a constant number."""
    return _either(b, x, y, Minimum)


def _either(b: Builder, x: Operand, y: Operand, rule: type[Maximum]) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        return b.add(rule(shape), expanded(b, x, shape), expanded(b, y, shape))
    value, other = (x, y) if isinstance(x, Value) else (y, x)
    given = b.constant(other).unique() if not isinstance(other, Value) else torch.zeros(2)
    if not isinstance(value, Value) or len(given) != 1:
        raise b.refuse("the larger of a value and several constants")
    limit = float(given[0])
    return clamp(b, value, high=limit) if rule is Minimum else clamp(b, value, low=limit)


ELEMENTWISE: dict[object, Build] = {
    aten.relu.default: unary(ReLU),
    aten.relu_.default: unary(ReLU),
    aten.relu6.default: relu6,
    aten.leaky_relu.default: leaky_relu,
    aten.leaky_relu_.default: leaky_relu,
    aten.prelu.default: prelu,
    aten.clamp.default: clamp,
    aten.clamp_min.default: lambda b, x, low: clamp(b, x, low),
    aten.clamp_max.default: lambda b, x, high: clamp(b, x, None, high),
    aten.hardtanh.default: hardtanh,
    aten.hardtanh_.default: hardtanh,
    aten.hardsigmoid.default: unary(HardSigmoid),
    aten.hardswish.default: unary(HardSwish),
    aten.abs.default: unary(Abs),
    aten.elu.default: elu,
    aten.softplus.default: softplus,
    aten.gelu.default: gelu,
    aten.silu.default: unary(SiLU),
    aten.silu_.default: unary(SiLU),
    aten.mish.default: unary(Mish),
    aten.sigmoid.default: unary(Sigmoid),
    aten.tanh.default: unary(Tanh),
    aten.atan.default: unary(Atan),
    aten.erf.default: unary(Erf),
    aten.sin.default: unary(Sin),
    aten.cos.default: unary(Cos),
    aten.exp.default: unary(Exp),
    aten.log.default: unary(Log),
    aten.sqrt.default: unary(Sqrt),
    aten.rsqrt.default: unary(Rsqrt),
    aten.reciprocal.default: unary(Reciprocal),
    aten.square.default: unary(Square),
    aten.maximum.default: maximum,
    aten.max.other: maximum,
    aten.minimum.default: minimum,
    aten.min.other: minimum,
}

"""Elementwise functions: which rule each operator has, with its options."""

from __future__ import annotations

import torch

from patchclamp.rules.convex import Exp, Log, Reciprocal, Rsqrt, Softplus, Sqrt, Square
from patchclamp.rules.gelu import Gelu, GeluTanh, HardSwish, Mish, SiLU
from patchclamp.rules.leaky import Abs, Clamp, HardSigmoid, LeakyReLU, PReLU
from patchclamp.rules.maximum import Maximum, Minimum
from patchclamp.rules.operators.builder import Build, Builder, Operand, expanded, unary
from patchclamp.rules.operators.composed import (
    celu,
    clamp_tensors,
    either,
    elu,
    erfc,
    exp2,
    expm1,
    glu,
    log1p,
    log2,
    log10,
    log_sigmoid,
    power_of,
    selu,
    softshrink,
)
from patchclamp.rules.relu import ReLU
from patchclamp.rules.s_shaped import Atan, Erf, Sigmoid, Tanh
from patchclamp.rules.sine import Cos, Sin
from patchclamp.rules.value import Value

aten = torch.ops.aten


def gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    """GELU, exact or by tanh, each with its own rule."""
    return b.add(GeluTanh(x.shape) if approximate == "tanh" else Gelu(x.shape), x)


def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    """Leaky ReLU with a constant slope."""
    return b.add(LeakyReLU(x.shape, slope=float(slope)), x)


def prelu(b: Builder, x: Value, weight: Operand) -> Value:
    """PReLU with constant slopes, one for all or one for each channel."""
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


def clamp_above(b: Builder, x: Value, high: float) -> Value:
    """At most a constant limit."""
    return clamp(b, x, high=high)


def hardtanh(b: Builder, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    """Between -1 and 1 unless said otherwise."""
    return clamp(b, x, low, high)


def threshold(b: Builder, x: Value, limit: float, fill: float) -> Value:
    """x where it is above the limit and the limit elsewhere; with another filling it jumps."""
    if limit != fill:
        raise b.refuse("a threshold at which the function jumps")
    return clamp(b, x, low=float(limit))


def relu6(b: Builder, x: Value) -> Value:
    """Between 0 and 6."""
    return clamp(b, x, 0.0, 6.0)


def softplus(b: Builder, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """log(1 + exp(beta x)) / beta, with torch's own switch to x above the threshold."""
    return b.add(Softplus(x.shape, float(beta), float(threshold)), x)


def maximum(b: Builder, x: Operand, y: Operand) -> Value:
    """The larger of two values, or of a value and constants."""
    return _either(b, x, y, Maximum)


def minimum(b: Builder, x: Operand, y: Operand) -> Value:
    """The smaller of two values, or of a value and constants."""
    return _either(b, x, y, Minimum)


def _either(b: Builder, x: Operand, y: Operand, rule: type[Maximum]) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        return b.add(rule(shape), expanded(b, x, shape), expanded(b, y, shape))
    value, other = (x, y) if isinstance(x, Value) else (y, x)
    if not isinstance(value, Value) or isinstance(other, Value):
        raise b.refuse("the larger of two constants")
    given = b.constant(other)
    if given.numel() != 1:
        return either(b, value, given, -1 if rule is Minimum else 1)
    limit = float(given)
    return clamp(b, value, high=limit) if rule is Minimum else clamp(b, value, low=limit)


ELEMENTWISE: dict[object, Build] = {
    aten.relu.default: unary(ReLU),
    aten.relu_.default: unary(ReLU),
    aten.relu6.default: relu6,
    aten.leaky_relu.default: leaky_relu,
    aten.leaky_relu_.default: leaky_relu,
    aten.prelu.default: prelu,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_max.default: clamp_above,
    aten.hardtanh.default: hardtanh,
    aten.hardtanh_.default: hardtanh,
    aten.hardsigmoid.default: unary(HardSigmoid),
    aten.hardswish.default: unary(HardSwish),
    aten.abs.default: unary(Abs),
    aten.elu.default: elu,
    aten.elu_.default: elu,
    aten.celu.default: celu,
    aten.selu.default: selu,
    aten.log_sigmoid.default: log_sigmoid,
    aten.glu.default: glu,
    aten.softshrink.default: softshrink,
    aten.threshold.default: threshold,
    aten.clamp.Tensor: clamp_tensors,
    aten.log1p.default: log1p,
    aten.expm1.default: expm1,
    aten.exp2.default: exp2,
    aten.log2.default: log2,
    aten.log10.default: log10,
    aten.pow.Scalar: power_of,
    aten.erfc.default: erfc,
    aten.arctan.default: unary(Atan),
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

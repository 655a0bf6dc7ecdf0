"""Batch norm, layer norm and RMS norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.rules import convex, products
from patchclamp.rules.base import Interval
from patchclamp.rules.layout import Reshape
from patchclamp.rules.linear import Linear
from patchclamp.rules.operators.arithmetic import add, mul
from patchclamp.rules.operators.builder import Builder, Operand, expanded, scaled
from patchclamp.rules.value import Value


def batch_norm(
    b: Builder,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *rest: object,
) -> Value:
    """In evaluation mode; (training, momentum, eps, cudnn) or (momentum, eps) follow."""
    numbers = [r for r in rest if isinstance(r, float)]
    training = any(r is True for r in rest[:1])
    if (
        mean is None
        or variance is None
        or training
        or any(isinstance(c, Value) for c in (weight, bias, mean, variance))
    ):
        raise b.refuse("batch norm in training mode, or with perturbed parameters,")
    per_channel = b.constant(variance).double().add(numbers[-1]).rsqrt()
    if weight is not None:
        per_channel = per_channel * weight.double()
    shift = -b.constant(mean).double() * per_channel
    if bias is not None:
        shift = shift + bias.double()
    ones = (1,) * (len(x.shape) - 2)
    return scaled(b, x, per_channel.reshape(1, -1, *ones), shift.reshape(1, -1, *ones))


def _flattened(b: Builder, x: Value, num: int) -> Value:
    """With its last `num` axes as one."""
    lead = x.shape[: len(x.shape) - num]
    return b.add(Reshape(x.shape, (*lead, math.prod(x.shape[len(lead) :]))), x)


def normalised(b: Builder, x: Value, num: int, eps: float, *, centred: bool) -> Value:
    """Layer norm or RMS norm over the last `num` axes, without weight and bias.

    |x_i| <= sqrt(n) for both; sqrt(n - 1) where the mean is taken off first, since then the
    others add up to -x_i.
    """
    shape = x.shape
    flat = _flattened(b, x, num)
    n, lead = flat.shape[-1], flat.shape[:-1]
    ones = torch.full((n, n), 1.0 / n, dtype=b.dtype)
    if centred:
        flat = b.add(Linear(torch.eye(n, dtype=b.dtype) - ones, None, lead), flat)
    square = b.add(convex.Square(flat.shape), flat)
    mean = b.add(Linear(ones[:1], None, lead), square)
    raised = scaled(b, mean, None, eps)
    raised.known = _at_least(raised, eps)
    inverse = b.add(convex.Rsqrt(raised.shape), raised)
    limit = math.sqrt(n - 1 if centred else n) * (1 + 1e-6)
    bound = torch.full((1, *flat.shape), limit, dtype=b.dtype)
    made = b.add(
        products.Mul(flat.shape),
        flat,
        expanded(b, inverse, flat.shape),
        known=Interval(-bound, bound),
    )
    return b.add(Reshape(made.shape, shape), made)


def _at_least(x: Value, least: float) -> Interval:
    low = torch.full((1, *x.shape), least)
    return Interval(low, torch.full_like(low, math.inf))


def layer_norm(
    b: Builder,
    x: Value,
    axes: Sequence[int],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    if not isinstance(x, Value):
        raise b.refuse("layer norm of a constant with perturbed parameters")
    made = normalised(b, x, len(axes), eps, centred=True)
    if weight is not None:
        made = mul(b, made, weight)
    return made if bias is None else add(b, made, bias)


def rms_norm(
    b: Builder,
    x: Value,
    axes: Sequence[int],
    weight: Operand | None = None,
    eps: float | None = None,
) -> Value:
    small = torch.finfo(torch.float32).eps if eps is None else eps
    made = normalised(b, x, len(axes), small, centred=False)
    return made if weight is None else mul(b, made, weight)

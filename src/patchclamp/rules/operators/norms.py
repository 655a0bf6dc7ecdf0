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
    """A factor and shifts, in evaluation mode with constant parameters."""
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
    ones = (1,) * (len(x.shape) - 2)
    made = scaled(b, x, per_channel.reshape(1, -1, *ones), shift.reshape(1, -1, *ones))
    # by itself: the sum with the shift could be small where both are large, and what rounding
    # did to the shift would then be more than is allowed for
    return made if bias is None else scaled(b, made, None, bias.reshape(1, -1, *ones))


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
    raised.known = _at_least(raised, eps, b.dtype)
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


def _at_least(x: Value, least: float, dtype: torch.dtype) -> Interval:
    # in the precision of the bounds: a rounded-up limit would not hold
    low = torch.full((1, *x.shape), least, dtype=dtype)
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
    """Mean, square, inverse root and product; that |x| <= sqrt(n - 1) is known."""
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
    """As layer norm, without the mean."""
    small = torch.finfo(b.native).eps if eps is None else eps
    made = normalised(b, x, len(axes), small, centred=False)
    return made if weight is None else mul(b, made, weight)


def group_norm(
    b: Builder,
    x: Operand,
    num_groups: int,
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    """As layer norm, over groups of channels."""
    if not isinstance(x, Value):
        raise b.refuse("group norm of a constant with perturbed parameters")
    flat = b.add(Reshape(x.shape, (x.shape[0], num_groups, _share(x, num_groups))), x)
    made = normalised(b, flat, 1, eps, centred=True)
    made = b.add(Reshape(made.shape, x.shape), made)
    return _by_channel(b, made, weight, bias)


def instance_norm(
    b: Builder,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    """As layer norm, over the positions of each channel."""
    if not use_input or not isinstance(x, Value):
        raise b.refuse("instance norm with running statistics")
    return group_norm(b, x, x.shape[1], weight, bias, eps)


def _share(x: Value, num_groups: int) -> int:
    return math.prod(x.shape[1:]) // num_groups


def _by_channel(b: Builder, x: Value, weight: Operand | None, bias: Operand | None) -> Value:
    ones = (1,) * (len(x.shape) - 2)

    def along(c: Operand) -> Operand:
        if isinstance(c, Value):
            return b.add(Reshape(c.shape, (1, x.shape[1], *ones)), c)
        return b.constant(c).reshape(1, -1, *ones)

    made = x if weight is None else mul(b, x, along(weight))
    return made if bias is None else add(b, made, along(bias))

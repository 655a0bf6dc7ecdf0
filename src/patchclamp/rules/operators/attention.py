"""Fused attention written out: scores, softmax as one rule, weighted values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchclamp.rules.layout import moved
from patchclamp.rules.operators.builder import Builder, Operand, scaled, shape_of
from patchclamp.rules.operators.matrices import matmul, transposed
from patchclamp.rules.softmax import Softmax
from patchclamp.rules.value import Value


def attention(
    b: Builder,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Scores as a product, softmax as one rule, values as a product; masks are constant."""
    if dropout or isinstance(mask, Value):
        raise b.refuse("attention with dropout or with a perturbed mask")
    if enable_gqa:
        num = shape_of(query)[-3] // shape_of(key)[-3]
        key, value = (_repeated(b, x, num) for x in (key, value))
    turned = transposed(b, key) if isinstance(key, Value) else torch.as_tensor(key).mT
    factor = scale if scale is not None else 1 / math.sqrt(shape_of(query)[-1])
    if isinstance(query, Value) or isinstance(turned, Value):
        pattern = _pattern(b, matmul(b, query, turned), factor, mask, is_causal)
        return matmul(b, pattern, value)
    one = torch.eye(shape_of(value)[-2], dtype=b.dtype)
    fixed = torch.nn.functional.scaled_dot_product_attention(
        b.constant(query),
        torch.as_tensor(key, dtype=b.dtype),
        one.expand(*shape_of(key)[:-2], *one.shape),
        attn_mask=None if mask is None else _mask(b, torch.as_tensor(mask)),
        is_causal=is_causal,
        scale=scale,
    )
    return matmul(b, fixed, value)


def _mask(b: Builder, mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else b.constant(mask)


def _pattern(
    b: Builder, scores: Value, factor: float, mask: Operand | None, is_causal: bool
) -> Value:
    return b.add(Softmax(scores.shape), _masked(b, scores, factor, mask, is_causal))


def _masked(
    b: Builder, scores: Value, factor: float, mask: Operand | None, is_causal: bool
) -> Value:
    shift = torch.zeros(scores.shape, dtype=b.dtype)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        shift = shift.masked_fill(~keep, _HIDDEN)
    if isinstance(mask, Tensor):
        shift = (
            shift.masked_fill(~mask, _HIDDEN)
            if mask.dtype == torch.bool
            else shift + b.constant(mask).clamp(min=_HIDDEN)
        )
    return scaled(b, scores, factor, shift)


_HIDDEN = -1e9
"""A score so low that its weight is 0 in any precision, and finite, as boxes have to be."""


def _repeated(b: Builder, x: Operand, num: int) -> Operand:
    if isinstance(x, Value):
        return b.add(moved(x.shape, lambda t: t.repeat_interleave(num, -3)), x)
    return torch.as_tensor(x).repeat_interleave(num, -3)


def softmax(b: Builder, x: Value, axis: int, *rest: object, **kwargs: object) -> Value:
    """Softmax over one axis, as one rule."""
    return b.add(Softmax(x.shape, axis=axis), x)


def scores(
    b: Builder,
    query: Operand,
    key: Operand,
    mask: Operand | None,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> Value:
    """The scores of an attention that is written out, masked ones very low."""
    if grouped:
        key = _repeated(b, key, shape_of(query)[-3] // shape_of(key)[-3])
    turned = transposed(b, key) if isinstance(key, Value) else torch.as_tensor(key).mT
    factor = scale if scale is not None else 1 / math.sqrt(shape_of(query)[-1])
    return _masked(b, matmul(b, query, turned), factor, mask, is_causal)


def weighted(b: Builder, pattern: Operand, value: Operand, grouped: bool) -> Value:
    """The values of an attention that is written out, weighted by its pattern."""
    if grouped:
        value = _repeated(b, value, shape_of(pattern)[-3] // shape_of(value)[-3])
    return matmul(b, pattern, value)

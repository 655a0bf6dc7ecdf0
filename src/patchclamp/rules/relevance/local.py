"""What all relevance rules share: transposes, maxima, denominators, and the refusal of a rule."""

from __future__ import annotations

from functools import singledispatch
from typing import NoReturn

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError
from patchclamp.rules.base import Affine, Rule
from patchclamp.rules.conv import Conv, TransposedConv
from patchclamp.rules.convex import EvenPower, Reciprocal, Rsqrt
from patchclamp.rules.linear import LeftProduct, Linear, RightProduct
from patchclamp.rules.maximum import Maximum, Minimum, Over
from patchclamp.rules.products import Mul
from patchclamp.rules.value import Value

Weighted = Linear | Conv | TransposedConv | LeftProduct | RightProduct
"""Rules with weights."""

Parts = tuple[Tensor, ...]
"""For every argument of a rule, (N, *inputs[i])."""


def refuse(rule: Rule, what: str = "") -> NoReturn:
    """Raise for a rule that relevance cannot pass."""
    raise EngineError(
        f"relevance cannot pass {type(rule).__name__}" + (f": {what}" if what else ""),
        hint="start at a site behind it (at=...), or take a method that runs the live network, "
        "such as integrated gradients",
    )


def transposed(rule: Affine, y: Tensor) -> Parts:
    """The transpose of an affine rule applied to y (N, *output)."""
    return tuple(rows[:, 0] for rows in rule.backward(y[:, None]))


@singledispatch
def candidates(rule: Rule, x: Parts) -> Tensor:
    """What a maximum is taken of, along a new last axis; negated for a minimum."""
    refuse(rule)


@candidates.register
def _(rule: Over, x: Parts) -> Tensor:
    return rule.gather(x[0], -torch.inf)


@candidates.register
def _(rule: Maximum, x: Parts) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*x), -1)


@candidates.register
def _(rule: Minimum, x: Parts) -> Tensor:
    return -torch.stack(torch.broadcast_tensors(*x), -1)


def returned(rule: Rule, rows: Tensor) -> Parts:
    """What lies on the candidates (N, *output, num_candidates) as it lies on the arguments."""
    if isinstance(rule, Over):
        return (rule.scatter(rows[:, None])[:, 0],)
    return tuple(rows.unbind(-1))


def origin(value: Value) -> Value:
    """What a value was made of before it was moved, scaled or summed up, by one argument only."""
    while (
        isinstance(value.rule, Affine)
        and not isinstance(value.rule, Weighted)
        and len(value.arguments) == 1
    ):
        value = value.arguments[0]
    return value


def denominator(value: Value) -> int | None:
    """Which factor of a product stands for a division, as in norms; None for neither or both."""
    if not isinstance(value.rule, Mul):
        return None
    found = [_inverts(origin(a).rule) for a in value.arguments]
    return found.index(True) if sum(found) == 1 else None


def _inverts(rule: Rule | None) -> bool:
    return isinstance(rule, (Rsqrt, Reciprocal)) or (
        isinstance(rule, EvenPower) and rule.exponent < 0
    )

"""Relevance of a result laid to its arguments, and what of it goes elsewhere.

Relevance R of a result z, a sum of contributions, is divided in proportion to them. What falls to
a constant among them (a bias) and what a stabiliser in the denominator takes are kept apart, so
that nothing is lost:

    sum of R = sum over the arguments + offsets + absorbed

The division differs for layers, which have weights (see `layers`). The other rules:
    moves               R goes where the elements came from
    scales, sums, means in proportion to the contributions
    elementwise f       f(x) = (f(x) - f(0)) + f(0): the second part is an offset, so functions
                        with f(0) = 0 hand R on as it is
    max                 R goes to the winner, to equal winners alike
    x y                 half to each factor; all to x where y is a denominator, as in norms
    softmax             its first-order Taylor polynomial at x: x_i (R_i - p_i sum of R) to
                        logit i, and what remains is an offset

Source: Bach et al. 2015 (proportional division, epsilon); Achtibat et al. 2024, arXiv 2402.05602
(products, softmax and norms of transformers).
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp.rules.base import Affine, Rule
from patchclamp.rules.layout import Join, Reshape, Take
from patchclamp.rules.maximum import Maximum, Over
from patchclamp.rules.products import MatMul, Mul
from patchclamp.rules.relevance.local import Parts, candidates, refuse, returned, transposed
from patchclamp.rules.relu import ReLU
from patchclamp.rules.smooth import Unary
from patchclamp.rules.softmax import Softmax
from patchclamp.rules.sums import Scale


class Division(NamedTuple):
    """Where relevance went.

    Attributes:
        parts: on every argument, (N, *inputs[i]).
        offset: to constants, (N,).
        absorbed: taken by stabilisers, (N,).
    """

    parts: Parts
    offset: Tensor
    absorbed: Tensor


class Arrived(NamedTuple):
    """What a division needs.

    Attributes:
        R: relevance of the result, (N, *output).
        x: arguments; z: the result.
        epsilon: of the stabiliser.
        weights: how much of a product goes to each factor, (first, second).
        is_spread: of a layer: its offset gets nothing but what no argument contributed to.
        inside: of a layer: 0 where the argument holds a constant such as padding, (1, *shape);
            None for nowhere.
    """

    R: Tensor
    x: Parts
    z: Tensor
    epsilon: float
    weights: tuple[float, float] = (0.5, 0.5)
    is_spread: bool = False
    inside: Tensor | None = None


def total(x: Tensor) -> Tensor:
    """The sum of each row, (N,)."""
    return x.flatten(1).sum(1)


class Ratio(NamedTuple):
    """Relevance per contribution, and what has none.

    Attributes:
        each: R / (z + epsilon sign(z)), 0 where z is 0; (N, *output).
        absorbed: the stabiliser's share, (N,).
        stuck: relevance of elements without contributions, (N,).
    """

    each: Tensor
    absorbed: Tensor
    stuck: Tensor


def per_contribution(R: Tensor, z: Tensor, epsilon: float) -> Ratio:
    """Relevance over what it is divided by, kept away from 0."""
    away = torch.where(z < 0, -epsilon, epsilon)
    nothing = z == 0
    each = torch.where(nothing, 0.0, R / torch.where(nothing, 1.0, z + away))
    return Ratio(each, total(each * away), total(torch.where(nothing, R, 0.0)))


@singledispatch
def divided(rule: Rule, at: Arrived) -> Division:
    """Relevance of the result laid to the arguments.

    Raises:
        EngineError: a rule without a division.
    """
    refuse(rule)


def _kept(at: Arrived, *parts: Tensor) -> Division:
    none = at.R.new_zeros(len(at.R))
    return Division(parts, none, none)


@divided.register
def in_proportion(rule: Affine, at: Arrived) -> Division:
    """In proportion to the contributions of arguments and offset."""
    offset, z = rule.offset, at.z
    is_spread = False
    if at.is_spread and offset is not None:
        z = z - offset
        is_spread, offset = True, None
    ratio = per_contribution(at.R, z, at.epsilon)
    back = transposed(rule, ratio.each)
    parts = tuple(x * c for x, c in zip(at.x, back, strict=True))
    fixed = None if offset is None else total(ratio.each * offset)
    return settled(parts, ratio, is_spread, fixed)


def settled(parts: Parts, ratio: Ratio, is_spread: bool, offset: Tensor | None = None) -> Division:
    """A division; what no argument contributed to is the offset's where that has nothing else."""
    fixed = torch.zeros_like(ratio.absorbed) if offset is None else offset
    if is_spread:
        return Division(parts, fixed + ratio.stuck, ratio.absorbed)
    return Division(parts, fixed, ratio.absorbed + ratio.stuck)


@divided.register(Reshape)
@divided.register(Take)
def _(rule: Reshape | Take, at: Arrived) -> Division:
    return _kept(at, *transposed(rule, at.R))


@divided.register
def _(rule: Scale, at: Arrived) -> Division:
    if rule.shift is not None:
        return in_proportion(rule, at)
    if rule.factor is None:
        return _kept(at, at.R)
    stopped = torch.where(rule.factor == 0, at.R, 0.0)  # by a mask: nothing behind it is meant
    none = at.R.new_zeros(len(at.R))
    return Division((at.R - stopped,), none, total(stopped))


@divided.register
def _(rule: Join, at: Arrived) -> Division:
    parts = transposed(rule, at.R)
    none = at.R.new_zeros(len(at.R))
    left = total(at.R)
    for part in parts:
        left = left - total(part)
    return Division(parts, left, none)


@divided.register(Unary)
@divided.register(ReLU)
def _(rule: Unary | ReLU, at: Arrived) -> Division:
    rest = rule.forward(torch.zeros_like(at.x[0][:1]))
    if bool((rest == 0).all()) or bool((at.R == 0).all()):
        return _kept(at, at.R)
    if not bool(torch.isfinite(rest).all()):
        refuse(rule, "it has no finite value at 0 to measure contributions from")
    ratio = per_contribution(at.R, at.z, at.epsilon)
    part, fixed = ratio.each * (at.z - rest), ratio.each * rest
    return settled((part,), ratio, False, total(fixed))


@divided.register
def _(rule: Mul, at: Arrived) -> Division:
    return _kept(at, *(at.R * w for w in at.weights))


@divided.register
def _(rule: MatMul, at: Arrived) -> Division:
    (x, y), (first, second) = at.x, at.weights
    ratio = per_contribution(at.R, at.z, at.epsilon)
    parts = (first * x * (ratio.each @ y.mT), second * y * (x.mT @ ratio.each))
    return settled(parts, ratio, False)


@divided.register(Over)
@divided.register(Maximum)
def _(rule: Over | Maximum, at: Arrived) -> Division:
    found = candidates(rule, at.x)
    wins = (found == found.amax(-1, keepdim=True)).to(at.R.dtype)
    return _kept(at, *returned(rule, wins / wins.sum(-1, keepdim=True) * at.R[..., None]))


@divided.register
def _(rule: Softmax, at: Arrived) -> Division:
    sums = at.R.sum(rule.from_back, keepdim=True)
    part = at.x[0] * (at.R - at.z * sums)
    return Division((part,), total(at.R) - total(part), at.R.new_zeros(len(at.R)))

"""Multipliers: how a difference of a result is laid to differences of its arguments, exactly.

For two points x and x0, a multiplier m_i of argument i is such that the sum over i of
m_i (x_i - x0_i) is f(x) - f(x0). Multipliers chain like gradients, so what arrives at the inputs,
times their differences, adds up to the difference of the score.

Elementwise functions have one choice, the secant. Of the others
    x y         dx (y + y0) / 2 + dy (x + x0) / 2, which treats the factors alike
    x / s       with q = x / s, dq = (dx - ds (q + q0) / 2) / ((s + s0) / 2): the rule of the
                product x = q s, solved. Taken as a product with 1 / s, the norm of a baseline
                near 0 would give multipliers beyond all bounds that cancel each other
    max         the difference goes to the winner at x where it is not negative, else to the
                winner at x0; multipliers lie in [0, 1]
    softmax     with z_i = log p_i, dp_i = q_i dz_i, where q_i is the logarithmic mean of p_i and
                p0_i. The p add up to 1 at both points, so the sum of q_i dz_i is 0, and since
                dz_i = dx_i - dL with one L for all, dL is the mean of dx with weights q:
                    dp_i = q_i (dx_i - sum over j of q_j dx_j / sum over j of q_j)
                which has no exponential that could overflow and, like softmax, does not see a
                constant that is added to all dx. Derived here.

Statements hold over the reals; in float64 sums are met to about 1e-12.

Source: Shrikumar et al. 2017, arXiv 1704.02685 (chain rule and rescale rule).
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from patchclamp.rules.base import Affine, Rule
from patchclamp.rules.convex import Convex
from patchclamp.rules.leaky import Kinked
from patchclamp.rules.maximum import Maximum, Over
from patchclamp.rules.products import MatMul, Mul
from patchclamp.rules.relevance.local import Parts, candidates, refuse, returned, transposed
from patchclamp.rules.relu import ReLU
from patchclamp.rules.smooth import Smooth, Unary
from patchclamp.rules.softmax import Softmax

_CLOSE = 1e-8
"""Arguments that differ by a smaller share than this have the gradient between them."""

_LEAST = 1e-10
"""Differences of smooth functions' arguments below this are taken as none."""

_SAME_LOGIT = 1e-4


@singledispatch
def multipliers(rule: Rule, m: Tensor, x: Parts, x0: Parts) -> Parts:
    """Multipliers of the arguments from those of the result.

    Args:
        rule: the operator.
        m: (N, *output).
        x: the arguments, (N, *inputs[i]).
        x0: the same on the baseline, N or 1 of them.

    Raises:
        EngineError: a rule without multipliers.
    """
    refuse(rule)


@multipliers.register
def _(rule: Affine, m: Tensor, x: Parts, x0: Parts) -> Parts:
    return transposed(rule, m)


@multipliers.register(Unary)
@multipliers.register(ReLU)
def _(rule: Unary | ReLU, m: Tensor, x: Parts, x0: Parts) -> Parts:
    return (m * secant(rule, x[0], x0[0]),)


@multipliers.register
def _(rule: Mul, m: Tensor, x: Parts, x0: Parts) -> Parts:
    return m * ((x[1] + x0[1]) / 2), m * ((x[0] + x0[0]) / 2)


def quotient(m: Tensor, x: Tensor, x0: Tensor, r: Tensor, r0: Tensor) -> Parts:
    """Multipliers of x and r for x r, where r stands for a division: those of x / s, s = 1 / r.

    In terms of r: dx 2 r r0 / (r + r0) + dr (x r + x0 r0) / (r + r0). Where r changes its sign,
    those of a product.
    """
    same = r * r0 > 0
    total = torch.where(same, r + r0, 1.0)
    of_x = torch.where(same, 2 * r * r0 / total, (r + r0) / 2)
    of_r = torch.where(same, (x * r + x0 * r0) / total, (x + x0) / 2)
    return m * of_x, m * of_r


@multipliers.register
def _(rule: MatMul, m: Tensor, x: Parts, x0: Parts) -> Parts:
    return m @ ((x[1] + x0[1]) / 2).mT, ((x[0] + x0[0]) / 2).mT @ m


@multipliers.register(Over)
@multipliers.register(Maximum)
def _(rule: Over | Maximum, m: Tensor, x: Parts, x0: Parts) -> Parts:
    here, there = torch.broadcast_tensors(candidates(rule, x), candidates(rule, x0))
    (y, winner), (y0, before) = here.max(-1), there.max(-1)
    wins = torch.where(y >= y0, winner, before)[..., None]
    step = (here.gather(-1, wins) - there.gather(-1, wins))[..., 0]
    share = torch.where(step == 0, 1.0, (y - y0) / torch.where(step == 0, 1.0, step))
    rows = torch.zeros_like(here).scatter_(-1, wins, (m * share)[..., None])
    return returned(rule, rows)


@multipliers.register
def _(rule: Softmax, m: Tensor, x: Parts, x0: Parts) -> Parts:
    axis = rule.from_back
    q = logarithmic_mean(x[0].log_softmax(axis), x0[0].log_softmax(axis))
    total = q.sum(axis, keepdim=True)
    # unlikely logits at both points, all of them: nothing moves
    mean = (q * m).sum(axis, keepdim=True) / torch.where(total > 0, total, 1.0)
    return (q * (m - mean),)


def logarithmic_mean(z: Tensor, z0: Tensor) -> Tensor:
    """(exp(z) - exp(z0)) / (z - z0) for z, z0 <= 0; where they meet, exp(z)."""
    gap = z - z0
    close = gap.abs() < _SAME_LOGIT
    wide = (z.exp() - z0.exp()) / torch.where(close, 1.0, gap)
    # of the series of sinh(g / 2) / (g / 2), what is left out is below 1e-18
    return torch.where(close, ((z + z0) / 2).exp() * (1 + gap.square() / 24), wide)


def secant(rule: Unary | ReLU, x: Tensor, x0: Tensor) -> Tensor:
    """(f(x) - f(x0)) / (x - x0), the gradient between the two where they all but meet."""
    gap = x - x0
    near = _CLOSE * torch.maximum(x.abs(), x0.abs())
    if isinstance(rule, (Smooth, Convex)):
        near = near + _LEAST
    close = gap.abs() <= near
    rise = (rule.forward(x) - rule.forward(x0)) / torch.where(close, 1.0, gap)
    return torch.where(close, slope(rule, (x + x0) / 2), rise)


def slope(rule: Unary | ReLU, x: Tensor) -> Tensor:
    """f'(x)."""
    if isinstance(rule, ReLU):
        return (x > 0).to(x.dtype)
    if isinstance(rule, (Smooth, Convex, Kinked)):
        return rule.derivative(x)
    refuse(rule, "it has no derivative")

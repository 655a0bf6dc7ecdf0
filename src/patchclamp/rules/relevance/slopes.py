"""Gradients of single rules, and the two ways in which a ReLU can be bent for pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from patchclamp.rules.base import Affine, Rule
from patchclamp.rules.leaky import Clamp
from patchclamp.rules.relevance.local import Parts, transposed
from patchclamp.rules.relu import ReLU


def gradients(rule: Rule, g: Tensor, x: Parts) -> Parts:
    """The gradient at the arguments x (N, *inputs[i]) from that at the result (N, *output)."""
    if isinstance(rule, Affine):
        return transposed(rule, g)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in x]
        return torch.autograd.grad(rule.forward(*leaves), leaves, g)


def is_rectifier(rule: Rule | None) -> bool:
    """Whether a rule is 0 below 0 and grows above: ReLU, and ReLU6 and the like."""
    return isinstance(rule, ReLU) or (isinstance(rule, Clamp) and rule.low == 0 < rule.high)

"""Division of relevance in layers, whose rule is chosen: epsilon, gamma, alpha-beta, and for the
first layer flat, w-square and z-box.

Contributions are z_jk = x_j w_jk. Arguments of both signs are allowed everywhere: where a rule
speaks of positive contributions, these are x+ w+ and x- w-.

Source: Bach et al. 2015 (epsilon, alpha-beta, flat); Montavon et al. 2017 (w-square, z-box);
Montavon et al. 2019 (gamma).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.rules.base import Rule
from patchclamp.rules.linear import LeftProduct, Linear, RightProduct
from patchclamp.rules.relevance.local import Weighted, transposed
from patchclamp.rules.relevance.shares import (
    Arrived,
    Division,
    in_proportion,
    per_contribution,
    settled,
    total,
)

_CENTRING = 1e-12


def is_layer(rule: Rule | None) -> bool:
    """Whether a rule has weights of its own; taking the mean off, as norms do, has not."""
    if isinstance(rule, Linear):
        num = rule.weight.shape[0]
        if rule.bias is None and rule.weight.shape == (num, num) and num > 1:
            mean = torch.eye(num, dtype=rule.weight.dtype) - 1 / num
            return bool((rule.weight - mean).abs().max() > _CENTRING)
        return True
    return isinstance(rule, Weighted)


def reweighted(rule: Weighted, change: Callable[[Tensor], Tensor]) -> Weighted:
    """The layer with other weights and without bias."""
    if isinstance(rule, LeftProduct):
        return replace(rule, left=change(rule.left))
    if isinstance(rule, RightProduct):
        return replace(rule, right=change(rule.right))
    return replace(rule, weight=change(rule.weight), bias=None)


def _up(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _down(x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _offset(rule: Weighted, at: Arrived) -> Tensor | None:
    """What counts as a contribution of the layer's own."""
    return None if at.is_spread else rule.offset


class _Signed:
    """The contributions of one sign: x+ w+ and x- w-, or x+ w- and x- w+."""

    def __init__(self, rule: Weighted, at: Arrived, sign: int) -> None:
        x = at.x[0]
        self.sides = [(_up(x), reweighted(rule, _up if sign > 0 else _down))]
        if bool((x < 0).any()):
            self.sides.append((_down(x), reweighted(rule, _down if sign > 0 else _up)))
        offset = _offset(rule, at)
        self.offset = None if offset is None else (_up if sign > 0 else _down)(offset)

    def sum(self) -> Tensor:
        """Of all contributions to each element of the result, the offset among them."""
        made = sum((r.forward(x) for x, r in self.sides[1:]), self.sides[0][1].forward(self.first))
        return made if self.offset is None else made + self.offset

    @property
    def first(self) -> Tensor:
        return self.sides[0][0]

    def back(self, ratio: Tensor) -> Tensor:
        """Each argument's contributions times the ratio of where they go."""
        x, rule = self.sides[0]
        made = x * transposed(rule, ratio)[0]
        for x, rule in self.sides[1:]:
            made = made + x * transposed(rule, ratio)[0]
        return made

    def fixed(self, ratio: Tensor) -> Tensor:
        """The same of the offset, (N,)."""
        return ratio.new_zeros(len(ratio)) if self.offset is None else total(ratio * self.offset)


@dataclass(frozen=True, kw_only=True)
class LayerRule(ABC):
    """How a layer divides relevance."""

    @abstractmethod
    def divided(self, rule: Weighted, at: Arrived) -> Division:
        """Relevance of the layer's result laid to its argument."""


@dataclass(frozen=True, kw_only=True)
class Epsilon(LayerRule):
    """In proportion to all contributions; the stabiliser takes a share of what is near 0."""

    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise OptionError("epsilon is at least 0", got=str(self.epsilon))

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        return in_proportion(rule, at._replace(epsilon=self.epsilon))


@dataclass(frozen=True, kw_only=True)
class Gamma(LayerRule):
    """Contributions of the sign of the result count 1 + gamma times."""

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise OptionError("gamma is at least 0", got=str(self.gamma))

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        up, down = (_Signed(rule, at, sign) for sign in (1, -1))
        offset, whole = _offset(rule, at), rule.offset
        z = at.z if offset is whole or whole is None else at.z - whole
        high = z >= 0
        raised = z + self.gamma * torch.where(high, up.sum(), down.sum())
        ratio = per_contribution(at.R, raised, at.epsilon)
        of_up, of_down = torch.where(high, ratio.each, 0.0), torch.where(high, 0.0, ratio.each)
        part = at.x[0] * transposed(rule, ratio.each)[0]
        part = part + self.gamma * (up.back(of_up) + down.back(of_down))
        fixed = self.gamma * (up.fixed(of_up) + down.fixed(of_down))
        if offset is not None:
            fixed = fixed + total(ratio.each * offset)
        return settled((part,), ratio, at.is_spread, fixed)


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(LayerRule):
    """alpha times in proportion to positive contributions, minus beta = alpha - 1 times negative.

    With alpha 1 this is the z+ rule. What has no contribution of a sign is absorbed.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha >= 1:
            raise OptionError("alpha is at least 1", got=str(self.alpha))

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        part, offset = torch.zeros_like(at.x[0]), at.R.new_zeros(len(at.R))
        absorbed = torch.zeros_like(offset)
        for sign, weight in ((1, self.alpha), (-1, 1 - self.alpha)):
            if weight:
                side = _Signed(rule, at, sign)
                ratio = per_contribution(weight * at.R, side.sum(), at.epsilon)
                made = settled(
                    (side.back(ratio.each),), ratio, at.is_spread, side.fixed(ratio.each)
                )
                part, offset = part + made.parts[0], offset + made.offset
                absorbed = absorbed + made.absorbed
        return Division((part,), offset, absorbed)


@dataclass(frozen=True, kw_only=True)
class Flat(LayerRule):
    """Alike to all that has a weight other than 0, whatever value and weight; not to biases."""

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        return _by_weights(reweighted(rule, lambda w: (w != 0).to(w.dtype)), at)


@dataclass(frozen=True, kw_only=True)
class WSquare(LayerRule):
    """In proportion to squared weights, whatever the values; not to biases."""

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        return _by_weights(reweighted(rule, torch.square), at)


def _by_weights(layer: Weighted, at: Arrived) -> Division:
    ones = _inside(at, torch.ones_like(at.x[0][:1]))
    sums = layer.forward(ones)
    ratio = per_contribution(at.R, sums.expand_as(at.R), 0.0)
    return settled((ones * transposed(layer, ratio.each)[0],), ratio, False)


def _inside(at: Arrived, x: Tensor) -> Tensor:
    """0 where the argument holds a constant."""
    return x if at.inside is None else x * at.inside


@dataclass(frozen=True, kw_only=True)
class ZBox(LayerRule):
    """For values between two limits: x w - low w+ - high w-, which is not negative; no biases."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high:
            raise OptionError("0 lies in the box", got=f"[{self.low}, {self.high}]")

    def divided(self, rule: Weighted, at: Arrived) -> Division:
        x = at.x[0]
        if bool((x < self.low).any()) or bool((x > self.high).any()):
            raise OptionError(
                "the z-box rule is for values inside its box",
                got=f"values from {float(x.min()):g} to {float(x.max()):g}",
                expected=f"from {self.low:g} to {self.high:g}",
            )
        sides = [
            (x, reweighted(rule, lambda w: w)),
            (_inside(at, torch.full_like(x, -self.low)), reweighted(rule, _up)),
            (_inside(at, torch.full_like(x, -self.high)), reweighted(rule, _down)),
        ]
        sums = sides[0][1].forward(x)
        for value, layer in sides[1:]:
            sums = sums + layer.forward(value)
        ratio = per_contribution(at.R, sums, at.epsilon)
        part = torch.zeros_like(x)
        for value, layer in sides:
            part = part + value * transposed(layer, ratio.each)[0]
        return settled((part,), ratio, False)

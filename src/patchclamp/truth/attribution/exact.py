"""Networks whose attributions are known in closed form, and what they are.

All are f(x) = c + sum over k of out_k g(z_k), z = W x + d, where g is the identity or a
rectifier. Along the straight path from the baseline to x every z_k is linear, so that

- the gradient is the sum of out_k g'(z_k) W_k, and gradient times value that times x;
- integrated gradients are sum of out_k W_ki (x_i - b_i) rho_k, rho_k = (g(z_k(x)) - g(z_k(b)))
  / (z_k(x) - z_k(b)): the share of the path on which unit k is on. With one hidden layer that
  is what DeepLift's rescale rule gives as well;
- occlusion of feature i is f(x) - f(x with b_i for x_i);
- Shapley values average f(S with i) - f(S) over all orders, summed over all 2^n sets S.

Nothing here is differentiated or sampled: expected values come from weights in float64, and so
are a check of methods that do either.

Source: Sundararajan et al. 2017, arXiv 1703.01365 (integrated gradients); Shapley 1953; Lundberg
& Lee 2017, arXiv 1705.07874; Shrikumar et al. 2017, arXiv 1704.02685 (rescale rule).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError, nearest
from patchclamp.net import Net
from patchclamp.net import open as open_net

MOST_FEATURES = 12
"""Shapley values need every set of features."""


class Quantity(StrEnum):
    """What is known of a network, by the name of the method that should find it."""

    GRADIENT = "gradient"
    GRADIENT_TIMES_VALUE = "gradient_times_value"
    INTEGRATED_GRADIENTS = "integrated_gradients"
    DEEP_LIFT = "deep_lift"
    """By the rescale rule, without propagating through a product or a maximum."""
    SHAPLEY = "kernel_shap"
    """Of single features, all sets of them counted."""
    OCCLUSION = "occlusion"
    """Of one feature at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactNetwork:
    """A network, inputs, a baseline and what is right.

    Shapes: inputs (num, feature) float64; baseline (feature,); scores (num,); each expected
        value (num, feature). The network has one output, class 0.
    """

    net: Net
    inputs: Tensor
    baseline: Tensor
    scores: Tensor
    baseline_score: float
    expected: dict[Quantity, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class OneLayer:
    """Weights of f(x) = c + out . g(weight x + bias).

    Shapes: weight (unit, feature), bias (unit,), out (unit,), offset a number.

    Attributes:
        rectified: g is a rectifier; the identity where False.
    """

    weight: Tensor
    bias: Tensor
    out: Tensor
    offset: float = 0.0
    rectified: bool = True

    def score(self, x: Tensor) -> Tensor:
        """f of each row, in float64."""
        z = x.double() @ self.weight.T + self.bias
        return self.offset + self._g(z) @ self.out

    def module(self) -> nn.Sequential:
        """The same as a network in float64, in eval mode."""
        num_units, num_features = self.weight.shape
        first, last = (
            nn.Linear(num_features, num_units, dtype=torch.float64),
            nn.Linear(num_units, 1, dtype=torch.float64),
        )
        with torch.no_grad():
            first.weight.copy_(self.weight)
            first.bias.copy_(self.bias)
            last.weight.copy_(self.out[None])
            last.bias.fill_(self.offset)
        parts = [first, nn.ReLU(), last] if self.rectified else [first, last]
        return nn.Sequential(*parts).eval()

    def gradient(self, x: Tensor) -> Tensor:
        """Of f at each row."""
        z = x @ self.weight.T + self.bias
        slope = (z > 0).double() if self.rectified else torch.ones_like(z)
        return (slope * self.out) @ self.weight

    def integrated_gradients(self, x: Tensor, baseline: Tensor) -> Tensor:
        """Along the straight path, in closed form."""
        z, start = x @ self.weight.T + self.bias, self.weight @ baseline + self.bias
        moved = z - start
        at_rest = moved == 0
        rho = (self._g(z) - self._g(start)) / torch.where(at_rest, torch.ones_like(z), moved)
        return (rho * self.out) @ self.weight * (x - baseline)

    def occlusion(self, x: Tensor, baseline: Tensor) -> Tensor:
        """One feature at a time put to its baseline."""
        return torch.stack(
            [self.score(x) - self.score(_with(x, baseline, [i])) for i in range(x.shape[1])], 1
        )

    def shapley(self, x: Tensor, baseline: Tensor) -> Tensor:
        """From all sets of features; those outside a set have their baseline."""
        num = x.shape[1]
        if num > MOST_FEATURES:
            raise OptionError(
                "Shapley values run through all sets of features",
                got=f"{num} features",
                expected=f"at most {MOST_FEATURES}",
            )
        worth = {
            kept: self.score(_with(x, baseline, [i for i in range(num) if i not in kept]))
            for size in range(num + 1)
            for kept in itertools.combinations(range(num), size)
        }
        values = torch.zeros_like(x)
        for kept, score in worth.items():
            for i in (i for i in range(num) if i not in kept):
                gain = worth[tuple(sorted((*kept, i)))] - score
                values[:, i] += gain / (num * math.comb(num - 1, len(kept)))
        return values

    def at(self, inputs: Tensor, baseline: Tensor) -> ExactNetwork:
        """The network with these inputs, and everything that is known of it."""
        x, b = inputs.double(), baseline.double()
        return ExactNetwork(
            net=open_net(self.module(), x[:2]),
            inputs=x,
            baseline=b,
            scores=self.score(x),
            baseline_score=float(self.score(b[None])),
            expected={
                Quantity.GRADIENT: self.gradient(x),
                Quantity.GRADIENT_TIMES_VALUE: self.gradient(x) * x,
                Quantity.INTEGRATED_GRADIENTS: self.integrated_gradients(x, b),
                Quantity.DEEP_LIFT: self.integrated_gradients(x, b),
                Quantity.SHAPLEY: self.shapley(x, b),
                Quantity.OCCLUSION: self.occlusion(x, b),
            },
        )

    def _g(self, z: Tensor) -> Tensor:
        return z.clamp(min=0) if self.rectified else z


class Kind(StrEnum):
    """The networks."""

    LINEAR = "linear"
    """w . x + c: all quantities but the gradient are the same where the baseline is 0."""
    ADDITIVE = "additive"
    """A sum of one piecewise linear function for each feature: what a feature gives does not
    depend on the others, so that integrated gradients, Shapley values and occlusion agree."""
    AND = "and"
    """relu(x0 + x1 - 1): neither feature does anything alone."""
    OR = "or"
    """1 - relu(1 - x0 - x1): either feature does it all, so that occlusion gives 0 at (1, 1)."""
    PIECEWISE = "piecewise"
    """Eight rectified units that read all features."""


def exact_network(kind: Kind | str, *, num: int = 16, seed: int = 0) -> ExactNetwork:
    """One of the networks, with `num` inputs drawn at random; the same for the same seed.

    The baseline is 0 but for `PIECEWISE`, which has one of its own.

    Raises:
        OptionError: there is no such network, or num is below 1.
    """
    if str(kind) not in [*Kind]:
        raise OptionError(f"no exact network '{kind}'", nearest=nearest(str(kind), [*Kind]))
    if num < 1:
        raise OptionError("inputs are needed", got=str(num), expected="at least 1")
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ones = torch.ones(1, 2, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    if kind in (Kind.AND, Kind.OR):
        layer = (
            OneLayer(weight=ones, bias=-one, out=one)
            if kind == Kind.AND
            else OneLayer(weight=-ones, bias=one, out=-one, offset=1.0)
        )
        x = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 1.5
        x[0] = 1.0
        return layer.at(x, torch.zeros(2))
    num_features = 5
    x, zero = drawn(num, num_features), torch.zeros(num_features)
    if kind == Kind.LINEAR:
        layer = OneLayer(
            weight=drawn(3, num_features),
            bias=drawn(3),
            out=drawn(3),
            offset=0.5,
            rectified=False,
        )
        return layer.at(x, zero)
    if kind == Kind.ADDITIVE:
        weight = torch.eye(num_features, dtype=torch.float64).repeat(4, 1) * drawn(20, 1)
        return OneLayer(weight=weight, bias=drawn(20), out=drawn(20), offset=0.5).at(x, zero)
    return OneLayer(weight=drawn(8, num_features), bias=drawn(8), out=drawn(8)).at(
        x, drawn(num_features)
    )


def _with(x: Tensor, baseline: Tensor, features: list[int]) -> Tensor:
    """The rows with these features at their baseline."""
    made = x.clone()
    made[:, features] = baseline[features].to(x)
    return made

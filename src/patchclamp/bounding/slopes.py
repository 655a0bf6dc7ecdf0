"""Slopes chosen by gradient ascent instead of by rule (alpha-CROWN).

Every row has slopes of its own, in every layer before it. Layers are bounded in order, each
with the slopes that serve its own rows best; since the intervals before it are as tight as
they were found, nothing has to be optimised through them. The bound of each row is the best
of all steps and never worse than with the slopes that are chosen by rule.

Source: Xu et al. 2021, arXiv 2011.13824.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.propagate import Linearised, Propagation
from patchclamp.rules.base import Nonlinear
from patchclamp.rules.value import Value

Start = tuple[dict[Value, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SlopeSearch:
    """Gradient ascent on slopes.

    Attributes:
        num_steps: steps of Adam.
        rate: of its first step; slopes lie in [0, 1].
        decay: of the rate, at each step.
        enough: rows whose bound exceeds this need no further step.
    """

    num_steps: int = 20
    rate: float = 0.25
    decay: float = 0.95
    enough: float = float("inf")

    def improve(
        self, bounds: Propagation, start: Start, best: Tensor, starting: dict[Value, Tensor]
    ) -> tuple[Tensor, dict[Value, Tensor]]:
        """Lower bounds of rows, with the best slopes found.

        Args:
            bounds: whose intervals are used.
            start: rows on values, and their constants.
            best: their bounds by default slopes, (N, R).
            starting: slopes to start from, for some values; changed in place.

        Returns:
            The bounds (N, R), at least `best`, and the last slopes.
        """
        slopes = {
            v: self._first(bounds, v, best.shape[1]) if v not in starting else starting[v]
            for v in free_values(bounds, max(v.number for v in start[0]))
        }
        if not slopes:
            return best, slopes
        for s in slopes.values():
            s.requires_grad_()
        adam = torch.optim.Adam(list(slopes.values()), lr=self.rate, betas=(0.9, 0.99))
        for step in range(self.num_steps):
            with torch.enable_grad():
                found = bounds.linearise(*start, slopes).bound
                gradients = torch.autograd.grad(-found.sum(), list(slopes.values()))
            best = torch.maximum(best, found.detach())
            if step + 1 == self.num_steps or bool((best > self.enough).all()):
                break
            for s, gradient in zip(slopes.values(), gradients, strict=True):
                s.grad = gradient
            adam.step()
            with torch.no_grad():
                for s in slopes.values():
                    s.clamp_(0, 1)
            for group in adam.param_groups:
                group["lr"] *= self.decay
        return best, {v: s.detach() for v, s in slopes.items()}

    @staticmethod
    def _first(bounds: Propagation, value: Value, num_rows: int) -> Tensor:
        rule = value.rule
        if not isinstance(rule, Nonlinear):
            raise TypeError(f"{value} has no slopes")
        chosen = rule.initial(tuple(bounds.interval(a) for a in value.arguments))
        return chosen.expand(-1, -1, num_rows, *chosen.shape[3:]).clone()


def free_values(bounds: Propagation, last: int) -> list[Value]:
    """Nonlinear values up to a number that have slopes, and something undecided in them."""
    return [
        v
        for v in bounds.network.values[: last + 1]
        if isinstance(v.rule, Nonlinear) and v.rule.num_slopes > 0 and bounds.is_open(v)
    ]


def optimised(bounds: Propagation, search: SlopeSearch) -> Callable[[Start, Linearised], Tensor]:
    """A function that improves the bounds of some rows."""

    def improve(start: Start, found: Linearised) -> Tensor:
        return search.improve(bounds, start, found.bound, {})[0]

    return improve

"""Slopes chosen by gradient ascent instead of by rule (alpha-CROWN).

Every row has slopes of its own, in every layer before it. Layers are bounded in order, each
with the slopes that serve its own rows best; since the intervals before it are as tight as
they were found, nothing has to be optimised through them. The bound of each row is the best
of all steps and never worse than with the slopes that are chosen by rule.

Source: Xu et al. 2021, arXiv 2011.13824.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.propagate import Propagation, Slopes, Start
from patchclamp.rules.base import Nonlinear
from patchclamp.rules.value import Value


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
        self, bounds: Propagation, start: Start, best: Tensor, first: Slopes | None = None
    ) -> tuple[Tensor, dict[Value, Tensor]]:
        """Lower bounds of rows, with the slopes that they were found with.

        Args:
            bounds: whose intervals are used.
            start: rows on values, and their constants.
            best: lower bounds that are known, such as those by the first slopes, (N, R).
            first: slopes to start from, for some values; the default ones for the others.

        Returns:
            The bounds (N, R), at least `best`, and for each row its best slopes.
        """
        slopes = self.first(bounds, start, best, first)
        if not slopes:
            return best, slopes
        kept = {v: s.clone() for v, s in slopes.items()}
        moving = [s.requires_grad_() for s in slopes.values()]
        adam = torch.optim.Adam(moving, lr=self.rate, betas=(0.9, 0.99))
        for step in range(self.num_steps + 1):
            with torch.enable_grad():
                found = bounds.linearise(*start, slopes).bound
                loss = -found.sum()
            better = found.detach() > best
            best = torch.maximum(best, found.detach())
            _keep(kept, slopes, better)
            if step == self.num_steps or bool((best > self.enough).all()):
                break
            self._step(adam, moving, loss)
        return best, kept

    def _step(self, adam: torch.optim.Adam, moving: list[Tensor], loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        for s, gradient in zip(moving, gradients, strict=True):
            s.grad = gradient
        adam.step()
        with torch.no_grad():
            for s in moving:
                s.clamp_(0, 1)
        for group in adam.param_groups:
            group["lr"] *= self.decay

    @classmethod
    def first(
        cls, bounds: Propagation, start: Start, best: Tensor, first: Slopes | None
    ) -> dict[Value, Tensor]:
        """Slopes of every value behind the rows that has any to choose: (num, N, R, *shape)."""
        given = {} if first is None else first
        return {
            v: given[v].clone() if v in given else cls._first(bounds, v, best.shape)
            for v in free_values(bounds, list(start[0]))
        }

    @staticmethod
    def _first(bounds: Propagation, value: Value, shape: torch.Size) -> Tensor:
        rule = value.rule
        if not isinstance(rule, Nonlinear):
            raise TypeError(f"{value} has no slopes")
        chosen = rule.initial(tuple(bounds.interval(a) for a in value.arguments))
        return chosen.expand(-1, shape[0], shape[1], *chosen.shape[3:]).clone()


def _keep(kept: dict[Value, Tensor], slopes: dict[Value, Tensor], better: Tensor) -> None:
    for v, s in slopes.items():
        where = better.reshape(1, *better.shape, *(1,) * (s.ndim - 3))
        kept[v] = torch.where(where, s.detach(), kept[v])


def free_values(bounds: Propagation, ends: list[Value]) -> list[Value]:
    """Nonlinear values that `ends` depend on, with slopes to choose and something undecided."""
    seen: set[Value] = set()
    stack = list(ends)
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            stack += value.arguments
    return [
        v
        for v in bounds.network.values
        if v in seen
        and isinstance(v.rule, Nonlinear)
        and v.rule.num_slopes > 0
        and bounds.is_open(v)
    ]


@dataclass(eq=False)
class Optimised:
    """Improves every layer of a propagation, and keeps the slopes where asked to.

    Attributes:
        bounds: what is improved; set its `improve` to this.
        search: how.
        kept: (value, sign) -> element -> {nonlinear value: slopes of that row}.
    """

    bounds: Propagation
    search: SlopeSearch
    kept: dict[tuple[Value, float], list[tuple[Tensor, dict[Value, Tensor]]]] | None = None

    def __call__(self, value: Value, index: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the elements of a value: rows and their negatives are optimised together."""
        rows, constant = self.bounds.start(value, index, 1.0)
        start = {v: torch.cat([A, -A], 1) for v, A in rows.items()}
        sides = [side.flatten(1).index_select(1, index) for side in self.bounds.interval(value)]
        known = torch.cat([sides[0], -sides[1]], 1)
        best, slopes = self.search.improve(
            self.bounds, (start, torch.cat([constant, -constant], 1)), known
        )
        if self.kept is not None:
            for sign, rows_of in zip(
                (1.0, -1.0), (slice(len(index)), slice(len(index), None)), strict=True
            ):
                chosen = {v: s[:, :, rows_of] for v, s in slopes.items()}
                self.kept.setdefault((value, sign), []).append((index, chosen))
        lower, upper = best.chunk(2, 1)
        return lower, -upper

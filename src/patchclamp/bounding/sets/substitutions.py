"""Words exchanged for others: at a few positions, a vector from a finite list of its own.

A . x is a sum over positions, so the smallest value is that of the unchanged text less the
largest gains of as many positions as may change: exact.

Source: Xu et al. 2020, arXiv 2002.12920, section 3.2 (there by dynamic programming).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.sets.base import PerturbedSet, allowance, require_finite
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval


@dataclass(frozen=True, eq=False)
class Substitutions(PerturbedSet):
    """At most `num` positions take one of their candidates instead of their own vector.

    The hull is the smallest box.

    Attributes:
        base: the text as it is, (N, position, unit).
        candidates: (N, position, candidate, unit).
        allowed: which candidates there are, (N, position, candidate); None for all.
        num: how many positions may change at once.
    """

    base: Tensor
    candidates: Tensor
    allowed: Tensor | None = None
    num: int = 1

    def __post_init__(self) -> None:
        require_finite("substitutions", vectors=self.base, candidates=self.candidates)
        shape, given = self.base.shape, self.candidates.shape
        wrong = len(shape) != 3 or len(given) != 4 or (given[:2], given[3]) != (shape[:2], shape[2])
        if wrong or (self.allowed is not None and self.allowed.shape != given[:3]):
            raise BoundError(
                "substitutions of different shapes",
                got=f"vectors {tuple(shape)}, candidates {tuple(given)}",
                expected="(N, position, unit) and (N, position, candidate, unit)",
            )
        if self.num < 0:
            raise BoundError("a negative number of substitutions", got=str(self.num))

    @property
    def _choices(self) -> Tensor:
        """Candidates, with the text's own vector where there is none."""
        if self.allowed is None:
            return self.candidates
        return torch.where(self.allowed[..., None], self.candidates, self.base[:, :, None])

    def hull(self) -> Interval:
        if self.num == 0:
            return Interval(self.base, self.base)
        every = torch.cat([self.base[:, :, None], self._choices], 2)
        return Interval(every.amin(2), every.amax(2))

    def minimum(self, A: Tensor) -> Tensor:
        own = torch.einsum("...rpd,...pd->...rp", A, self.base)
        other = torch.einsum("...rpd,...pkd->...rpk", A, self._choices).amin(-1)
        gain = (own - other).clamp(min=0)
        num = min(self.num, gain.shape[2])
        far = torch.maximum(*(side.abs() for side in self.hull()))
        size = 3 * torch.einsum("...rpd,...pd->...r", A.detach().abs(), far)
        best = gain.topk(num, dim=2).values.sum(2)
        return own.sum(2) - best - allowance(size, A[0, 0].numel())

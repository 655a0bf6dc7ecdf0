"""A few patches of a given size may change to anything within a box (L0).

The gain of an element is what it can lower A . x by. The gains of k patches are at most the
sum of the k largest patch sums, which is exact for one patch and for patches that do not
overlap, such as single pixels or a grid; overlapping ones count shared elements twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.sets.base import PerturbedSet, allowance, require_finite, require_order
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval


@dataclass(frozen=True, eq=False)
class Patches(PerturbedSet):
    """At most `num` patches of the last axes differ from the centre.

    The hull is the box, which is the smallest one where patches can lie everywhere.

    Attributes:
        centre: (N, *shape).
        lower, upper: what changed elements stay within, (N, *shape); it holds the centre.
        size: of a patch along each of the last axes; it covers all of the axes before them.
        num: how many patches may change at once.
        stride: where patches may begin along each axis: at every multiple of it.
    """

    centre: Tensor
    lower: Tensor
    upper: Tensor
    size: tuple[int, ...] = (1, 1)
    num: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        require_finite("a set of patches", centre=self.centre)
        require_order("the box of patches", self.lower, self.upper)
        if not bool(((self.centre >= self.lower) & (self.centre <= self.upper)).all()):
            raise BoundError("the centre of patches must lie within their box")
        space = self.centre.shape[1:][-len(self.size) :]
        fits = len(self.size) < self.centre.ndim and all(
            0 < k <= n for k, n in zip(self.size, space, strict=True)
        )
        if not fits or self.num < 0 or self.stride < 1:
            raise BoundError(
                "patches that do not fit",
                got=f"{self.num} of size {self.size} at stride {self.stride}",
                expected=f"a size within {tuple(self.centre.shape[1:])}",
            )

    def hull(self) -> Interval:
        if self.num == 0:
            return Interval(self.centre, self.centre)
        return Interval(self.lower, self.upper)

    def minimum(self, A: Tensor) -> Tensor:
        centre, lower, upper = (t[:, None] for t in (self.centre, self.lower, self.upper))
        at_centre = (A * centre).flatten(2).sum(2)
        gain = torch.maximum(A * (centre - lower), A * (centre - upper))
        sums = self._windows(gain)
        num = min(self.num, sums.shape[2])
        most = sums.topk(num, dim=2).values.sum(2)
        every = gain.flatten(2).sum(2)
        size = (A.detach() * centre).abs().flatten(2).sum(2) + every.detach()
        return at_centre - torch.minimum(most, every) - allowance(size, A[0, 0].numel() + num)

    def _windows(self, gain: Tensor) -> Tensor:
        """The sum of each patch: (N, R, num patches)."""
        num = len(self.size)
        gain = gain.reshape(*gain.shape[:2], -1, *gain.shape[gain.ndim - num :]).sum(2)
        for axis, k in enumerate(self.size):
            gain = gain.unfold(2 + axis, k, self.stride).sum(-1)
        return gain.reshape(*gain.shape[:2], math.prod(gain.shape[2:]))

"""Segments of an example kept or replaced, and the score of each such coalition.

What the methods share that fit a simple function to "which segments are there": LIME and
KernelSHAP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.progress import Progress
from patchclamp.methods.attribution.base import Attribution
from patchclamp.methods.scoring import Scorer

_TOGETHER = 256
"""Coalitions scored before the next report of progress."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentAttribution(Attribution):
    """Maps that are constant within segments.

    Attributes:
        segments: number of the segment that each element belongs to, (num, *site).
        effects: of each example, one number a segment, in units of the target; `values` share
            it equally among the segment's elements.
    """

    segments: Tensor
    effects: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Game:
    """One example: coalitions of its segments have scores.

    Shapes: segments, value and base as the site, without the batch.
    """

    scorer: Scorer
    row: int
    segments: Tensor
    base: Tensor

    @property
    def num(self) -> int:
        """How many segments."""
        return int(self.segments.max()) + 1

    def scores(self, kept: Tensor, progress: Progress) -> Tensor:
        """Scores of coalitions (n, segment), true where a segment is kept: (n,) in float64.

        Equal coalitions run once.
        """
        unique, back = torch.unique(kept, dim=0, return_inverse=True)
        value = self.scorer.value[self.row]
        found = []
        for part in unique.split(_TOGETHER):

            def made(at: slice, part: Tensor = part) -> Tensor:
                return torch.where(part[at][:, self.segments], value, self.base)

            rows = torch.full((len(part),), self.row)
            found.append(self.scorer.scores(made, rows).double())
            progress.advance(len(part))
        return torch.cat(found)[back]

    def shared(self, effects: Tensor) -> Tensor:
        """Each segment's effect shared equally among its elements: (*site)."""
        sizes = torch.bincount(self.segments.reshape(-1), minlength=self.num)
        return (effects / sizes)[self.segments].to(self.scorer.value.dtype)

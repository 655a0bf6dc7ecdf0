"""ReLU: exact where the sign is known; a triangle where it is not.

Source: Zhang et al. 2018 (the slope of least area); Xu et al. 2021, arXiv 2011.13824
(any lower slope in [0, 1] is sound and may be optimised).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.rules.base import Interval, Lines, Nonlinear, Shape


@dataclass(frozen=True, eq=False)
class ReLU(Nonlinear):
    """max(x, 0). One slope: of the line below, where the sign is open."""

    shape: Shape
    num_slopes = 1

    @property
    def inputs(self) -> tuple[Shape, ...]:  # type: ignore[override]  # computed, not stored
        return (self.shape,)

    @property
    def output(self) -> Shape:  # type: ignore[override]  # computed, not stored
        return self.shape

    def forward(self, *values: Tensor) -> Tensor:
        return values[0].clamp(min=0)

    def interval(self, *boxes: Interval) -> Interval:
        return Interval(boxes[0].lower.clamp(min=0), boxes[0].upper.clamp(min=0))

    def initial(self, boxes: tuple[Interval, ...]) -> Tensor:
        """1 where the triangle is then the smaller one, else 0."""
        lower, upper = boxes[0]
        return (upper > -lower).to(lower.dtype)[None, :, None]

    def open(self, box: Interval) -> Tensor:
        """Where the sign is not known: bool (N, *shape)."""
        return (box.lower < 0) & (box.upper > 0)

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        lower, upper = (side[:, None] for side in boxes[0])
        eps = torch.finfo(lower.dtype).eps
        down, up = lower.clamp(max=0), upper.clamp(min=0)
        # the chord of the triangle; 1 and 0 where the sign is known. Rounded up in slope it
        # stays above ReLU at the right end, and its intercept is rounded up with it.
        chord = up / (up - down).clamp(min=torch.finfo(lower.dtype).tiny)
        lift = chord * down * -(1 + 4 * eps)
        exact = down == 0
        chord = torch.where(exact, (up > 0).to(up.dtype), chord * (1 + 2 * eps))
        below = (upper > -lower).to(lower.dtype)
        if slopes is not None:
            below = torch.where(exact | (up == 0), below, slopes[0])
        return Lines(below, None, chord, lift)

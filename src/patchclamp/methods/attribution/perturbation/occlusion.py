"""Occlusion: a window slides over the value, and the score without what is under it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.perturbation.parts import (
    Fill,
    axes_along,
    replacement,
    sizes_along,
)
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net

_TOGETHER = 256
"""Windows scored before the next report of progress; how many rows run together is less."""

Box = tuple[slice, ...]
"""One slice for every axis of a value, without the batch."""


@dataclass(frozen=True, kw_only=True)
class Occlusion(Explainer):
    """By how much the score falls when a window of the value is replaced.

    Shapes: inputs (num, *feature); values (num, *site); baseline a number, (*site),
        (num, *site), or a `Fill`.
    Units: of the target. Summed over the axes that windows do not slide along, a value is the
        fall of the score, positive where the window supports the target, averaged over the
        windows that hold the place.
    Randomness: none.
    Cost: one forward pass for each window of each example.
    Raises: OptionError for a window or stride that does not fit the site; InputError for a
        baseline of another shape or equal to an example.
    Fails when: two windows say the same (each alone may be taken without loss), or the
        baseline itself says something; a window larger than the thing blurs it.
    Source: Zeiler & Fergus 2013, arXiv 1311.2901, section 4.2.

    Attributes:
        window: size along each axis that windows slide along (one number for all of them);
            by default a seventh of an image's sides, and 1 along all other kinds of axes.
        stride: likewise; by default half the window. The last window is moved back to the
            edge, so that every place is under one.
        along: names of the axes that windows slide along; by default rows and columns, or
            positions, or each unit where the site has neither. ("channel",) takes away
            whole channels, ("head",) heads.
        baseline: what is put there.
    """

    name: ClassVar[str] = "occlusion"
    source: ClassVar[str] = "Zeiler & Fergus 2013, arXiv 1311.2901"

    window: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None
    along: tuple[str, ...] | None = None
    baseline: Tensor | float | Fill = 0.0

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """See `Explainer.run`."""
        scorer = Scorer.of(net, inputs, target, at=at)
        base = replacement(scorer, self.baseline)
        boxes = self._boxes(scorer)
        falls = scorer.plain.double()[:, None] - _occluded(scorer, base, boxes, progress)
        return Attribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=self._spread(scorer, boxes, falls).to(scorer.value.dtype),
            scores=scorer.plain,
            passes=scorer.passes,
        )

    def _boxes(self, scorer: Scorer) -> list[Box]:
        dims = axes_along(scorer.axes, self.along)
        sizes = sizes_along(scorer, dims, self.window, "window")
        halves = [max(1, size // 2) for size in sizes]
        strides = halves
        if self.stride is not None:
            strides = sizes_along(scorer, dims, self.stride, "stride")
        if any(step > size for step, size in zip(strides, sizes, strict=True)):
            raise OptionError(
                "the stride is longer than the window, which leaves gaps",
                got=f"window {sizes}, stride {strides}",
            )
        slices: list[list[slice]] = [[slice(None)] for _ in scorer.value.shape[1:]]
        for dim, size, step in zip(dims, sizes, strides, strict=True):
            last = scorer.value.shape[dim] - size
            starts = sorted({*range(0, last + 1, step), last})
            slices[dim - 1] = [slice(start, start + size) for start in starts]
        return list(itertools.product(*slices))

    def _spread(self, scorer: Scorer, boxes: Sequence[Box], falls: Tensor) -> Tensor:
        """Falls (num, window) averaged over the windows at each place: (num, *site)."""
        dims = axes_along(scorer.axes, self.along)
        thin = [n if d in dims else 1 for d, n in enumerate(scorer.value.shape)][1:]
        total = falls.new_zeros((scorer.num, *thin))
        count = falls.new_zeros(thin)
        for box, fall in zip(boxes, falls.T, strict=True):
            for part, one in zip(total, fall, strict=True):
                part[box] += one
            count[box] += 1
        through = scorer.value[0].numel() // count.numel()
        return (total / count / through).expand(scorer.value.shape).clone()


def _occluded(scorer: Scorer, base: Tensor, boxes: Sequence[Box], progress: Progress) -> Tensor:
    """Scores with each window of each example replaced: (num, window), in float64."""
    num = len(boxes)
    rows = torch.arange(scorer.num).repeat_interleave(num)
    found = []
    progress.start(Occlusion.name, len(rows), "windows")
    for first in range(0, len(rows), _TOGETHER):
        part = rows[first : first + _TOGETHER]

        def made(at: slice, first: int = first, part: Tensor = part) -> Tensor:
            copies = scorer.value[part[at]]
            for i, k in enumerate(range(first + at.start, first + at.stop)):
                row, box = divmod(k, num)
                copies[i][boxes[box]] = base[row][boxes[box]]
            return copies

        found.append(scorer.scores(made, part).double())
        progress.advance(len(part))
    progress.finish()
    return torch.cat(found).reshape(scorer.num, num)

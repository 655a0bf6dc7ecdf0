"""LIME: a linear function of which segments are there, fitted around the example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Explainer
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.perturbation.coalitions import Game, SegmentAttribution
from patchclamp.methods.attribution.perturbation.parts import Fill, replacement, segments_of
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class LimeAttribution(SegmentAttribution):
    """Maps of LIME.

    Attributes:
        fit: weighted R^2 of the linear function on the samples that it was fitted to, (num,):
            how much of the score's variation around the example it describes. The map says
            nothing where this is low. 1 where the score does not vary at all.
        intercept: the linear function's value with every segment replaced, (num,).
    """

    fit: Tensor
    intercept: Tensor


@dataclass(frozen=True, kw_only=True)
class Lime(Explainer):
    """Coefficients of a weighted ridge regression of the score on which segments are kept.

    A sample keeps each segment with probability 1/2 and replaces the others by the baseline;
    it weighs exp(-d^2 / width^2), with d the cosine distance 1 - sqrt(share kept) to the
    example, the first sample.

    Shapes: inputs (num, *feature); values (num, *site); effects (segment) of each example.
    Units: of the target; a segment's effect is shared equally among its elements.
    Randomness: the samples, by `seed` and the example itself: the same at any number of rows
        per pass, in any order, in any batch.
    Cost: at most `num_samples` forward passes an example (equal samples run once).
    Raises: OptionError for fewer samples than twice the segments, and for segments that do
        not fit the site; InputError for a baseline of another shape or equal to an example.
    Fails when: segments work together (`fit` is low then), or replaced segments are unlike
        anything the network was trained on. Unlike the original for tables, columns are
        replaced by the baseline, not by draws from the training data.
    Source: Ribeiro et al. 2016, arXiv 1602.04938, section 3.

    Attributes:
        segments: integers (*site), (num, *site), or along the segments' axes only, as
            (row, column); without them tiles of `patch`.
        patch: sizes of the tiles; by default a seventh of an image's sides, and 1 along all
            other kinds of axes: each token, column, unit, head.
        along: the axes that segments lie along; as for `Occlusion`.
        baseline: what is put there.
        width: of the kernel; a wide one weighs all samples alike.
        ridge: penalty on squared coefficients, against the mean weighted squared error.
    """

    name: ClassVar[str] = "lime"
    source: ClassVar[str] = "Ribeiro et al. 2016, arXiv 1602.04938"

    segments: Tensor | None = None
    patch: int | tuple[int, ...] | None = None
    along: tuple[str, ...] | None = None
    baseline: Tensor | float | Fill = 0.0
    num_samples: int = 1000
    width: float = 0.25
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.width > 0 or not self.ridge > 0:
            raise OptionError(
                "width and ridge must be more than 0", got=f"{self.width}, {self.ridge}"
            )

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> LimeAttribution:
        """See `Explainer.run`."""
        scorer = Scorer.of(net, inputs, target, at=at)
        base = replacement(scorer, self.baseline)
        segments = segments_of(scorer, self.segments, self.patch, self.along)
        games = [Game(scorer, row, segments[row], base[row]) for row in range(scorer.num)]
        self._check(max(game.num for game in games))
        progress.start(self.name, scorer.num * self.num_samples, "samples")
        fits = [
            self._fitted(game, key, progress) for game, key in zip(games, keys(scorer), strict=True)
        ]
        progress.finish()
        values = [game.shared(fit.effects) for game, fit in zip(games, fits, strict=True)]
        return LimeAttribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=torch.stack(values),
            scores=scorer.plain,
            passes=scorer.passes,
            segments=segments,
            effects=tuple(fit.effects for fit in fits),
            fit=torch.stack([fit.explained for fit in fits]),
            intercept=torch.stack([fit.intercept for fit in fits]),
        )

    def _check(self, num: int) -> None:
        if self.num_samples < 2 * num:
            raise OptionError(
                f"{num} segments are too many for {self.num_samples} samples",
                expected=f"num_samples of {2 * num} or more",
                hint="more num_samples, or larger segments",
            )

    def _fitted(self, game: Game, key: str, progress: Progress) -> _Fit:
        kept = torch.rand(self.num_samples, game.num, generator=generator(key, self.seed)) < 0.5
        kept[0] = True
        kept = kept.to(game.segments.device)
        scores = game.scores(kept, progress)
        distance = 1 - kept.double().mean(1).sqrt()
        # Taken against the nearest sample, so that a narrow kernel does not vanish everywhere.
        weights = torch.softmax(-((distance / self.width) ** 2), 0)
        return _ridge(kept.double(), scores, weights, self.ridge)


@dataclass(frozen=True, eq=False)
class _Fit:
    effects: Tensor
    intercept: Tensor
    explained: Tensor


def _ridge(x: Tensor, y: Tensor, weights: Tensor, penalty: float) -> _Fit:
    """Weighted ridge regression with a free intercept, by the normal equations.

    Shapes: x (n, segment), y and weights (n,); weights sum to 1.
    """
    middle, centre = weights @ x, weights @ y
    x, y = x - middle, y - centre
    gram = x.T @ (weights[:, None] * x)
    gram += penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    effects = torch.linalg.solve(gram, x.T @ (weights * y))
    total, left = weights @ y**2, weights @ (y - x @ effects) ** 2
    explained = torch.where(total == 0, torch.ones_like(total), 1 - left / total)
    return _Fit(effects, centre - middle @ effects, explained)

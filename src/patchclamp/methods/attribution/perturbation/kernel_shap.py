"""KernelSHAP: Shapley values of segments, by a weighted regression on sampled coalitions.

The Shapley values are the solution of a least-squares problem over all coalitions, weighted by
the Shapley kernel, with the values held to add up to the whole change of the score (Lundberg &
Lee 2017, theorem 2). Coalitions are drawn by that kernel, each with its complement (Covert &
Lee 2021), so that every sample counts the same; few segments are enumerated instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Explainer, completeness_error
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.perturbation.coalitions import Game, SegmentAttribution
from patchclamp.methods.attribution.perturbation.parts import Fill, replacement, segments_of
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net

_MOST_BITS = 20
"""More segments than this are never enumerated."""

_PER_SEGMENT = 4
"""Samples a segment that are asked for at least, so that the regression has an error to show."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapleyAttribution(SegmentAttribution):
    """Maps of Shapley values.

    Attributes:
        standard_errors: of the effects, of each example, (segment,); 0 where all coalitions
            were run.
    """

    standard_errors: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class KernelShap(Explainer):
    """Shapley values of segments: each one's mean contribution over all orders of arrival.

    Shapes: inputs (num, *feature); values (num, *site); effects and standard errors
        (segment) of each example.
    Units: of the target; values sum to score - baseline score (up to rounding, whatever was
        sampled). A segment's effect is shared equally among its elements.
    Randomness: the coalitions, by `seed` and the example itself: the same at any number of
        rows per pass, in any order, in any batch. None where 2^segments <= `num_samples`:
        then all coalitions are run and the values are exact.
    Cost: at most `num_samples` + 2 forward passes an example (equal coalitions run once).
    Raises: OptionError for fewer samples than four times the segments where they are
        sampled; as `Lime`.
    Fails when: replaced segments are unlike anything the network was trained on. Standard
        errors are those of many samples (to first order, over pairs of coalitions), and too
        small where there are few a segment.
    Source: Lundberg & Lee 2017, arXiv 1705.07874; Covert & Lee 2021, arXiv 2012.01536.

    Attributes:
        segments, patch, along, baseline: as for `Lime`.
        num_samples: coalitions of each example.
    """

    name: ClassVar[str] = "kernel_shap"
    source: ClassVar[str] = "Lundberg & Lee 2017, arXiv 1705.07874"

    segments: Tensor | None = None
    patch: int | tuple[int, ...] | None = None
    along: tuple[str, ...] | None = None
    baseline: Tensor | float | Fill = 0.0
    num_samples: int = 1024
    seed: int = 0

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> ShapleyAttribution:
        """See `Explainer.run`."""
        scorer = Scorer.of(net, inputs, target, at=at)
        base = replacement(scorer, self.baseline)
        segments = segments_of(scorer, self.segments, self.patch, self.along)
        games = [Game(scorer, row, segments[row], base[row]) for row in range(scorer.num)]
        self._check(max(game.num for game in games))
        progress.start(self.name, scorer.num * self.num_samples, "coalitions")
        found = [
            _enumerated(game, progress)
            if self._is_exact(game.num)
            else _sampled(game, self.num_samples, generator(key, self.seed), progress)
            for game, key in zip(games, keys(scorer), strict=True)
        ]
        progress.finish()
        values = torch.stack(
            [game.shared(one.effects) for game, one in zip(games, found, strict=True)]
        )
        baseline_scores = torch.stack([one.empty for one in found]).to(scorer.plain)
        return ShapleyAttribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=values,
            scores=scorer.plain,
            baseline_scores=baseline_scores,
            error=completeness_error(values, scorer.plain, baseline_scores),
            passes=scorer.passes,
            segments=segments,
            effects=tuple(one.effects for one in found),
            standard_errors=tuple(one.errors for one in found),
        )

    def _is_exact(self, num: int) -> bool:
        return num <= _MOST_BITS and 2**num <= self.num_samples

    def _check(self, num: int) -> None:
        if not self._is_exact(num) and self.num_samples < _PER_SEGMENT * num:
            raise OptionError(
                f"{num} segments are too many for {self.num_samples} samples",
                expected=f"num_samples of {_PER_SEGMENT * num} or more",
                hint="more num_samples, or larger segments",
            )


@dataclass(frozen=True, eq=False)
class _Shapley:
    effects: Tensor
    errors: Tensor
    empty: Tensor
    """Score of the baseline."""


def _enumerated(game: Game, progress: Progress) -> _Shapley:
    """The definition: what each segment adds to every coalition without it."""
    num, device = game.num, game.segments.device
    numbers = torch.arange(2**num, device=device)
    kept = (numbers[:, None] >> torch.arange(num, device=device)) & 1 == 1
    scores = game.scores(kept, progress)
    weight = torch.tensor([1 / (num * comb(num - 1, k)) for k in range(num)], dtype=torch.float64)
    weight = weight.to(device)
    effects = []
    for i in range(num):
        without = numbers[~kept[:, i]]
        added = scores[without + (1 << i)] - scores[without]
        effects.append((weight[kept[without].sum(1)] * added).sum())
    made = torch.stack(effects)
    return _Shapley(made, torch.zeros_like(made), scores[0])


def _sampled(game: Game, most: int, source: torch.Generator, progress: Progress) -> _Shapley:
    """Least squares on pairs of coalitions drawn by the Shapley kernel."""
    num = game.num
    first = _drawn(num, most // 2, source).to(game.segments.device)
    ends = torch.zeros_like(first[:2])
    ends[1] = True
    scores = game.scores(torch.cat([ends, first, ~first]), progress)
    empty, change = scores[0], scores[1] - scores[0]
    x = torch.cat([first, ~first]).double()
    y = scores[2:] - empty
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise OptionError(
            f"{most} coalitions do not tell {num} segments apart", hint="more num_samples"
        )
    ones = torch.ones(num, 1, dtype=x.dtype, device=x.device)
    free = torch.cholesky_solve(moment[:, None], factor)
    pull = torch.cholesky_solve(ones, factor)
    effects = (free - pull * ((free.sum() - change) / pull.sum()))[:, 0]
    return _Shapley(effects, _errors(x, y - x @ effects, factor, pull), empty)


def _drawn(num: int, num_draws: int, source: torch.Generator) -> Tensor:
    """Coalitions by the Shapley kernel: (draw, segment), neither empty nor whole."""
    sizes = torch.tensor([1 / (k * (num - k)) for k in range(1, num)], dtype=torch.float64)
    size = 1 + torch.multinomial(sizes, num_draws, replacement=True, generator=source)
    order = torch.rand(num_draws, num, generator=source).argsort(1).argsort(1)
    return order < size[:, None]


def _errors(x: Tensor, left: Tensor, factor: Tensor, pull: Tensor) -> Tensor:
    """Standard errors of the constrained regression from its residuals, a pair as one draw."""
    pushes = x * left[:, None]
    pairs = (pushes[: len(x) // 2] + pushes[len(x) // 2 :]) / 2
    moved = torch.cholesky_solve(pairs.T, factor)
    moved = moved - pull * (moved.sum(0) / pull.sum())  # the sum of the effects cannot move
    num_pairs, num = len(pairs), x.shape[1]
    # The constraint takes one unknown; the others' fit makes residuals smaller than errors.
    spare = max(1, num_pairs - (num - 1))
    return (moved - moved.mean(1, keepdim=True)).square().sum(1).div(num_pairs * spare).sqrt()

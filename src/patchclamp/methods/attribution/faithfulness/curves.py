"""Measures that remove places in the order of a map, or put them back, and watch the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.draws import keys
from patchclamp.methods.attribution.faithfulness.maps import (
    Maps,
    measured_maps,
    removal_order,
    removals_for,
)
from patchclamp.methods.attribution.faithfulness.removal import Mean, NoisyLinear, Removal
from patchclamp.methods.attribution.faithfulness.results import Faithfulness
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class CurveMetric(ABC):
    """Base of the measures below.

    Attributes:
        num_steps: into which the places are cut, as equally as can be.
        removals: at least two; by default black, the mean and, where there is space, a blur.
        seed: of the control, of the order of equal places and of intervals.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    higher_is_better: ClassVar[bool]
    num_steps: int = 20
    removals: tuple[Removal, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise OptionError("num_steps must be at least 1", got=str(self.num_steps))

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        maps: Maps,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Faithfulness:
        """Measure maps, and beside them the first one moved to random places.

        Args:
            maps: of the value at `at`: one, or several by name; (num, *places), or with
                channels, which are added up with their signs. The highest goes first.
            at: "input", or a site; as for `Scorer`.

        Raises:
            InputError, SiteError, TargetError, OptionError: before anything is measured.
        """
        scorer = Scorer.of(net, inputs, target, at=at)
        given = measured_maps(scorer, maps, whole=False, seed=self.seed)
        removals = removals_for(scorer, self.removals)
        found = keys(scorer)
        ranks = [removal_order(m, found, self.seed) for m in given.maps.values()]
        num_places = ranks[0][0].numel()
        if self.num_steps > num_places:
            raise OptionError(
                "there are more steps than places",
                got=str(self.num_steps),
                expected=f"at most {num_places}",
            )
        points = torch.linspace(0, num_places, self.num_steps + 1).round().long()
        progress.start(self.name, len(ranks) * len(removals), "curves")
        curves = []
        for rank in ranks:
            for removal in removals:
                curves.append(self._curve(scorer, rank, points, removal))
                progress.advance()
        progress.finish()
        shape = (len(ranks), len(removals))
        values = torch.stack([self._value(curve) for curve in curves])
        return Faithfulness(
            metric=self.name,
            options=metric_options(self),
            higher_is_better=self.higher_is_better,
            maps=given.names,
            baselines=tuple(r.name for r in removals),
            values=values.unflatten(0, shape),
            curves=torch.stack(curves).unflatten(0, shape),
            fractions=points / num_places,
            scores=scorer.plain,
            seed=self.seed,
            passes=scorer.passes,
        )

    @abstractmethod
    def _curve(self, scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal) -> Tensor:
        """(example, point)."""

    @abstractmethod
    def _value(self, curve: Tensor) -> Tensor:
        """The measure of each example: (example, point) to (example,)."""


def removed(
    scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal, *, first: bool = True
) -> Tensor:
    """Scores with so many places removed, the first ones or the last: (example, point).

    Where nothing is removed, the score is that of the example and nothing is run.
    """
    some = points > 0
    rows = torch.arange(scorer.num).repeat_interleave(int(some.sum()))
    counts = points[some].repeat(scorer.num)
    if not first:
        rank = rank.flatten(1).shape[1] - 1 - rank

    def kept(at: slice) -> Tensor:
        few = counts[at].reshape(-1, *(1 for _ in rank.shape[1:]))
        return rank[rows[at]] >= few

    made = scorer.plain[:, None].repeat(1, len(points))
    if len(rows):
        made[:, some] = removal.scores(scorer, kept, rows).reshape(scorer.num, -1).to(made)
    return made


def area(curve: Tensor) -> Tensor:
    """Mean height of a curve on equal steps: (..., point) to (...)."""
    return torch.trapezoid(curve, dim=-1) / (curve.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class Deletion(CurveMetric):
    """Area under the score while places are removed, highest first: low for a faithful map.

    Shapes: maps (num, *places); values (map, baseline, example).
    Units: of the target; give a probability to compare examples.
    Randomness: seeded; the same at any number of rows per pass.
    Cost: num_steps forward passes for each map (the control too), removal and example.
    Raises: OptionError for more steps than places, or fewer than two removals.
    Fails when: what is put there is itself evidence; half an image is unlike any image.
    Source: Petsiuk et al. 2018, arXiv 1806.07421, section 3.3.
    """

    name: ClassVar[str] = "deletion"
    source: ClassVar[str] = "Petsiuk et al. 2018, arXiv 1806.07421"
    higher_is_better: ClassVar[bool] = False

    def _curve(self, scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal) -> Tensor:
        return removed(scorer, rank, points, removal)

    def _value(self, curve: Tensor) -> Tensor:
        return area(curve)


@dataclass(frozen=True, kw_only=True)
class Insertion(CurveMetric):
    """Area under the score while places are put back, highest first: high for a faithful map.

    Shapes, units, randomness, cost, raises, fails when: as `Deletion`.
    Source: Petsiuk et al. 2018, arXiv 1806.07421, section 3.3.
    """

    name: ClassVar[str] = "insertion"
    source: ClassVar[str] = "Petsiuk et al. 2018, arXiv 1806.07421"
    higher_is_better: ClassVar[bool] = True

    def _curve(self, scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal) -> Tensor:
        away = removed(scorer, rank, points[-1] - points.flip(0), removal, first=False)
        return away.flip(1)

    def _value(self, curve: Tensor) -> Tensor:
        return area(curve)


@dataclass(frozen=True, kw_only=True)
class PixelFlipping(CurveMetric):
    """Mean fall of the score over the steps while places are removed, highest first.

    The area over the perturbation curve (AOPC): high for a faithful map.

    Shapes, units, randomness, raises, fails when: as `Deletion`.
    Cost: num_steps forward passes for each map (the control too), removal and example.
    Source: Bach et al. 2015, section "Pixel flipping"; Samek et al. 2017, arXiv 1509.06321.
    """

    name: ClassVar[str] = "pixel_flipping"
    source: ClassVar[str] = "Samek et al. 2017, arXiv 1509.06321"
    higher_is_better: ClassVar[bool] = True

    def _curve(self, scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal) -> Tensor:
        return removed(scorer, rank, points, removal)

    def _value(self, curve: Tensor) -> Tensor:
        return curve[:, 0] - curve[:, 1:].mean(1)


@dataclass(frozen=True, kw_only=True)
class RemoveAndDebias(CurveMetric):
    """How much more the score falls when the highest places go than when the lowest go.

    Removed places are interpolated from what is left (see `NoisyLinear`), so that the mask
    itself says little. The curve is the score without the lowest places less the score without
    the highest; 0 on average for a map that says nothing. After ROAD, which measures accuracy
    instead of the score.

    Shapes, units, randomness, raises: as `Deletion`.
    Cost: twice that of `Deletion`, and a linear system for each removal.
    Fails when: so much is removed that nothing can be interpolated.
    Source: Rong et al. 2022, arXiv 2202.00449.
    """

    name: ClassVar[str] = "road"
    source: ClassVar[str] = "Rong et al. 2022, arXiv 2202.00449"
    higher_is_better: ClassVar[bool] = True
    num_steps: int = 10
    removals: tuple[Removal, ...] | None = (NoisyLinear(), Mean())

    def _curve(self, scorer: Scorer, rank: Tensor, points: Tensor, removal: Removal) -> Tensor:
        lowest = removed(scorer, rank, points[:-1], removal, first=False)
        highest = removed(scorer, rank, points[:-1], removal)
        made = lowest - highest  # nothing is left to choose once all is removed
        return torch.cat([made, torch.zeros_like(made[:, :1])], 1)

    def _value(self, curve: Tensor) -> Tensor:
        return area(curve)


def metric_options(metric: object) -> dict[str, Json]:
    """The fields of a measure, for records."""
    made: dict[str, Json] = {}
    for f in fields(metric):  # type: ignore[arg-type]  # all measures are dataclasses
        value = getattr(metric, f.name)
        if f.name == "removals":
            made[f.name] = None if value is None else [r.name for r in value]
        else:
            made[f.name] = list(value) if isinstance(value, tuple) else value
    return made

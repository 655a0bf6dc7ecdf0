"""Infidelity: whether a map predicts the change of the score when part of the input goes.

Source: Yeh et al. 2019, arXiv 1901.09392, definition 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.faithfulness.curves import metric_options
from patchclamp.methods.attribution.faithfulness.maps import (
    Maps,
    measured_maps,
    places_of,
    removals_for,
)
from patchclamp.methods.attribution.faithfulness.removal import Removal
from patchclamp.methods.attribution.faithfulness.results import Faithfulness
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class Infidelity:
    """Mean squared error of the predicted fall of the score when random parts are removed.

    Tiles of places are each removed with probability 1/2. A map of slopes predicts the sum of
    slope times change of the input; any other map, the sum of its values at what is removed.

    Attributes:
        num_samples: random removals of each example.
        patch: side of the tiles, in places; a seventh of the longest side of images by
            default, else 1.
        slopes: maps are in units of the target per unit of the input, as gradients are.
        scaled: each map may first be multiplied by the number that suits the example best.
        relative: divide by the mean squared fall, so that 1 is a map that predicts nothing.
        removals: at least two; as for `Deletion`.
        seed: of the removals, of the control and of intervals.

    Shapes: maps (num, *site) for slopes, else (num, *places) too; values (map, baseline,
        example).
    Units: of the target, squared; none where relative.
    Randomness: seeded; the same at any number of rows per pass.
    Cost: num_samples forward passes for each removal and example, whatever the number of maps.
    Raises: TargetError where the score of an example never changes and `relative` is on;
        OptionError for layer masking with slopes, or fewer than two removals.
    Fails when: the score is far from linear over a removal; then no map predicts it.
    Source: Yeh et al. 2019, arXiv 1901.09392.
    """

    name: ClassVar[str] = "infidelity"
    source: ClassVar[str] = "Yeh et al. 2019, arXiv 1901.09392"
    higher_is_better: ClassVar[bool] = False
    num_samples: int = 50
    patch: int | None = None
    slopes: bool = False
    scaled: bool = True
    relative: bool = True
    removals: tuple[Removal, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise OptionError("num_samples must be at least 2", got=str(self.num_samples))
        if self.patch is not None and self.patch < 1:
            raise OptionError("patch must be at least 1", got=str(self.patch))

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
        """See `CurveMetric.run`."""
        scorer = Scorer.of(net, inputs, target, at=at)
        given = measured_maps(scorer, maps, whole=self.slopes, seed=self.seed)
        removals = removals_for(scorer, self.removals)
        kept = self._kept(places_of(scorer), keys(scorer))
        flat = kept.flatten(0, 1)
        rows = torch.arange(scorer.num).repeat_interleave(self.num_samples)
        progress.start(self.name, len(removals), "removals")
        errors = []
        for removal in removals:
            scores = removal.scores(scorer, lambda part: flat[part], rows).double()
            falls = scorer.plain.double()[:, None] - scores.reshape(scorer.num, -1)
            predicted = self._predicted(scorer, kept, list(given.maps.values()), removal)
            errors.append([self._error(p, falls) for p in predicted])
            progress.advance()
        progress.finish()
        values = torch.stack([torch.stack(e) for e in errors], 1)
        return Faithfulness(
            metric=self.name,
            options=metric_options(self),
            higher_is_better=self.higher_is_better,
            maps=given.names,
            baselines=tuple(r.name for r in removals),
            values=values,
            scores=scorer.plain,
            seed=self.seed,
            passes=scorer.passes,
        )

    def _kept(self, places: tuple[int, ...], found: Sequence[str]) -> Tensor:
        """(example, sample, *places); at least one tile goes and one stays, where there are two."""
        side = self.patch
        if side is None:
            side = max(1, max(places) // 7) if len(places) > 1 else 1
        tiles = tuple(-(-n // side) for n in places)
        made = []
        for key in found:
            for sample in range(self.num_samples):
                source = generator(f"{key} removed", self.seed, sample)
                kept = torch.rand(tiles, generator=source) < 0.5
                if bool(kept.all()) or not bool(kept.any()):
                    pick = int(torch.randint(kept.numel(), (1,), generator=source))
                    kept.view(-1)[pick] = not bool(kept.view(-1)[pick])
                for axis, n in enumerate(places):
                    kept = kept.repeat_interleave(side, axis).narrow(axis, 0, n)
                made.append(kept)
        stacked = torch.stack(made)
        return stacked.reshape(len(found), self.num_samples, *places)

    def _predicted(
        self, scorer: Scorer, kept: Tensor, maps: Sequence[Tensor], removal: Removal
    ) -> list[Tensor]:
        """The fall of the score that each map predicts: (example, sample) each."""
        if not self.slopes:
            gone = (~kept).flatten(2).double()
            return [torch.einsum("nsp,np->ns", gone, m.flatten(1).double()) for m in maps]
        fill = removal.fill(scorer)
        made: list[list[Tensor]] = [[] for _ in maps]
        for row in range(scorer.num):
            rows = torch.full((self.num_samples,), row)
            change = (scorer.value[rows] - fill(rows, kept[row])).flatten(1).double()
            for found, m in zip(made, maps, strict=True):
                found.append(change @ m[row].flatten().double())
        return [torch.stack(found) for found in made]

    def _error(self, predicted: Tensor, falls: Tensor) -> Tensor:
        if self.scaled:
            power = (predicted**2).sum(1, keepdim=True)
            best = (predicted * falls).sum(1, keepdim=True) / power.where(power > 0, power + 1)
            predicted = best * predicted
        error: Tensor = ((predicted - falls) ** 2).mean(1)
        if not self.relative:
            return error
        scale = (falls**2).mean(1)
        if bool((scale == 0).any()):
            raise TargetError(
                f"the score of example {int((scale == 0).nonzero()[0])} stays the same whatever "
                "is removed: there is no fall to predict",
                hint="relative=False, another removal, or drop the row",
            )
        return error / scale

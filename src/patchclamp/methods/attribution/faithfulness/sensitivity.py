"""Max-sensitivity: how much a map moves when the input hardly does.

Source: Yeh et al. 2019, arXiv 1901.09392, definition 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.faithfulness.curves import metric_options
from patchclamp.methods.attribution.faithfulness.results import Faithfulness
from patchclamp.methods.scoring import INPUT, Passes, Scorer
from patchclamp.model.inputs import Call
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class MaxSensitivity:
    """Largest relative change of a map over random moves of the input within a radius.

    A low value is no merit by itself: a map that ignores the input has 0. There is nothing to
    remove, so radii take the place of baselines, and disagreement is between these.

    Attributes:
        radii: at least two; each element moves by at most this share of its example's range.
        num_samples: moves of each example, drawn evenly.
        seed: of the moves and of intervals.

    Shapes: values (map, radius, example).
    Units: none: ||map(x + d) - map(x)|| / ||map(x)||.
    Randomness: seeded; the same at any number of rows per pass. The same moves for all methods
        and, up to their size, for all radii.
    Cost: num_samples * num_radii + 1 maps of each method.
    Raises: InputError where a map of an example is 0 everywhere.
    Fails when: few samples miss the worst move: the value is a lower bound.
    Source: Yeh et al. 2019, arXiv 1901.09392.
    """

    name: ClassVar[str] = "max_sensitivity"
    source: ClassVar[str] = "Yeh et al. 2019, arXiv 1901.09392"
    higher_is_better: ClassVar[bool] = False
    radii: tuple[float, ...] = (0.02, 0.05)
    num_samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise OptionError("num_samples must be at least 1", got=str(self.num_samples))
        if len(set(self.radii)) < 2 or min(self.radii) <= 0:
            raise OptionError("give at least two radii above 0", got=str(self.radii))

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        methods: Explainer | Mapping[str, Explainer],
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Faithfulness:
        """Measure methods (not maps: they run again on every move).

        Args:
            at: where the maps are; the input is what moves.
        """
        given = dict(methods) if isinstance(methods, Mapping) else {methods.name: methods}
        if not given:
            raise InputError("give at least one method to measure")
        scorer = Scorer.of(net, inputs, target, at=INPUT)
        passes = Passes()
        progress.start(self.name, len(given) * len(self.radii) * self.num_samples, "maps")
        values = torch.stack(
            [self._worst(scorer, m, target, at, passes, progress) for m in given.values()]
        )
        progress.finish()
        return Faithfulness(
            metric=self.name,
            options=metric_options(self),
            higher_is_better=self.higher_is_better,
            maps=tuple(given),
            baselines=tuple(f"radius {r:g}" for r in self.radii),
            values=values,
            scores=scorer.plain,
            seed=self.seed,
            passes=passes,
        )

    def _worst(
        self,
        scorer: Scorer,
        method: Explainer,
        target: Metric | Target,
        at: str | None,
        passes: Passes,
        progress: Progress,
    ) -> Tensor:
        """Of one method: (radius, example)."""

        def mapped(inputs: object) -> Tensor:
            made: Attribution = method.run(scorer.net, inputs, target, at=at)
            passes.forwards += made.passes.forwards
            passes.backwards += made.passes.backwards
            return made.values.detach().flatten(1).double()

        plain, found, x = mapped(scorer.call), keys(scorer), scorer.value
        size = plain.norm(dim=1)
        if bool((size == 0).any()):
            raise InputError(
                f"the map of '{method.name}' is 0 on example {int((size == 0).nonzero()[0])}: "
                "it has no relative change",
                hint="drop the row, or relu=False for a class activation map",
            )
        flat = x.flatten(1)
        spread = (flat.amax(1) - flat.amin(1)).reshape(-1, *(1 for _ in x.shape[1:]))
        worst = torch.zeros(len(self.radii), scorer.num, dtype=torch.float64)
        for sample in range(self.num_samples):
            drawn = [
                torch.rand(x.shape[1:], generator=generator(f"{key} moved", self.seed, sample))
                for key in found
            ]
            move = (torch.stack(drawn).to(x) * 2 - 1) * spread
            for i, radius in enumerate(self.radii):
                moved = mapped(_with(scorer.call, x + radius * move))
                change = (moved - plain).norm(dim=1) / size
                worst[i] = torch.maximum(worst[i], change)
                progress.advance()
        return worst


def _with(call: Call, x: Tensor) -> Call:
    """The call with its first tensor of real numbers replaced."""
    tensors = call.tensors()
    number = next(i for i, old in enumerate(tensors) if old.is_floating_point())
    tensors[number] = x
    return call.mapped(tensors)

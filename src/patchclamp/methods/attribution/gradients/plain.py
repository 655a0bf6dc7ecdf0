"""The gradient itself, and the gradient times the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class Gradient(Explainer):
    """How the score changes with each element, to first order.

    Shapes: inputs (num, *feature); values (num, *site).
    Units: of the target per unit of the value.
    Randomness: none.  Cost: one forward and one backward pass an example.
    Raises: TargetError if no gradient reaches the site.
    Fails when: the score is saturated, or units upstream of it are off: the slope at a point
        says nothing about a step away from it.
    Source: Simonyan et al. 2013, arXiv 1312.6034, section 3.
    """

    name: ClassVar[str] = "gradient"
    source: ClassVar[str] = "Simonyan et al. 2013, arXiv 1312.6034"
    is_signed: ClassVar[bool] = False
    times_value: ClassVar[bool] = False

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
        values = scorer.gradient()
        if self.times_value:
            values = values * scorer.value
        return Attribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=values,
            scores=scorer.plain,
            passes=scorer.passes,
        )


@dataclass(frozen=True, kw_only=True)
class GradientTimesValue(Gradient):
    """Gradient times value: exact for a network that is linear without offsets.

    Shapes, randomness, cost: as `Gradient`.
    Units: of the target.
    Fails when: as `Gradient`; an element that is 0 gets nothing, whatever it would change.
    Source: Shrikumar et al. 2016, arXiv 1605.01713.
    """

    name: ClassVar[str] = "gradient_times_value"
    source: ClassVar[str] = "Shrikumar et al. 2016, arXiv 1605.01713"
    is_signed: ClassVar[bool] = True
    times_value: ClassVar[bool] = True

"""DeepLift: the difference from a baseline carried back through every operator, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import (
    Attribution,
    Explainer,
    baseline_like,
    completeness_error,
)
from patchclamp.methods.attribution.relevance.walk import Piece, Walk, values_at, walked
from patchclamp.net import Net
from patchclamp.rules.base import Rule
from patchclamp.rules.relevance.differences import multipliers, quotient
from patchclamp.rules.relevance.local import denominator
from patchclamp.rules.value import Value

TOLERANCE = 1e-6
"""How far a sum may be off, relative to the score's difference."""

_NOISE = 1e-10
"""What float64 may lose of the largest output, where the two scores all but meet."""


@dataclass(frozen=True, kw_only=True)
class DeepLift(Explainer):
    """Multipliers of differences, by the chain rule: secants in place of gradients.

    Works on whatever the bounds have rules for: products, softmax, norms, maxima and recurrent
    cells have exact multipliers too (see `rules.relevance.differences`).

    Shapes: inputs (num, *feature); values (num, *site).
    Units: values add up to score - baseline score, in units of the target; over the reals
        exactly, here to 1e-6 of it, or it raises.
    Randomness: none.  Cost: a forward and a backward pass an example in float64, one forward pass
        for a baseline that all share, one pass of the live network to compare with.
    Raises: TargetError for a function of the output that is not linear in it (its gradient is no
        multiplier); InputError for a baseline like the input; EngineError for an operator
        without multipliers, by name, and for a sum that is off.
    Fails when: the baseline is itself informative; effects of two parts that cancel each other
        in a pre-activation are netted before the secant sees them.
    Source: Shrikumar et al. 2017, arXiv 1704.02685 (rescale rule).

    Attributes:
        baseline: a number, (*site) or (num, *site). At a part of a value, the rest stays.
    """

    name: ClassVar[str] = "deep_lift"
    source: ClassVar[str] = "Shrikumar et al. 2017, arXiv 1704.02685"
    baseline: Tensor | float = 0.0

    @torch.no_grad()
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
        walk = Walk.of(net, inputs, target, at)
        baseline = baseline_like(walk.value, self.baseline)
        shared = torch.as_tensor(self.baseline).ndim < walk.value.ndim
        made = [self._piece(walk, piece, baseline, shared) for piece in walk.pieces()]
        values, scores, before = (torch.cat(side) for side in zip(*made, strict=True))
        return Attribution(
            method=self.name,
            options=self.options(),
            site=walk.scorer.site,
            axes=walk.scorer.axes,
            values=values,
            scores=scores,
            baseline_scores=before,
            error=completeness_error(values, scores, before),
            passes=walk.scorer.passes,
        )

    def _piece(
        self, walk: Walk, piece: Piece, baseline: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scores and baseline scores of some examples."""
        network, num = piece.network, len(piece.points)
        base = walk.placed(baseline[piece.at], piece.at)
        tap = walk.scorer.tap
        if shared and (tap is None or tap.view.narrow is None):
            base = base[:1]
        held, held0 = values_at(network, piece.points), values_at(network, base)
        output, output0 = (
            held[network.output],
            held0[network.output].expand(num, *network.output.shape),
        )
        scores, seed = walk.scored(output, piece.rows)
        before, seed0 = walk.scored(output0, piece.rows)
        walk.require_live(piece, output, scores)
        _require_linear(seed, seed0, scores - before, output - output0)
        walk.scorer.passes.forwards += num + len(base)
        walk.scorer.passes.backwards += num

        def step(value: Value, rule: Rule, m: Tensor) -> tuple[Tensor, ...]:
            x, x0 = (tuple(h[a] for a in value.arguments) for h in (held, held0))
            below = denominator(value)
            if below is None:
                return multipliers(rule, m, x, x0)
            top = 1 - below
            found = quotient(m, x[top], x0[top], x[below], x0[below])
            return (found[0], found[1]) if top == 0 else (found[1], found[0])

        arrived = walked(network, seed, step)
        values = walk.seen(arrived * (piece.points - base))
        _require_complete(values, scores - before, output)
        return values, scores, before


def _require_linear(seed: Tensor, seed0: Tensor, rise: Tensor, step: Tensor) -> None:
    """The target's gradient must be a multiplier itself."""
    predicted = (seed * step).flatten(1).sum(1)
    size = (seed * step).flatten(1).abs().sum(1)
    if not torch.allclose(seed, seed0) or bool(((predicted - rise).abs() > 1e-6 * size).any()):
        raise TargetError(
            "DeepLift needs a target that is a linear function of the output",
            got="a function whose gradient differs between input and baseline",
            hint="a class or a difference of classes; or put the function into the network",
        )


def _require_complete(values: Tensor, difference: Tensor, output: Tensor) -> None:
    flat = values.flatten(1)
    missed = (flat.sum(1) - difference).abs()
    allowed = TOLERANCE * difference.abs() + _NOISE * output.flatten(1).abs().amax(1)
    bad = ~(missed <= allowed)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise EngineError(
            f"the values of example {row} do not add up to the difference of its scores",
            got=f"{float(flat[row].sum()):g}",
            expected=f"{float(difference[row]):g}",
            hint="multipliers grew until float64 lost the sum: a baseline nearer to the input, or "
            "start at a site behind (at=...)",
        )

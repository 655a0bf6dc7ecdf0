"""Guided backpropagation and DeconvNet: gradients with other rules at ReLUs, for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.relevance.walk import Piece, Walk, values_at, walked
from patchclamp.net import Net
from patchclamp.rules.base import Rule
from patchclamp.rules.relevance.slopes import gradients, is_rectifier
from patchclamp.rules.value import Value

_MADE_OF_RECTIFIERS = frozenset({"selu", "elu", "elu_", "celu", "softshrink"})
"""Operators that are lowered to ReLUs and other parts, and are none."""


@dataclass(frozen=True, kw_only=True)
class GuidedBackprop(Explainer):
    """The gradient, with what is negative on its way back cut off at every ReLU as well.

    ReLU, ReLU6 and clamps from 0 upwards count, as modules, functions or in place; all other
    operators have their gradient.

    Shapes: inputs (num, *feature); values (num, *site).
    Units: none: what arrives is no derivative.
    Randomness: none.  Cost: a forward and a backward pass an example in float64, and one pass of
        the live network to compare with.
    Raises: EngineError for a network without ReLU, and for an operator without a rule.
    Fails when: asked what the network uses: such maps hardly change with class and upper weights
        (Adebayo et al. 2018, arXiv 1810.03292); they show edges.
    Source: Springenberg et al. 2014, arXiv 1412.6806.
    """

    name: ClassVar[str] = "guided_backprop"
    source: ClassVar[str] = "Springenberg et al. 2014, arXiv 1412.6806"
    is_signed: ClassVar[bool] = False
    uses_activation: ClassVar[bool] = True

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
        made = [self._piece(walk, piece) for piece in walk.pieces()]
        values, scores = (torch.cat(side) for side in zip(*made, strict=True))
        return Attribution(
            method=self.name,
            options=self.options(),
            site=walk.scorer.site,
            axes=walk.scorer.axes,
            values=values,
            scores=scores,
            passes=walk.scorer.passes,
        )

    def _piece(self, walk: Walk, piece: Piece) -> tuple[Tensor, Tensor]:
        network, num = piece.network, len(piece.points)
        bent = {
            v
            for v in network.values
            if is_rectifier(v.rule) and walk.operation(v.name) not in _MADE_OF_RECTIFIERS
        }
        if not bent:
            kinds = sorted({type(v.rule).__name__ for v in network.values if v.rule is not None})
            raise EngineError(
                f"{self.name} is about ReLUs, and {walk.scorer.net.name} has none behind "
                f"'{walk.scorer.site}'",
                got=", ".join(kinds),
                hint="the gradient, or integrated gradients",
            )
        held = values_at(network, piece.points)
        scores, seed = walk.scored(held[network.output], piece.rows)
        walk.require_live(piece, held[network.output], scores)
        walk.scorer.passes.forwards += num
        walk.scorer.passes.backwards += num

        def step(value: Value, rule: Rule, g: Tensor) -> tuple[Tensor, ...]:
            x = tuple(held[a] for a in value.arguments)
            if value not in bent:
                return gradients(rule, g, x)
            g = g.clamp(min=0)
            return gradients(rule, g, x) if self.uses_activation else (g,)

        return walk.seen(walked(network, seed, step)), scores


@dataclass(frozen=True, kw_only=True)
class DeconvNet(GuidedBackprop):
    """The gradient, with ReLU applied to what comes back instead of ReLU's own gradient.

    Shapes: inputs (num, *feature); values (num, *site).
    Units: none: what arrives is no derivative.
    Randomness: none.  Cost: as `GuidedBackprop`.
    Raises: as `GuidedBackprop`.
    Fails when: as `GuidedBackprop`, and more so: whether a unit was active does not count, so
        only pooling and other operators let the input have a say in its own map.
    Source: Zeiler and Fergus 2013, arXiv 1311.2901, section 2.1.
    """

    name: ClassVar[str] = "deconvnet"
    source: ClassVar[str] = "Zeiler and Fergus 2013, arXiv 1311.2901"
    uses_activation: ClassVar[bool] = False

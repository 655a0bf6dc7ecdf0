"""Layer-wise relevance propagation: the score itself divided among what it was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError, OptionError, nearest
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import matches
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.relevance.walk import Piece, Walk, values_at, walked
from patchclamp.net import Net
from patchclamp.rules.base import Rule
from patchclamp.rules.conv import Conv, TransposedConv
from patchclamp.rules.layout import Join
from patchclamp.rules.products import MatMul, Mul
from patchclamp.rules.relevance.layers import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    LayerRule,
    WSquare,
    ZBox,
    is_layer,
)
from patchclamp.rules.relevance.local import Weighted, denominator, origin
from patchclamp.rules.relevance.shares import Arrived, divided
from patchclamp.rules.softmax import Softmax
from patchclamp.rules.value import Value

__all__ = [
    "LRP",
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "LayerRule",
    "Patterns",
    "RelevanceMap",
    "WSquare",
    "ZBox",
]

TOLERANCE = 1e-6
"""How far the account may be off, relative to the score."""

_NOISE = 1e-10
"""What float64 may lose of the largest output, where the score is all but 0."""


class Patterns(StrEnum):
    """What attention patterns are to LRP: values that earn relevance, or constants."""

    EARN = "earn"
    CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True, eq=False)
class RelevanceMap(Attribution):
    """An attribution with the rest of the account.

    sum of values + bias + absorbed = score, to 1e-6 of it.

    Attributes:
        absorbed: what stabilisers took, (num,).
    """

    absorbed: Tensor


@dataclass(frozen=True, kw_only=True)
class LRP(Explainer):
    """The score divided in proportion to contributions, operator by operator.

    Layers divide by the rule that is chosen for them; all other operators have one rule each
    (see `rules.relevance.shares`). Batch norms and other scalings are merged into the layers
    beside them first. A merged layer is known by the name of its last operator.

    Shapes: inputs (num, *feature); values, (num, *site); bias, absorbed (num,).
    Units: of the target. Values, `bias` (what fell to biases and to whatever does not come from
        the site) and `absorbed` (what stabilisers took) add up to the score, to 1e-6 of it or it
        raises; `error` is the absorbed share.
    Randomness: none.  Cost: a forward and a backward pass an example in float64 with epsilon,
        two to five with other rules; one pass of the live network to compare with.
    Raises: EngineError for an operator without a rule, by name, and for an account that is off;
        OptionError for a rule whose pattern matches no layer. A target that is a function of
        the output starts as gradient times output; what that leaves of the score is in `bias`.
    Fails when: contributions cancel (epsilon too small): relevance grows beyond the score with
        both signs; with the z+ rule, maps hardly depend on upper layers (Sixt et al. 2020,
        arXiv 1912.09818).
    Source: Bach et al. 2015, doi 10.1371/journal.pone.0130140; composites by Montavon et al. 2019.

    Attributes:
        dense: rule of layers that are matrix products.
        conv: rule of convolutions; None for that of `dense`.
        first: rule of layers that nothing with weights lies before; None for the rule of others.
        rules: rules by pattern of operator names, before all others; the first match counts.
        patterns: whether attention patterns earn relevance.
        spread_biases: a layer's bias gets only what no value contributed to, and the values
            beside it the rest. Without it, a deep network with z+ or gamma may lay all but a
            trace of its score to biases.
        stabiliser: epsilon of everything that is no layer.
    """

    name: ClassVar[str] = "lrp"
    source: ClassVar[str] = "Bach et al. 2015, doi 10.1371/journal.pone.0130140"
    dense: LayerRule = field(default_factory=Epsilon)
    conv: LayerRule | None = None
    first: LayerRule | None = None
    rules: Mapping[str, LayerRule] = field(default_factory=dict)
    patterns: Patterns = Patterns.EARN
    spread_biases: bool = False
    stabiliser: float = 1e-12

    @classmethod
    def epsilon_plus_flat(cls, epsilon: float = 1e-6) -> Self:
        """Epsilon on matrix products, z+ on convolutions, flat on the first layer."""
        dense = Epsilon(epsilon=epsilon)
        return cls(dense=dense, conv=AlphaBeta(), first=Flat(), spread_biases=True)

    @classmethod
    def gamma_box(cls, low: float, high: float, gamma: float = 0.25) -> Self:
        """Epsilon on matrix products, gamma on convolutions, z-box on the first layer."""
        return cls(conv=Gamma(gamma=gamma), first=ZBox(low=low, high=high), spread_biases=True)

    def options(self) -> dict[str, Json]:
        """The fields, rules by their names."""
        shown = {pattern: repr(rule) for pattern, rule in self.rules.items()}
        named = {n: repr(getattr(self, n)) for n in ("dense", "conv", "first")}
        return {**super().options(), **named, "rules": str(shown)}

    @torch.no_grad()
    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> RelevanceMap:
        """See `Explainer.run`."""
        walk = Walk.of(net, inputs, target, at)
        made = [self._piece(walk, piece) for piece in walk.pieces()]
        values, scores, bias, absorbed = (torch.cat(side) for side in zip(*made, strict=True))
        return RelevanceMap(
            method=self.name,
            options=self.options(),
            site=walk.scorer.site,
            axes=walk.scorer.axes,
            values=values,
            scores=scores,
            error=_missing(values.flatten(1).sum(1) + bias, scores),
            bias=bias,
            absorbed=absorbed,
            passes=walk.scorer.passes,
        )

    def _piece(self, walk: Walk, piece: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, scores, bias and what was absorbed of some examples."""
        network, num = piece.network, len(piece.points)
        chosen = self._chosen(network.values)
        held = values_at(network, piece.points)
        output = held[network.output]
        scores, slope = walk.scored(output, piece.rows)
        walk.require_live(piece, output, scores)
        walk.scorer.passes.forwards += num
        walk.scorer.passes.backwards += num
        seed = slope * output
        bias = scores - seed.flatten(1).sum(1)
        absorbed, handed = torch.zeros_like(bias), bias.abs()

        def step(value: Value, rule: Rule, R: Tensor) -> tuple[Tensor, ...]:
            nonlocal bias, absorbed, handed
            x = tuple(held[a] for a in value.arguments)
            at = Arrived(R, x, held[value], self.stabiliser, self._weights(value))
            if value in chosen and isinstance(rule, Weighted):
                at = at._replace(is_spread=self.spread_biases, inside=_inside(value))
                made = chosen[value].divided(rule, at)
            else:
                made = divided(rule, at)
            bias, absorbed = bias + made.offset, absorbed + made.absorbed
            handed = handed + R.flatten(1).abs().sum(1)
            return made.parts

        arrived = walked(network, seed, step)
        values = walk.seen(arrived)
        # of a site that is part of a value, the rest of that value is not asked about
        bias = bias + arrived.flatten(1).sum(1) - values.flatten(1).sum(1)
        _require_account(values.flatten(1).sum(1) + bias + absorbed, scores, output, handed)
        return values, scores, bias, absorbed

    def _weights(self, value: Value) -> tuple[float, float]:
        """How a product is divided between its factors."""
        constant = denominator(value)
        if self.patterns is Patterns.CONSTANT and isinstance(value.rule, (Mul, MatMul)):
            found = [isinstance(origin(a).rule, Softmax) for a in value.arguments]
            constant = found.index(True) if sum(found) == 1 else constant
        if constant is None:
            return (0.5, 0.5)
        return (0.0, 1.0) if constant == 0 else (1.0, 0.0)

    def _chosen(self, values: tuple[Value, ...]) -> dict[Value, LayerRule]:
        """The rule of every layer."""
        layers = [v for v in values if is_layer(v.rule)]
        behind: set[Value] = set()
        for value in values:
            if any(a in behind or a in set(layers) for a in value.arguments):
                behind.add(value)
        chosen: dict[Value, LayerRule] = {}
        for value in layers:
            is_conv = isinstance(value.rule, (Conv, TransposedConv))
            rule = self.conv if is_conv and self.conv is not None else self.dense
            if self.first is not None and value not in behind:
                rule = self.first
            named = (r for pattern, r in self.rules.items() if matches(pattern, value.name))
            chosen[value] = next(named, rule)
        for pattern in self.rules:
            names = [v.name for v in layers]
            if not any(matches(pattern, name) for name in names):
                raise OptionError(
                    f"no layer is called '{pattern}'",
                    expected="one of " + ", ".join(names[:12]),
                    nearest=nearest(pattern, names),
                    hint="a layer that was merged with a batch norm has the name of that",
                )
        return chosen


def _inside(layer: Value) -> Tensor | None:
    """Where a layer's argument is no constant such as padding: 0 or 1, (1, *shape)."""
    source = layer.arguments[0].rule
    if not isinstance(source, Join):
        return None
    inside = torch.zeros(source.template.numel(), dtype=source.template.dtype)
    for place in source.places:
        inside[place] = 1
    return inside.reshape(1, *source.output)


def _missing(total: Tensor, scores: Tensor) -> Tensor:
    """The share of the score that is not in the total, (num,)."""
    missed = (total - scores).abs()
    return torch.where(missed == 0, missed, missed / scores.abs())


def _require_account(total: Tensor, scores: Tensor, output: Tensor, handed: Tensor) -> None:
    """Nothing may be lost or made on the way."""
    missed = (total - scores).abs()
    allowed = TOLERANCE * scores.abs() + _NOISE * output.flatten(1).abs().amax(1)
    bad = ~(missed <= allowed)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise EngineError(
            f"the relevance of example {row} does not add up to its score",
            got=f"{float(total[row]):g}, after handing on {float(handed[row]):g} in all",
            expected=f"{float(scores[row]):g}",
            hint="contributions cancel almost wholly: a larger epsilon, or the gamma rule",
        )

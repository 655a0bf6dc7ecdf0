"""Attention followed through the layers: rollout, and rollout weighted by gradients.

A token's row of a layer's attention pattern says where it reads from; the residual stream keeps
what it had. Multiplying layer by layer gives how much of every input token is in a token at the
end. With gradients, only attention that raises the target counts, so the map depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError, OptionError, SiteError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target, as_metric, measured
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.scoring import Passes
from patchclamp.model.inputs import BATCH, principal
from patchclamp.net import Net

PATTERNS = "attn.*.pattern"


@dataclass(frozen=True, kw_only=True)
class AttentionRollout(Explainer):
    """Products of attention patterns, averaged over heads, with the residual stream as identity.

    A layer is (1 - residual) A + residual I with A the mean over heads; the map is the row of
    the product that belongs to the token that is read at the end.

    Shapes: inputs (num, ...) of a transformer; values (num, position), positions as the network
        has them, a class token among them.
    Units: shares; they add up to 1.
    Randomness: none.  Cost: a forward and a backward pass an example.
    Raises: SiteError for a network without attention patterns; EngineError where patterns of
        layers do not fit each other (pooled or windowed tokens); OptionError for a position that
        there is not.
    Fails when: asked about a class: nothing here but the choice of the row depends on the target;
        values, MLPs and signs are left out.
    Source: Abnar and Zuidema 2020, arXiv 2005.00928, eq. 1.

    Attributes:
        residual: the share of the residual stream, 0 to below 1.
        position: the token whose row is read; None for those that the target is computed from,
            in proportion to its gradient at the rows of the last pattern.
    """

    name: ClassVar[str] = "attention_rollout"
    source: ClassVar[str] = "Abnar and Zuidema 2020, arXiv 2005.00928"
    residual: float = 0.5
    position: int | None = None

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """See `Explainer.run`. Maps are over positions, so there is no choice of site."""
        if not 0 <= self.residual < 1:
            raise OptionError("the residual share is from 0 to below 1", got=str(self.residual))
        looked = _looked(net, inputs, target, at)
        num = looked.patterns[0].shape[-1]
        total = torch.eye(num, dtype=torch.float64).expand(len(looked.scores), num, num)
        kept = self.residual * torch.eye(num, dtype=torch.float64)
        for pattern in looked.patterns:
            total = ((1 - self.residual) * pattern.mean(1) + kept) @ total
        return looked.finished(self, self._row(total, looked))

    def _row(self, total: Tensor, looked: _Looked) -> Tensor:
        """The rows of the tokens that the target is computed from, (num, position)."""
        num = total.shape[1]
        if self.position is None:
            weights = looked.read / looked.read.sum(1, keepdim=True)
            return (weights[:, None] @ total)[:, 0]
        if not -num <= self.position < num:
            raise OptionError(
                "no such position", got=str(self.position), expected=f"{-num} to {num - 1}"
            )
        return total[:, self.position]


@dataclass(frozen=True, kw_only=True)
class AttentionRelevance(AttentionRollout):
    """Rollout of patterns weighted by the target's gradient, only what raises the target kept.

    R <- R + mean over heads of (A * dA)+ R, from the identity on; the map is the row of the token
    that is read at the end, the token's own start in it.

    Shapes: inputs (num, ...) of a transformer; values (num, position).
    Randomness: none.  Cost: a forward and a backward pass an example.
    Raises: as `AttentionRollout`.
    Units: the token's own 1, plus attention times gradient, multiplied along paths.
    Fails when: the gradient at patterns is 0 although attention matters (saturated softmax
        further up); values and MLPs are seen by way of the gradient alone.
    Source: Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6 (self-attention).

    Attributes:
        residual: not used.
    """

    name: ClassVar[str] = "attention_relevance"
    source: ClassVar[str] = "Chefer et al. 2021, arXiv 2103.15679"

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """See `Explainer.run`. Maps are over positions, so there is no choice of site."""
        looked = _looked(net, inputs, target, at)
        num = looked.patterns[0].shape[-1]
        total = torch.eye(num, dtype=torch.float64).expand(len(looked.scores), num, num)
        for pattern, grads in zip(looked.patterns, looked.grads, strict=True):
            total = total + (pattern * grads).clamp(min=0).mean(1) @ total
        return looked.finished(self, self._row(total, looked))


@dataclass(frozen=True, eq=False)
class _Looked:
    """Patterns of all layers (num, head, query, key), the target's gradients there, and scores."""

    patterns: list[Tensor]
    grads: list[Tensor]
    scores: Tensor
    passes: Passes

    @property
    def read(self) -> Tensor:
        """How much the target's gradient is at each row of the last pattern: (num, query)."""
        return self.grads[-1].abs().sum((1, 3))

    def finished(self, method: AttentionRollout, values: Tensor) -> Attribution:
        return Attribution(
            method=method.name,
            options=method.options(),
            site=PATTERNS,
            axes=(BATCH, "position"),
            values=values,
            scores=self.scores,
            passes=self.passes,
        )


def _looked(net: Net, inputs: object, target: Metric | Target, at: str | None) -> _Looked:
    """One forward and one backward pass.

    Raises:
        OptionError: a site was asked for.
        SiteError: no attention patterns. EngineError: patterns that do not fit each other.
        TargetError: the target does not depend on the last pattern.
    """
    if at is not None:
        raise OptionError(
            "attention is followed over all layers, from the first tokens on",
            got=f"at='{at}'",
            expected="no site",
        )
    call = net.call(inputs)
    try:
        taps = net.taps(PATTERNS)
    except SiteError as e:
        raise SiteError(
            f"{net.name} has no attention patterns to follow",
            hint="patchclamp sites MODEL lists attn.N.pattern where attention was found; for "
            "other networks there are gradients, DeepLift and LRP",
        ) from e
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def kept(raw: Tensor) -> Tensor:
            held[name] = raw.clone() if raw.requires_grad else raw.clone().requires_grad_()
            return held[name].clone()  # what is written in place must not touch it

        return kept

    addresses = [tap.site.address for tap in taps]
    with torch.enable_grad():
        engine = net.graph_for(call)
        raw, _ = engine.run(call, transforms={a: keep(a) for a in addresses})
        output = principal(raw)
        metric = as_metric(target, positions=output.ndim == 3)
        scores = measured(metric, output, torch.arange(len(output)))
        patterns = [held[a] for a in addresses]
        grads = _gradients(net, scores, patterns)
    patterns, grads = (
        [tap.view.read(x) for tap, x in zip(taps, side, strict=True)] for side in (patterns, grads)
    )
    num = patterns[0].shape[-1]
    shape = (len(scores), num, num)
    for tap, pattern in zip(taps, patterns, strict=True):
        if pattern.ndim != 4 or (len(pattern), *pattern.shape[2:]) != shape:
            raise EngineError(
                f"the pattern '{tap.label}' does not fit the first one of {net.name}",
                got=str(tuple(pattern.shape)),
                expected=f"({shape[0]}, head, {num}, {num})",
                hint="tokens are pooled, windowed or of two kinds; LRP and DeepLift follow these",
            )
    passes = Passes(forwards=len(scores), backwards=len(scores))
    return _Looked([p.detach().double() for p in patterns], grads, scores.detach(), passes)


def _gradients(net: Net, scores: Tensor, patterns: list[Tensor]) -> list[Tensor]:
    if not scores.requires_grad:
        raise TargetError(f"the target does not depend on the attention of {net.name}")
    grads = torch.autograd.grad(scores.sum(), patterns, allow_unused=True)
    if grads[-1] is None or not bool(grads[-1].flatten(1).any(1).all()):
        raise TargetError(
            f"the target has no gradient at the last attention of {net.name}",
            hint="the path is cut, or saturated to 0",
        )
    zeros = [torch.zeros_like(p) for p in patterns]
    return [(z if g is None else g).double() for g, z in zip(grads, zeros, strict=True)]

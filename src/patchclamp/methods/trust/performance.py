"""How well a network does its task, with interval and the baseline it has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.core.findings import Interval, Null
from patchclamp.methods.statistics import bootstrap_mean, wilson


@dataclass(frozen=True, kw_only=True)
class PerformanceResult:
    """A share or a loss with its interval and baseline.

    Attributes:
        per_class: class -> (hits, rows), for accuracy.
        confusion: (class, guess) counts, for accuracy.
    """

    value: float
    interval: Interval
    baseline: Null
    per_class: dict[int, tuple[int, int]]
    confusion: Int[Tensor, "class guess"] | None = None


def accuracy(logits: Float[Tensor, "row class"], labels: Int[Tensor, "row"]) -> PerformanceResult:
    """Share of rows whose top class is the label; the baseline always says the commonest class."""
    guess = logits.argmax(1)
    hits = guess == labels
    num_classes = logits.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    commonest = float(counts.max() / labels.numel())
    confusion = torch.bincount(labels * num_classes + guess, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    return PerformanceResult(
        value=float(hits.double().mean()),
        interval=wilson(int(hits.sum()), hits.numel()),
        baseline=Null(kind="always the commonest class", mean=commonest),
        per_class={
            c: (int(hits[labels == c].sum()), int(counts[c]))
            for c in range(num_classes)
            if counts[c] > 0
        },
        confusion=confusion,
    )


def token_loss(
    losses: Float[Tensor, "row"], tokens: Int[Tensor, "row position"], *, seed: int
) -> PerformanceResult:
    """Mean next-token loss over rows; the baseline knows how common each token is in this data.

    The baseline is the entropy of the tokens' own distribution here, which is lower than
    any predictor of single tokens without context could reach on new data: a hard one.
    """
    counts = torch.bincount(tokens[:, 1:].flatten()).double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log()).sum())
    return PerformanceResult(
        value=float(losses.mean()),
        interval=bootstrap_mean(losses, seed=seed),
        baseline=Null(kind="entropy of this data's token frequencies", mean=entropy),
        per_class={},
    )

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
    losses: Float[Tensor, "row"],
    tokens: Int[Tensor, "row position"],
    *,
    vocabulary: int,
    seed: int,
    mask: Tensor | None = None,
) -> PerformanceResult:
    """Mean next-token loss over rows, with the token frequencies as its baseline.

    The baseline predicts every row from the token counts of all other rows, with
    Witten-Bell smoothing over the vocabulary (Witten & Bell 1991, method C), so that it
    sees no token that it is judged on. Tokens outside the mask count nowhere.
    """
    return PerformanceResult(
        value=float(losses.mean()),
        interval=bootstrap_mean(losses, seed=seed),
        baseline=Null(
            kind="token frequencies of the other rows",
            mean=float(frequency_loss(tokens, vocabulary, mask).mean()),
        ),
        per_class={},
    )


def frequency_loss(
    tokens: Int[Tensor, "row position"], vocabulary: int, mask: Tensor | None = None
) -> Float[Tensor, "row"]:
    """Loss of each row under the smoothed token frequencies of all other rows, nats per token."""
    wanted = tokens[:, 1:]
    counted = torch.ones_like(wanted, dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    every = torch.bincount(wanted[counted], minlength=vocabulary).double()
    losses = []
    for whole, own in zip(wanted, counted, strict=True):
        row = whole[own]
        if row.numel() == 0:  # a text of one token has nothing to predict
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        counts = every - torch.bincount(row, minlength=vocabulary)
        num, kinds = counts.sum(), (counts > 0).sum()
        share = (counts[row] + kinds / vocabulary) / (num + kinds)
        losses.append(-share.log().mean())
    return torch.stack(losses)

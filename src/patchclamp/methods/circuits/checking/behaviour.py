"""Does the network do what is to be explained? Asked before any circuit is looked for.

A circuit of a behaviour that is not there is a circuit of noise, and looks no worse.
Two things are asked. The right answers must win against the wrong ones more often than
by chance; and it must be the prompt that decides it: where the corrupt prompt gives the
same difference, the network answers out of habit, and there is nothing between clean
and corrupt to be traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError, TargetError
from patchclamp.core.findings import Interval
from patchclamp.data.behaviours.pairs import TokenPairs
from patchclamp.methods.circuits.checking.metrics import metric_for
from patchclamp.methods.statistics import bootstrap_mean, wilson
from patchclamp.net import Net

LEAST_PAIRS = 8
"""With fewer, an interval of the accuracy says nothing against chance."""


@dataclass(frozen=True, kw_only=True)
class Performance:
    """How a network does on the pairs of one behaviour.

    Attributes:
        clean, corrupt: mean metric on the clean and on the corrupt prompts.
        contrast: mean of clean less corrupt, pair by pair.
        accuracy: share of clean prompts on which the best correct answer has a larger
            logit than every wrong one.
        chance: that share if all answers had the same chance.
    """

    name: str
    model: str
    metric: str
    num: int
    clean: float
    clean_interval: Interval
    corrupt: float
    corrupt_interval: Interval
    contrast: float
    contrast_interval: Interval
    accuracy: float
    accuracy_interval: Interval
    chance: float

    @property
    def present(self) -> bool:
        """Whether answers are right beyond chance, and because of what the prompts differ in."""
        return self.objection is None

    @property
    def objection(self) -> str | None:
        """Why the behaviour must not be explained, None if it may."""
        if self.num < LEAST_PAIRS:
            return f"{self.num} pairs are too few to tell; {LEAST_PAIRS} are needed"
        if self.accuracy_interval.low <= self.chance:
            return (
                f"{self.model} does not perform '{self.name}': right on {self.accuracy:.0%} of "
                f"{self.num} prompts ({self.accuracy_interval.low:.0%} to "
                f"{self.accuracy_interval.high:.0%}), by chance {self.chance:.0%}"
            )
        if self.contrast_interval.low <= 0:
            return (
                f"{self.model} answers '{self.name}' alike on clean and corrupt prompts: "
                f"{self.metric} {self.clean:.3g} and {self.corrupt:.3g}"
            )
        return None

    def require(self) -> None:
        """Refuse a behaviour that is not there.

        Raises: DataError, with the reason.
        """
        if self.objection is not None:
            raise DataError(
                self.objection, hint="explain a behaviour that the network has, or give more pairs"
            )


def performs(
    net: Net,
    pairs: TokenPairs | Sequence[TokenPairs],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Performance:
    """Measure a behaviour on clean and on corrupt prompts.

    Args:
        pairs: of one behaviour; several where its prompts have several lengths.
        seed: of the bootstrap.

    Units: those of the behaviour's metric; accuracy is a share.
    Randomness: bootstrap draws.  Cost: two forward passes a pair.
    Raises: DataError for no pairs, pairs of several behaviours, or answers outside the
    vocabulary; TargetError for an output that is not (row, position, class), or not finite.
    Fails when: pairs are not independent, such as few templates; intervals are too narrow then.
    """
    buckets = [pairs] if isinstance(pairs, TokenPairs) else list(pairs)
    if len({(bucket.name, bucket.metric) for bucket in buckets}) != 1:
        raise DataError(
            "performance is measured on the pairs of one behaviour",
            got=", ".join(sorted({bucket.name for bucket in buckets})) or "no pairs",
        )
    if batch_size < 1:
        raise OptionError("batch_size must be at least 1", got=str(batch_size))
    measured = [_measured(net, bucket, batch_size) for bucket in buckets]
    clean, corrupt, right = (torch.cat(parts) for parts in zip(*measured, strict=True))
    num, hits = clean.numel(), int(right.sum())
    shares = [
        (b.correct >= 0).sum(1) / ((b.correct >= 0).sum(1) + (b.wrong >= 0).sum(1)) for b in buckets
    ]
    return Performance(
        name=buckets[0].name,
        model=net.name,
        metric=str(buckets[0].metric),
        num=num,
        clean=float(clean.mean()),
        clean_interval=bootstrap_mean(clean, seed=seed),
        corrupt=float(corrupt.mean()),
        corrupt_interval=bootstrap_mean(corrupt, seed=seed),
        contrast=float((clean - corrupt).mean()),
        contrast_interval=bootstrap_mean(clean - corrupt, seed=seed),
        accuracy=hits / num,
        accuracy_interval=wilson(hits, num),
        chance=float(torch.cat(shares).double().mean()),
    )


def _measured(
    net: Net, pairs: TokenPairs, batch_size: int
) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"], Tensor]:
    """Metric of the clean and of the corrupt rows, and whether the clean answer is right."""
    metric = metric_for(pairs)
    clean, corrupt, right = [], [], []
    for start in range(0, len(pairs), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(pairs)))
        logits = _answers(net, pairs.clean[rows], pairs.position)
        clean.append(metric(logits, rows))
        corrupt.append(metric(_answers(net, pairs.corrupt[rows], pairs.position), rows))
        best = _best(logits, pairs.correct[rows])
        right.append(best > _best(logits, pairs.wrong[rows]))
    return torch.cat(clean).cpu(), torch.cat(corrupt).cpu(), torch.cat(right).cpu()


def _answers(net: Net, ids: Tensor, position: int) -> Float[Tensor, "row class"]:
    """Logits in double precision at the position of the answer."""
    output = net.run(ids).output
    if output.ndim != 3 or output.shape[1] != ids.shape[1]:
        raise TargetError(
            f"{net.name} gives no logits at every position",
            got=f"an output of shape {tuple(output.shape)}",
            expected="(row, position, class)",
        )
    # detach: an output may be a view of a parameter, and remembers it outside no_grad
    logits = output[:, position].detach().double()
    if not bool(logits.isfinite().all()):
        raise TargetError(f"the output of {net.name} has values that are not finite")
    return logits


def _best(logits: Tensor, answers: Tensor) -> Tensor:
    """The largest logit among the answers of each row."""
    ids = answers.to(logits.device)
    taken = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    return taken.max(1).values

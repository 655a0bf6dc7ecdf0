"""Units of a site that say the same thing: pairs with nearly the same activations."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RedundancyResult:
    """Redundant pairs of one site.

    Attributes:
        pairs: columns `a`, `b` (unit numbers), `correlation`; strongest first.
        num_pairs: how many pairs reach the limit.
        num_tested: how many pairs of moving units there are.
        closest: largest |correlation| of any pair (None: fewer than two moving units).
        null_mean, null_max: mean and 95% quantile of the same over shuffles.
        limit, num_shuffles: as asked for.
    """

    pairs: pl.DataFrame
    num_pairs: int
    num_tested: int
    closest: float | None
    null_mean: float
    null_max: float
    limit: float
    num_shuffles: int


@dataclass(frozen=True, kw_only=True)
class Redundancy:
    """Pairs of units with |correlation| above a limit, against shuffled observations.

    The null turns each unit's observations by a random offset of its own, which keeps
    neighbouring tokens alike, and takes the largest |correlation| over all pairs, so
    that the many pairs are paid for.

    Shapes: values (observation, unit).
    Units: Pearson correlation, -1..1.
    Randomness: the offsets, by `seed`.  Cost: (1 + shuffles) x observations x units^2.
    Fails when: two units agree on this data and differ elsewhere.
    Source: the Pearson correlation; max-statistic null, Westfall & Young 1993.
    """

    limit: float = 0.95
    shuffles: int = 20
    seed: int = 0
    max_listed: int = 50

    def run(self, values: Float[Tensor, "observation unit"]) -> RedundancyResult:
        """Find the pairs; see the class."""
        generator = torch.Generator().manual_seed(self.seed)
        scaled, moving = _scaled(values)
        found = torch.triu(scaled.T @ scaled, diagonal=1).clamp(-1, 1)
        null = torch.zeros(self.shuffles)
        for i in range(self.shuffles):
            mixed = _turned(scaled, generator)
            null[i] = torch.triu(mixed.T @ mixed, diagonal=1).abs().max() if len(moving) > 1 else 0
        strong = found.abs() >= self.limit
        at = strong.nonzero()
        value = found[strong]
        order = value.abs().argsort(descending=True)[: self.max_listed]
        pairs = pl.DataFrame(
            {
                "a": moving[at[order, 0]].numpy(),
                "b": moving[at[order, 1]].numpy(),
                "correlation": value[order].double().numpy(),
            }
        )
        num = len(moving)
        return RedundancyResult(
            pairs=pairs,
            num_pairs=int(strong.sum()),
            num_tested=num * (num - 1) // 2,
            closest=float(found.abs().max()) if num > 1 else None,
            null_mean=float(null.mean()),
            null_max=float(null.quantile(0.95)),
            limit=self.limit,
            num_shuffles=self.shuffles,
        )


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Columns with mean 0 and norm 1, of the units that move at all; and their numbers."""
    centred = values - values.mean(0)
    norm = centred.norm(dim=0)
    moving = (norm > 1e-6 * norm.max().clamp(min=1e-30)).nonzero()[:, 0]
    return centred[:, moving] / norm[moving], moving


def _turned(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Every column turned around by a random offset of its own."""
    num, units = columns.shape
    offset = torch.randint(num, (units,), generator=generator)
    return columns.gather(0, (torch.arange(num)[:, None] + offset) % num)

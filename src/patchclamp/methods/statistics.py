"""Intervals and nulls that several methods share.

Each function gives the number, the interval and says how it was made, so that a
finding can carry all three.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.findings import Interval, Null

_Z95 = 1.959963984540054


def wilson(hits: int, num: int) -> Interval:
    """95% interval of a share, by Wilson's score (Wilson 1927)."""
    share, z2 = hits / num, _Z95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z95 / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half), method="Wilson")


def bootstrap_mean(values: Float[Tensor, "row"], *, seed: int, num: int = 2000) -> Interval:
    """95% percentile bootstrap interval of a mean over independent rows (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(values.numel(), (num, values.numel()), generator=generator)
    means = values.double()[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low=low, high=high, method=f"bootstrap over {values.numel()} rows, {num} draws")


def permutation_null(
    effect: float, drawn: Float[Tensor, "draw"], kind: str, *, two_sided: bool = False
) -> Null:
    """A null from draws, with the p value (1 + hits) / (1 + draws)."""
    values = drawn.double()
    hits = values.abs() >= abs(effect) if two_sided else values >= effect
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Null(
        kind=kind,
        mean=float(values.mean()),
        low=low,
        high=high,
        num=values.numel(),
        p=(1 + int(hits.sum())) / (1 + values.numel()),
    )

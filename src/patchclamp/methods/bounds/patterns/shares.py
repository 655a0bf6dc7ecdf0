"""Shares with intervals that hold for every sample size (Clopper & Pearson 1934)."""

from __future__ import annotations

from patchclamp.core.findings import Interval
from patchclamp.methods.bounds.ranking.intervals import binomial_upper


def binomial_lower(hits: int, num: int, alpha: float) -> float:
    """A number that the probability of a hit falls below with probability at most alpha."""
    return 1.0 - binomial_upper(num - hits, num, alpha)


def clopper_pearson(hits: int, num: int, confidence: float) -> Interval:
    """Two-sided interval of a share from independent draws; conservative."""
    alpha = (1 - confidence) / 2
    return Interval(
        low=binomial_lower(hits, num, alpha),
        high=binomial_upper(hits, num, alpha),
        level=confidence,
        method=f"Clopper-Pearson, {hits} of {num}",
    )

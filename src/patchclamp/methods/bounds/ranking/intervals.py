"""Bounds of a mean from independent draws in [0, 1], with coverage for every sample size.

No normal approximation: a certificate must not rest on "large enough". Both bounds hold for
any distribution of the kind they name, at any number of draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_HALVINGS = 50
"""Steps of a bisection on [0, 1]; the end that is returned is the safe one."""
_BET = 0.75
"""Largest share of the capital that is put at risk in one bet (below 1: capital stays positive)."""


def betting_upper(values: Values, alpha: float) -> float:
    """A number that the mean exceeds with probability at most alpha; values in [0, 1].

    If the mean is m, a gambler who pays m for each draw and bets a fraction l_t, chosen before
    draw t, on low values has the capital C_n(m) = prod(1 + l_t (m - x_t)) with expectation 1,
    so C_n(m) >= 1/alpha has probability at most alpha (Markov). l_t is at most .75 / (1 - m),
    which keeps every factor positive and C_n increasing in m: the means that are not refuted
    are an interval [0, u], and u is returned. The bets follow the variance seen so far, so the
    bound is close to Bernstein's where the draws vary little.
    Source: Waudby-Smith & Ramdas 2024, arXiv 2010.09686.
    """
    num = len(values)
    counts = np.arange(1, num + 1)
    means = (0.5 + np.cumsum(values)) / (counts + 1)
    spread = (0.25 + np.cumsum((values - means) ** 2)) / (counts + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    bets = np.sqrt(2 * math.log(1 / alpha) / (num * before))

    def refuted(m: float) -> bool:
        capped = np.minimum(bets, _BET / (1 - m))
        return float(np.log1p(capped * (m - values)).sum()) >= math.log(1 / alpha)

    return _smallest(refuted)


def binomial_upper(hits: int, num: int, alpha: float) -> float:
    """A number that the probability of a hit exceeds with probability at most alpha.

    The largest p for which `hits` or fewer among `num` still has probability alpha or more.
    Source: Clopper & Pearson 1934.
    """
    if hits == num:
        return 1.0
    ways = [
        math.lgamma(num + 1) - math.lgamma(i + 1) - math.lgamma(num - i + 1)
        for i in range(hits + 1)
    ]
    log_ways, counts = np.array(ways), np.arange(hits + 1)

    def refuted(p: float) -> bool:
        terms = log_ways + counts * math.log(p) + (num - counts) * math.log1p(-p)
        top = float(terms.max())
        return top + math.log(float(np.exp(terms - top).sum())) < math.log(alpha)

    return _smallest(refuted)


def _smallest(refuted: Callable[[float], bool]) -> float:
    """Where a condition that holds from some number of (0, 1) on begins; 1 if it never does."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if refuted(middle):
            high = middle
        else:
            low = middle
    return high

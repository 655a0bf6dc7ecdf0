"""The most that substituted words can make of a document's smoothed score.

Setting. s(d) in [0, 1] is the mapped score of a document, P_d the smoothing's distribution over
texts (words drawn independently, word w uniformly from its set N(w)), g(d) = E_{P_d} s the
smoothed score. An attacker changes at most R words w_i of d into synonyms w_i', which gives d'.

Claim. With a = prod |N(w_i) & N(w_i')| / |N(w_i)| and b = prod |N(w_i) & N(w_i')| / |N(w_i')|
over the changed words, and p >= g(d),

    g(d') <= 1 - b max(0, 1 - p / a).

Proof. Let O be the texts that both P_d and P_d' can draw: P_d(O) = a, P_d'(O) = b. Both are
uniform on the texts they can draw, so P_d' = (b / a) P_d on O. Hence g(d') <= P_d'(not O) +
(b / a) E_{P_d}[s; O] <= 1 - b + (b / a) min(p, a). (If a = 0, then b = 0 and the bound is 1.)
A score that is 1 outside O and p / a on it attains this: from p and the sets alone no more can
be had. The right side falls in a and in b, so taking for each factor its least value over
the synonyms, and for each product the R smallest factors, bounds every attack. []

Where this differs: the source's published evaluation bounds the change by
1 - prod |N(w) & N(w')| / |N(w)|, which is ours if |N(w)| = |N(w')|, too large if N(w) is the
larger one, and too small if N(w') is (for N(w) inside N(w') it would give no change at all).

Source: Wu et al. 2022, arXiv 2209.06691, after Ye et al. 2020, arXiv 2005.14424.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.ranking.substitutions import Substitutions
from patchclamp.methods.bounds.ranking.words import Text


def ceiling(substitutions: Substitutions, text: Text, high: float) -> NDArray[np.float64]:
    """The most that the smoothed score can be after at most R substitutions, for every R.

    Shapes: result (num_attackable + 1,), entry R for R substitutions; it never falls.
    Args: high, an upper bound of the smoothed score. Rounded upward.
    Source: the module's docstring.
    """
    kept = [substitutions.retained(w) for w in text.words if substitutions.written_for(w)]
    a = np.cumprod([1.0, *sorted(k.own for k in kept)])
    b = np.cumprod([1.0, *sorted(k.other for k in kept)])
    # a = 0 only if nothing overlaps; then the bound is 1 whatever stands in its place
    share = np.minimum(high, a) / np.where(a > 0, a, 1.0)
    # n products, and then a few operations, each of at most one rounding on numbers up to 1
    slack = 4 * len(a) * np.finfo(np.float64).eps
    bounds: NDArray[np.float64] = np.where(a > 0, 1 - b * (1 - share) + slack, 1.0)
    return np.minimum(bounds, 1.0)

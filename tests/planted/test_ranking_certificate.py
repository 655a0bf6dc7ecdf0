"""Rankings in which it is known which documents can be promoted: certificates must agree.

Rankers are linear in the words (a weight each), so that the best attack on the smoothed score is
known word by word, and random, so that nothing is tuned to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from patchclamp.methods.bounds.ranking import CertifiedTopK, Substitutions
from patchclamp.methods.bounds.ranking.smoothing import Score

GROUPS, SIZE, LENGTH = 8, 3, 6
VOCABULARY = [f"w{chr(97 + g)}{chr(97 + i)}" for g in range(GROUPS) for i in range(SIZE)]


def chains() -> Substitutions:
    """Groups of three words in a row: the ends are synonyms of the middle, not of each other."""
    return Substitutions.of(
        {VOCABULARY[SIZE * g + 1]: VOCABULARY[SIZE * g : SIZE * g + 3] for g in range(GROUPS)}
    )


def linear(weights: dict[str, float]) -> Score:
    """The mean weight of a document's words."""

    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return np.array([np.mean([weights[w] for w in d.split()]) for d in documents])

    return score


def best_gain(sets: Substitutions, weights: dict[str, float], word: str) -> float:
    """How much one substitution can raise the smoothed weight of a word."""
    smooth = {w: float(np.mean([weights[v] for v in sets.drawn_for(w)])) for w in VOCABULARY}
    return max(0.0, *(smooth[v] - smooth[word] for v in sets.written_for(word)))


def smooth_score(sets: Substitutions, weights: dict[str, float], document: str) -> float:
    words = document.split()
    return float(np.mean([np.mean([weights[v] for v in sets.drawn_for(w)]) for w in words]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("closed", [False, True])
def test_what_can_be_promoted_is_not_certified_and_what_is_clear_is(
    seed: int, closed: bool
) -> None:
    generator = np.random.default_rng(seed)
    sets = chains().closed() if closed else chains()
    # topics: words of a group weigh alike, so that some documents are far from others
    topic = np.repeat(generator.random(GROUPS) > 0.5, SIZE)
    values = np.where(topic, 0.9, 0.05) + 0.1 * generator.random(len(VOCABULARY)) - 0.03
    weights = dict(zip(VOCABULARY, values.clip(0, 1).tolist(), strict=True))
    documents = [" ".join(generator.choice(VOCABULARY, LENGTH)) for _ in range(8)]
    score = linear(weights)
    k, most = 2, 1
    method = CertifiedTopK(k=k, max_substitutions=most, num_samples=400, confidence=0.99, seed=seed)
    result = method.run(score, "", documents, sets)
    true = [smooth_score(sets, weights, d) for d in documents]
    inside = result.table.filter(result.table["certified"].is_null())["document"].to_list()
    floor = min(true[i] for i in inside)
    for row in result.table.iter_rows(named=True):
        i = row["document"]
        assert row["low"] - 1e-12 <= true[i] <= row["high"] + 1e-12
        if i in inside:
            continue
        gains = sorted((best_gain(sets, weights, w) for w in documents[i].split()), reverse=True)
        reachable = true[i] + sum(gains[:most]) / LENGTH
        assert reachable <= row["ceiling"] + 1e-12
        if reachable >= floor:
            assert not row["certified"]
        # overlaps of 2/3 in both directions at worst: one word may add 1/3, and the intervals
        if true[i] + (0 if closed else 1 / 3 + 0.02) + 0.15 < floor:
            assert row["certified"]
    assert result.contradictions == ()


def test_both_kinds_occur_so_that_the_test_above_says_something() -> None:
    certified = promotable = 0
    for seed in range(6):
        generator = np.random.default_rng(seed)
        documents = [" ".join(generator.choice(VOCABULARY, LENGTH)) for _ in range(8)]
        weights = dict(zip(VOCABULARY, generator.random(len(VOCABULARY)).tolist(), strict=True))
        method = CertifiedTopK(k=2, num_samples=400, confidence=0.99, seed=seed)
        result = method.run(linear(weights), "", documents, chains().closed())
        certified += result.num_certified
        result = method.run(linear(weights), "", documents, chains())
        promotable += result.num_promoted or 0
    assert certified > 0
    assert promotable > 0


def test_nothing_is_certified_where_no_margin_is() -> None:
    sets = chains().closed()
    weights = {w: 0.5 + 0.4 * (i % SIZE - 1) for i, w in enumerate(VOCABULARY)}
    generator = np.random.default_rng(0)
    documents = [" ".join(generator.choice(VOCABULARY, LENGTH)) for _ in range(10)]
    result = CertifiedTopK(k=3, num_samples=300, seed=4).run(linear(weights), "", documents, sets)
    assert result.num_certified == 0
    assert result.num_promoted == 0

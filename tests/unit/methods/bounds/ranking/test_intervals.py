"""Bounds of a mean: coverage by simulation, closed forms, and that they are worth having."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from patchclamp.methods.bounds.ranking.intervals import Values, betting_upper, binomial_upper
from patchclamp.methods.bounds.ranking.smoothing import Clip, Vote

ALPHA, NUM, REPEATS = 0.1, 40, 600
ALLOWED = stats.binom.ppf(1 - 1e-4, REPEATS, ALPHA)
"""Failures among the repeats that a bound of exact level shows once in 10,000 runs of this test."""


def draw(kind: str, generator: np.random.Generator) -> tuple[Values, float]:
    if kind == "rare":
        return (generator.random(NUM) < 0.04).astype(float), 0.04
    if kind == "common":
        return (generator.random(NUM) < 0.9).astype(float), 0.9
    if kind == "uniform":
        return generator.random(NUM), 0.5
    return generator.beta(40, 20, NUM), 40 / 60


@pytest.mark.parametrize("kind", ["rare", "common", "uniform", "narrow"])
def test_both_sides_cover_the_mean_as_often_as_they_say(kind: str) -> None:
    generator = np.random.default_rng(7)
    above = below = 0
    for _ in range(REPEATS):
        values, mean = draw(kind, generator)
        above += betting_upper(values, ALPHA) < mean
        below += 1 - betting_upper(1 - values, ALPHA) > mean
    assert above <= ALLOWED
    assert below <= ALLOWED


def test_the_coverage_test_sees_that_the_normal_approximation_fails() -> None:
    generator = np.random.default_rng(7)
    failures = 0
    for _ in range(REPEATS):
        values, mean = draw("rare", generator)
        error = values.std(ddof=1) / math.sqrt(NUM)
        failures += values.mean() + stats.norm.ppf(1 - ALPHA) * error < mean
    assert failures > ALLOWED


@pytest.mark.parametrize("share", [0.01, 0.3, 0.97])
def test_votes_cover_their_probability_as_often_as_they_say(share: float) -> None:
    # exact: the sum over all counts whose bound lies below the truth
    failing = [k for k in range(NUM + 1) if binomial_upper(k, NUM, ALPHA) < share]
    assert stats.binom.pmf(failing, NUM, share).sum() <= ALPHA


@pytest.mark.parametrize(("hits", "num"), [(0, 10), (3, 10), (9, 10), (10, 10), (120, 1000)])
def test_votes_against_the_quantile_of_the_beta_distribution(hits: int, num: int) -> None:
    expected = stats.beta.ppf(1 - 0.01, hits + 1, num - hits) if hits < num else 1.0
    assert binomial_upper(hits, num, 0.01) == pytest.approx(expected, abs=1e-9)
    assert binomial_upper(0, num, 0.01) == pytest.approx(1 - 0.01 ** (1 / num), abs=1e-9)


def test_draws_that_vary_little_give_a_narrower_bound_than_hoeffding() -> None:
    values = np.random.default_rng(0).beta(400, 200, 1000)
    width = betting_upper(values, 1e-3) - values.mean()
    hoeffding = math.sqrt(math.log(1e3) / (2 * 1000))
    assert 0 < width < hoeffding / 3


def test_draws_at_the_ends() -> None:
    assert betting_upper(np.ones(50), 0.01) == 1.0
    assert 0 < betting_upper(np.zeros(500), 0.01) < 0.02
    assert betting_upper(np.zeros(1), 0.01) == 1.0


def test_a_score_map_bounds_the_mean_of_what_it_gives() -> None:
    scores = np.array([-3.0, 0.0, 0.25, 1.0, 9.0])
    assert Clip(low=0, high=0.5)(scores).tolist() == [0, 0, 0.5, 1, 1]
    assert Vote(threshold=0.25)(scores).tolist() == [0, 0, 1, 1, 1]
    votes = np.array([0.0, 1.0, 1.0])
    assert Vote(threshold=0).upper(votes, 0.1) == binomial_upper(2, 3, 0.1)
    assert Clip().upper(votes, 0.1) == betting_upper(votes, 0.1)

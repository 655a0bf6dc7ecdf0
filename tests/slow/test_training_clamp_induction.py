"""Clamped from the first step on: what the formation of an induction head waits for."""

from __future__ import annotations

import pytest

from examples.induction_formation import CONDITIONS, Formation, table, train

STEPS = 1300
"""All seeds of the plain condition passed 90% within 1125 steps when the example was written."""


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Formation]]:
    """Two seeds of every condition; those that never change are cut short."""
    short = {"knocked out": 500, "itself": 500}
    return {
        name: [train(name, seed, steps=short.get(name, STEPS)) for seed in range(2)]
        for name in CONDITIONS
    }


@pytest.mark.slow
def test_the_previous_token_pattern_brings_the_change_earlier(
    runs: dict[str, list[Formation]],
) -> None:
    for plain, held in zip(runs["plain"], runs["previous"], strict=True):
        for level in range(2):
            early, late = held.crossed[level], plain.crossed[level]
            assert early is not None
            assert late is not None
            assert early < late
        assert held.crossed[1] * 2 < plain.crossed[1]  # type: ignore[operator]  # not None above


@pytest.mark.slow
def test_a_held_match_leaves_almost_nothing_to_wait_for(runs: dict[str, list[Formation]]) -> None:
    for plain, held in zip(runs["plain"], runs["match"], strict=True):
        assert held.crossed[1] is not None
        assert plain.crossed[0] is not None
        assert held.crossed[1] < plain.crossed[0]


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["knocked out", "itself"])
def test_without_a_look_back_in_layer_0_no_change_comes(
    condition: str, runs: dict[str, list[Formation]]
) -> None:
    for plain, held in zip(runs["plain"], runs[condition], strict=True):
        assert plain.crossed[0] is not None
        assert held.steps >= 1.5 * plain.crossed[0]  # long enough to have seen it
        assert held.crossed == (None, None)
        assert held.accuracy < 0.4


@pytest.mark.slow
def test_the_table_lists_every_condition(runs: dict[str, list[Formation]]) -> None:
    text = table([run for of in runs.values() for run in of])
    assert all(name in text for name in CONDITIONS)
    assert "not reached" in text

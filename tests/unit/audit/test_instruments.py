"""The audit's own validation can fail: a method that misses or invents is said to."""

from __future__ import annotations

import pytest

from patchclamp.audit.sections import instruments
from patchclamp.audit.sections.instruments import Trial
from patchclamp.core.findings import Evidence, Verdict
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.truth.planted_units import PlantedUnits, planted_data


def trial(found: list[int], control: list[int], method: str = "neurons.activity") -> Trial:
    return Trial(
        method=method,
        what="things",
        planted=[1, 2],
        found=found,
        control=control,
        control_kind="nothing planted",
    )


@pytest.mark.parametrize(
    ("found", "control", "passed"),
    [
        ([1, 2], [], True),
        ([1], [], False),
        ([1, 2, 3], [], False),
        ([1, 2], [7], False),
        ([], [], False),
    ],
)
def test_a_method_passes_only_if_it_finds_all_and_nothing_else(
    found: list[int], control: list[int], passed: bool
) -> None:
    assert trial(found, control).passed is passed


def test_the_level_of_the_selectivity_test_admits_one_false_find() -> None:
    assert trial([1, 2, 3], [4], "neurons.selectivity").passed
    assert not trial([1, 2, 3, 5], [], "neurons.selectivity").passed
    assert not trial([1, 2], [4, 5], "neurons.selectivity").passed


@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_a_broken_method_is_reported(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """A limit of 0 finds pairs everywhere, one of 1.5 finds none."""

    def broken(shuffles: int) -> Redundancy:
        return Redundancy(shuffles=shuffles, limit=limit, max_listed=10_000)

    monkeypatch.setattr(instruments, "Redundancy", broken)
    data = planted_data(480, separation=2.0)
    observed = instruments._observed(PlantedUnits(), data)
    finding = instruments._finding(instruments._redundancy(observed), data)
    assert finding.evidence is Evidence.VALIDATED
    assert finding.verdict is Verdict.DOES_NOT_HOLD

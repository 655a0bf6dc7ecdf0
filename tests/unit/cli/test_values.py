"""Durations and counts."""

from __future__ import annotations

import pytest

from patchclamp.cli.values import at_least, duration
from patchclamp.core.errors import OptionError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2m", 120),
        ("90s", 90),
        ("90", 90),
        ("1h30m", 5400),
        ("1h0m5s", 3605),
        ("1.5m", 90),
        ("0.25", 0.25),
        (" 2M ", 120),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration("--budget", text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "0", "0s", "-1", "-2m", "2x", "m", "30m1h", "1e3", "inf", "nan", "2 m", "1,5m", "٣s"],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--budget is not a time.*such as 90s, 2m, 1h30m"):
        duration("--budget", text)


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(OptionError):
        duration("--budget", "9" * 400)


def test_counts() -> None:
    assert at_least("--limit", 1, 1) == 1
    with pytest.raises(OptionError, match=r"--limit must be at least 1; got 0\."):
        at_least("--limit", 0, 1)

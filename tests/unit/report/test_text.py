"""How text and numbers are shown, and where values lie on an axis."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchclamp.report.scale import Scale
from patchclamp.report.text import number, prose, share, visible

FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (-0.0, "0"),
        (3.0, "3"),
        (4_861_440, "4,861,440"),
        (-1234, "−1,234"),
        (0.94721, "0.9472"),
        (0.5, "0.5"),
        (12.3456, "12.35"),
        (1234.5, "1,235"),
        (999.96, "1,000"),
        (0.00012346, "0.0001235"),
        (0.000012345, "1.23e−5"),
        (-9.999e-7, "−1e−6"),
        (1234567.8, "1.23e+6"),
        (2**60, "1.15e+18"),
        (5e-324, "4.94e−324"),
        (1.7976931348623157e308, "1.8e+308"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@given(FLOATS)
def test_a_number_is_shown_to_within_half_a_percent(value: float) -> None:
    back = float(number(value).replace("−", "-").replace(",", ""))
    assert math.isclose(back, value, rel_tol=5.1e-3) or math.isinf(back)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0%"), (1, "100%"), (1e-9, "<0.1%"), (0.9996, ">99.9%"), (0.947, "94.7%"), (0.5, "50%")],
)
def test_shares_do_not_round_to_none_or_all(value: float, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x00", "⟨U+0000⟩"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\r\n", "a⟨U+000D⟩⟨U+000A⟩"),
        ("\x7f\x85", "⟨U+007F⟩⟨U+0085⟩"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("a\u200bb\ufeff", "a⟨U+200B⟩b⟨U+FEFF⟩"),
        ("\udc80", "⟨U+DC80⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("👩\u200d🔬 שלום", "👩\u200d🔬 שלום"),
    ],
)
def test_hidden_characters_are_shown(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_prose_keeps_its_lines() -> None:
    assert prose("a\n\tb\x00") == "a\n\tb⟨U+0000⟩"


@given(st.lists(FLOATS, max_size=5), FLOATS)
def test_places_lie_on_the_axis(values: list[float], probe: float) -> None:
    scale = Scale.around(values, pad=0.06)
    assert scale.low < scale.high
    assert 0 <= scale.percent(probe) <= 100
    if len(set(values)) > 1:
        assert scale.percent(min(values)) <= scale.percent(max(values))


@given(FLOATS, FLOATS, st.integers(2, 8))
def test_ticks_are_few_and_on_the_axis(a: float, b: float, num: int) -> None:
    scale = Scale.around([a, b])
    ticks = scale.ticks(num)
    assert 1 <= len(ticks) <= 4 * num + 1
    slack = 1e-6 * (scale.high - scale.low)
    assert all(math.isinf(slack) or scale.low - slack <= t <= scale.high + slack for t in ticks)


def test_ticks_are_round() -> None:
    assert Scale(low=-0.31, high=0.99).ticks(5) == [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8]

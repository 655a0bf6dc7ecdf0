"""A document is cut at its words and written again; casings survive a substitution."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp.methods.bounds.ranking.words import FUNCTION_WORDS, Text, problem_with


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_every_string_is_written_as_it_was_read(document: str) -> None:
    text = Text.cut(document)
    assert text.write(text.words) == document
    assert len(text.gaps) == len(text.words) + 1


def test_words_are_keys_and_casings_stay_with_the_place() -> None:
    text = Text.cut("The Sea, the SEA; don't open seaGate 7 x_sea!")
    assert text.words == ("the", "sea", "the", "sea", "don't", "open", "seaGate", "x", "sea")
    swapped = [{"sea": "ocean"}.get(w, w) for w in text.words]
    assert text.write(swapped) == "The Ocean, the OCEAN; don't open seaGate 7 x_ocean!"


WORDS = st.text("abyzéωжñ", min_size=2, max_size=6) | st.sampled_from(["don't", "o'neil's"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), WORDS, st.text(" -,.'7_", min_size=1)), min_size=1))
def test_an_attacked_text_is_cut_at_the_same_places(
    parts: list[tuple[int, str, str]],
) -> None:
    casings = (str.lower, str.capitalize, str.upper)
    document = "".join(casings[c]("sea") + " " + gap for c, _, gap in parts)
    assert all(problem_with(w) is None for _, w, _ in parts)
    before = Text.cut(document)
    attacked = before.write([w for _, w, _ in parts])
    after = Text.cut(attacked)
    assert after.words == tuple(w for _, w, _ in parts)
    assert after.casings == before.casings
    assert after.gaps == before.gaps


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("two words", "not one word"),
        ("", "not one word"),
        ("well-known", "not one word"),
        ("Sea", "lower case"),
        ("a", "casings cannot be told apart"),
        ("海", "casings cannot be told apart"),
        ("straße", "do not lead back"),
    ],
)
def test_words_that_would_break_the_cut_are_named(word: str, problem: str) -> None:
    assert problem in (problem_with(word) or "")


def test_function_words_are_words() -> None:
    assert {"the", "of", "because", "was"} <= FUNCTION_WORDS
    assert all(w == w.lower() and w.isalpha() for w in FUNCTION_WORDS)

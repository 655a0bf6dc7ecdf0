"""What programs mean, and which ones mean nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest

from patchclamp.core.errors import OptionError
from patchclamp.truth.rasp.domains import domains
from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Constant,
    Linear,
    Map,
    Predicate,
    Prefer,
    Selector,
    Share,
    Zip,
    both,
    evaluate,
    indices,
    ordered,
    select,
    tokens,
    width,
)


@pytest.mark.parametrize("predicate", Predicate)
def test_predicates_are_those_of_python(predicate: Predicate) -> None:
    for key in range(3):
        for query in range(3):
            assert predicate.holds(key, query) is eval(f"{key} {predicate} {query}")
    assert not predicate.holds(None, 1)
    assert not predicate.holds(1, None)


def test_values_without_an_order_are_not_compared() -> None:
    with pytest.raises(OptionError, match="no order"):
        Predicate.LT.holds("a", 1)


def test_a_selector_that_selects_nothing_gives_none_or_zero() -> None:
    nowhere = select(tokens, Constant("z"))
    assert evaluate(Aggregate(nowhere, tokens), "ab") == [None, None]
    number = Map(tokens, lambda _: 1, to_number=True)
    assert evaluate(Aggregate(nowhere, number), "ab") == [0, 0]
    assert evaluate(width(nowhere), "ab") == [0, 0]
    assert evaluate(Share(nowhere), "ab") == [1, 1]


def test_latest_and_earliest_keep_one_place() -> None:
    for prefer, place in ((Prefer.LATEST, 2), (Prefer.EARLIEST, 0)):
        program = Aggregate(select(tokens, Constant("a"), prefer=prefer), indices)
        assert evaluate(program, "abab"[:3]) == [place] * 3
    causal = Aggregate(Selector(prefer=Prefer.LATEST), tokens)
    assert evaluate(causal, "abc", causal=True) == ["a", "b", "c"]


def test_both_conditions_hold_at_once() -> None:
    earlier_same = both(select(tokens, tokens), select(indices, indices, Predicate.LT))
    assert evaluate(width(earlier_same), "aabab") == [0, 1, 0, 2, 1]


def test_a_missing_value_passes_through_and_can_be_given_a_default() -> None:
    before = Aggregate(select(indices, Map(indices, lambda i: i - 1)), tokens)
    assert evaluate(Zip(before, tokens, lambda x, y: x + y), "abc") == [None, "ab", "bc"]
    assert evaluate(Map(before, str.upper), "abc") == [None, "A", "B"]
    assert evaluate(Map(before, str.upper, default="-"), "abc") == ["-", "A", "B"]


def test_numbers_are_exact() -> None:
    is_a = Map(tokens, lambda x: x == "a", to_number=True)
    share = Aggregate(EVERYWHERE, is_a)
    assert evaluate(share, "aab") == [Fraction(2, 3)] * 3
    less = Linear(share, is_a, (Fraction(1), Fraction(-1, 2)))
    assert evaluate(less, "aab") == [Fraction(1, 6), Fraction(1, 6), Fraction(2, 3)]


def test_different_categories_at_one_place_have_no_common_one() -> None:
    with pytest.raises(OptionError, match="different categories"):
        evaluate(Aggregate(EVERYWHERE, tokens), "ab")


def test_a_number_must_be_exact() -> None:
    with pytest.raises(OptionError, match="fraction"):
        evaluate(Map(tokens, lambda _: 0.5, to_number=True), "a")


def test_inputs_come_first_and_once() -> None:
    same = select(tokens, tokens)
    program = Zip(width(same), width(same), lambda a, b: a + b)
    order = ordered(program)
    assert len(order) == 6  # tokens, two shares, two maps, the sum
    assert order[0] is tokens
    assert order[-1] is program


def test_domains_hold_every_value_that_occurs() -> None:
    is_a = Map(tokens, lambda x: x == "a", to_number=True)
    share = Aggregate(EVERYWHERE, is_a)
    found = domains(Map(share, lambda s: s > Fraction(1, 2)), "ab", 3)
    assert found[share] == (0, Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), 1)
    assert found[tokens] == ("a", "b")


def test_numbers_and_categories_are_not_confused() -> None:
    share = Aggregate(EVERYWHERE, Map(tokens, lambda x: x == "a", to_number=True))
    with pytest.raises(OptionError, match="needs categories"):
        domains(Zip(share, tokens, lambda a, b: a), "ab", 3)
    with pytest.raises(OptionError, match="needs categories"):
        domains(width(select(share, share)), "ab", 3)
    with pytest.raises(OptionError, match="needs numbers"):
        domains(Linear(tokens, tokens, (Fraction(1), Fraction(1))), "ab", 3)


def test_too_many_values_are_refused() -> None:
    number = Map(tokens, lambda x: x * x, to_number=True)
    with pytest.raises(OptionError, match="too many values"):
        domains(Aggregate(EVERYWHERE, number), range(12), 12)

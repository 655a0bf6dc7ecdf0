"""Programs that count: how often, what share, more or less, odd or even."""

from __future__ import annotations

from fractions import Fraction

from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Constant,
    Expression,
    Linear,
    Map,
    Predicate,
    Prefer,
    Share,
    Value,
    Zip,
    select,
    tokens,
    width,
)
from patchclamp.truth.rasp.programs.registry import program


def histogram() -> Map:
    """How often the token at a place occurs."""
    return width(select(tokens, tokens))


def number_of(token: Value) -> Map:
    """How often `token` occurs."""
    return width(select(tokens, Constant(token)))


def share_of(token: Value) -> Aggregate:
    """The share of places that hold `token`."""
    return Aggregate(EVERYWHERE, Map(tokens, lambda x: x == token, to_number=True))


@program("abc", 5)
def how_often() -> Expression:
    """How often the token at a place occurs."""
    return histogram()


@program("abc", 5)
def how_often_as_a_number() -> Expression:
    """How often the token at a place occurs, as a number."""
    return Map(Share(select(tokens, tokens)), lambda share: 1 / share - 1, to_number=True)


@program("abc", 5, causal=True)
def how_often_so_far() -> Expression:
    """How often the token at a place has occurred up to there."""
    return histogram()


@program("abc", 5, causal=True)
def seen_before() -> Expression:
    """Whether the token at a place has occurred before."""
    return Map(histogram(), lambda n: n > 1)


@program("abc", 5)
def only_once() -> Expression:
    """Whether the token at a place occurs nowhere else."""
    return Map(histogram(), lambda n: n == 1)


@program("abcdef", 5)
def any_twice() -> Expression:
    """Whether any token occurs more than once, everywhere."""
    twice = Map(Share(select(tokens, tokens)), lambda share: share < Fraction(1, 2), to_number=True)
    return Map(Aggregate(EVERYWHERE, twice), lambda share: share > 0)


@program("abc", 5)
def number_of_a() -> Expression:
    """How often 'a' occurs, everywhere."""
    return number_of("a")


@program("abc", 6, causal=True)
def share_of_a_so_far() -> Expression:
    """The share of 'a' among the tokens up to a place."""
    return share_of("a")


@program("abc", 6)
def share_of_same() -> Expression:
    """Among the places that hold 'a' or 'b', the share of 'a'; 0 where there are none."""
    kind = Map(tokens, lambda x: x in "ab")
    is_a = Map(tokens, lambda x: x == "a", to_number=True)
    return Aggregate(select(kind, Constant(True)), is_a)


@program("abc", 5, causal=True)
def a_less_b() -> Expression:
    """The share of 'a' less half the share of 'b', up to a place."""
    return Linear(share_of("a"), share_of("b"), (Fraction(1), Fraction(-1, 2)))


@program("abc", 5)
def more_a_than_b() -> Expression:
    """Whether 'a' occurs more often than 'b', everywhere."""
    return Zip(number_of("a"), number_of("b"), lambda a, b: a > b)


@program((0, 1), 5, causal=True)
def parity() -> Expression:
    """Whether the number of ones up to a place is odd."""
    return Map(number_of(1), lambda n: n % 2)


@program((0, 1), 5)
def majority() -> Expression:
    """Whether there are more ones than zeros, everywhere."""
    return Map(share_of(1), lambda share: share > Fraction(1, 2))


@program((0, 1, 2), 5, causal=True)
def sum_modulo_3() -> Expression:
    """The sum of the tokens up to a place, modulo 3."""
    return Zip(number_of(1), number_of(2), lambda ones, twos: (ones + 2 * twos) % 3)


@program("abc", 5, causal=True)
def pairs_ending_here() -> Expression:
    """At a 'b', how many times 'a' came before; nothing elsewhere."""
    return Zip(tokens, number_of("a"), lambda x, n: n if x == "b" else None)


@program("abc", 5)
def most_frequent() -> Expression:
    """The token that occurs most often, of several the one that comes first, everywhere."""
    often = histogram()
    ahead = width(select(often, often, Predicate.GT))
    best = Map(ahead, lambda n: n == 0)
    return Aggregate(select(best, Constant(True), prefer=Prefer.EARLIEST), tokens)


@program("abcd", 5, causal=True)
def how_many_kinds() -> Expression:
    """How many different tokens have occurred up to a place."""
    new = Map(histogram(), lambda n: n == 1)
    return width(select(new, Constant(True)))

"""Programs about order: sorting, ranks, extremes, rises and falls."""

from __future__ import annotations

from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Constant,
    Expression,
    Map,
    Predicate,
    Prefer,
    Zip,
    both,
    indices,
    select,
    tokens,
    width,
)
from patchclamp.truth.rasp.planting import draw_distinct
from patchclamp.truth.rasp.programs.positions import before
from patchclamp.truth.rasp.programs.registry import program


def smaller() -> Map:
    """How many tokens are smaller than the one at a place."""
    return width(select(tokens, tokens, Predicate.LT))


def larger() -> Map:
    """How many tokens are larger than the one at a place."""
    return width(select(tokens, tokens, Predicate.GT))


def sorted_place() -> Zip:
    """Where a token goes in sorted order; equal tokens keep their order."""
    equal_before = both(select(tokens, tokens), select(indices, indices, Predicate.LT))
    return Zip(smaller(), width(equal_before), lambda a, b: a + b)


@program((1, 2, 3), 5)
def rank() -> Expression:
    """How many tokens are smaller than the one at a place."""
    return smaller()


@program((1, 2, 3), 5)
def sort() -> Expression:
    """The tokens in ascending order."""
    return Aggregate(select(sorted_place(), indices), tokens)


@program((1, 2, 3, 4, 5, 6), 5, draw=draw_distinct)
def sort_distinct() -> Expression:
    """The tokens in ascending order, where all are different."""
    return Aggregate(select(smaller(), indices), tokens)


@program((1, 2, 3), 5)
def median() -> Expression:
    """The token in the middle of the sorted order, everywhere."""
    half = Map(width(EVERYWHERE), lambda length: length // 2)
    return Aggregate(select(sorted_place(), half), tokens)


@program((1, 2, 3, 4), 5)
def smallest() -> Expression:
    """The smallest token, everywhere."""
    least = Map(smaller(), lambda n: n == 0)
    return Aggregate(select(least, Constant(True)), tokens)


@program((1, 2, 3, 4), 5, causal=True)
def largest_so_far() -> Expression:
    """The largest token up to a place: the latest that none before it exceeds."""
    record = Map(larger(), lambda n: n == 0)
    return Aggregate(select(record, Constant(True), prefer=Prefer.LATEST), tokens)


@program((1, 2, 3, 4), 5, causal=True)
def new_record() -> Expression:
    """Whether a token is larger than all before it."""
    return Map(width(select(tokens, tokens, Predicate.GE)), lambda n: n == 1)


@program((1, 2, 3), 4, causal=True, last=True)
def ascending() -> Expression:
    """Whether no token is smaller than the one before it, at the last place."""
    falls = Zip(before(1), tokens, lambda x, y: x > y, to_number=True)
    return Map(Aggregate(EVERYWHERE, falls), lambda share: share == 0)


@program((1, 2, 3), 5)
def peak() -> Expression:
    """Whether a token is larger than both its neighbours; nothing at the ends."""
    rises = Zip(before(1), tokens, lambda x, y: x < y)
    falls = Zip(tokens, before(-1), lambda x, y: x > y)
    return Zip(rises, falls, lambda a, b: a and b)


@program((1, 2, 3), 5)
def smaller_to_the_right() -> Expression:
    """How many later tokens are smaller."""
    later = select(indices, indices, Predicate.GT)
    return width(both(select(tokens, tokens, Predicate.LT), later))

"""Programs that match tokens with earlier ones: repeats, induction, brackets."""

from __future__ import annotations

from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Constant,
    Expression,
    Map,
    Predicate,
    Prefer,
    Selector,
    Zip,
    both,
    indices,
    select,
    tokens,
    width,
)
from patchclamp.truth.rasp.programs.positions import before
from patchclamp.truth.rasp.programs.registry import program


def earlier() -> Selector:
    """All places before this one."""
    return select(indices, indices, Predicate.LT)


def balance() -> Aggregate:
    """Opening less closing brackets up to a place, as a share of its tokens."""
    return Aggregate(EVERYWHERE, Map(tokens, lambda x: 1 if x == "(" else -1, to_number=True))


@program("abc", 6, causal=True)
def induction() -> Expression:
    """What followed the token the last time that it occurred; nothing if it never did."""
    return Aggregate(select(before(1), tokens, prefer=Prefer.LATEST), tokens)


@program("ab", 6, causal=True)
def bigram_induction() -> Expression:
    """What followed the last two tokens the last time that they occurred in this order."""
    same = both(select(before(1), tokens), select(before(2), before(1)), prefer=Prefer.LATEST)
    return Aggregate(same, tokens)


@program("ab", 5, causal=True)
def bigram_seen() -> Expression:
    """Whether the token and the one before it have occurred in this order before."""
    last = before(1)
    same = both(select(tokens, tokens), both(select(last, last), earlier()))
    return Map(width(same), lambda n: n > 0)


@program("abc", 5, causal=True)
def last_occurrence() -> Expression:
    """Where the token occurred last before this place; nothing if it never did."""
    return Aggregate(both(select(tokens, tokens), earlier(), prefer=Prefer.LATEST), indices)


@program("abc", 5)
def first_occurrence() -> Expression:
    """Where the token occurs first."""
    return Aggregate(select(tokens, tokens, prefer=Prefer.EARLIEST), indices)


@program("abc", 5)
def is_first_occurrence() -> Expression:
    """Whether the token occurs here for the first time."""
    first = Aggregate(select(tokens, tokens, prefer=Prefer.EARLIEST), indices)
    return Zip(first, indices, lambda a, b: a == b)


@program("abc", 5, causal=True)
def distance_to_last() -> Expression:
    """How many places ago the token occurred last; nothing if it never did."""
    same = both(select(tokens, tokens), earlier(), prefer=Prefer.LATEST)
    return Zip(indices, Aggregate(same, indices), lambda here, there: here - there)


@program("abc", 5, causal=True)
def same_as_before() -> Expression:
    """Whether the token is the same as the one before; nothing at the start."""
    return Zip(tokens, before(1), lambda x, y: x == y)


@program((0, 1), 6, causal=True)
def exclusive_or() -> Expression:
    """Exclusive or of a bit and the one before; nothing at the start."""
    return Zip(tokens, before(1), lambda x, y: x ^ y)


@program("abc", 5, causal=True)
def skip_bigram() -> Expression:
    """How often the token's next letter has occurred before it."""
    wanted = Map(tokens, lambda x: "abc"[("abc".index(x) + 1) % 3])
    return width(select(tokens, wanted))


@program("abc", 6, causal=True)
def after_last_a() -> Expression:
    """The token that came right after the last 'a'; nothing if there was none."""
    return Aggregate(select(before(1), Constant("a"), prefer=Prefer.LATEST), tokens)


@program("abcd", 5, causal=True)
def stutter() -> Expression:
    """'!' where a token follows itself, else the token."""
    return Map(
        Zip(tokens, Map(before(1), lambda x: x, default="-"), lambda x, y: (x, x == y)),
        lambda pair: "!" if pair[1] else pair[0],
    )


@program("()", 6, causal=True)
def bracket_balance() -> Expression:
    """Opening less closing brackets up to a place, as a share of its tokens."""
    return balance()


@program("()", 6, causal=True)
def bracket_depth() -> Expression:
    """How many brackets are open after a place; nothing where too many were closed."""
    opened, closed = (width(select(tokens, Constant(x))) for x in "()")
    return Zip(opened, closed, lambda a, b: a - b if a >= b else None)


@program("()", 6, causal=True, last=True)
def brackets_match() -> Expression:
    """Whether all brackets are matched, at the last place."""
    level = balance()
    below = Map(level, lambda share: share < 0, to_number=True)
    never_below = Map(Aggregate(EVERYWHERE, below), lambda share: share == 0)
    return Zip(never_below, Map(level, lambda share: share == 0), lambda a, b: a and b)


@program("()", 5, causal=True)
def opening_bracket() -> Expression:
    """Where the bracket was opened that closes here; nothing elsewhere."""
    opened, closed = (width(select(tokens, Constant(x))) for x in "()")
    depth = Zip(opened, closed, lambda a, b: a - b)
    opens = Zip(tokens, depth, lambda x, d: d - 1 if x == "(" else None)
    closes = Zip(tokens, depth, lambda x, d: d if x == ")" else None)
    return Aggregate(select(opens, closes, prefer=Prefer.LATEST), indices)

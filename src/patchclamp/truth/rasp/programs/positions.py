"""Programs about places: moving tokens around, and reading them off by where they stand."""

from __future__ import annotations

from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Expression,
    Map,
    Prefer,
    Selector,
    Zip,
    indices,
    select,
    tokens,
    width,
)
from patchclamp.truth.rasp.programs.registry import program


def token_at(places: Expression, values: Expression = tokens) -> Aggregate:
    """What stands at the given places; None where there is no such place."""
    return Aggregate(select(indices, places), values)


def before(distance: int, values: Expression = tokens) -> Aggregate:
    """What stood `distance` places ago; None at the start."""
    return token_at(Map(indices, lambda i: i - distance), values)


def mirrored() -> Aggregate:
    """What stands as far from the end as we are from the start."""
    return token_at(Zip(width(EVERYWHERE), indices, lambda length, i: length - i - 1))


@program("abcd", 5)
def copy() -> Expression:
    """Every token as it is, through a head that looks at its own place."""
    return token_at(indices)


@program("abcd", 5)
def next_letter() -> Expression:
    """Every token replaced by the next one of the alphabet, in a circle."""
    return Map(tokens, lambda x: "abcd"[("abcd".index(x) + 1) % 4])


@program("abc", 5)
def reverse() -> Expression:
    """The tokens from the last to the first."""
    return mirrored()


@program("abc", 5, causal=True)
def previous_token() -> Expression:
    """The token before, and '-' at the start."""
    return Map(before(1), lambda x: x, default="-")


@program("abc", 5, causal=True)
def two_before() -> Expression:
    """The token two places ago; nothing at the first two."""
    return before(2)


@program("abc", 5)
def next_token() -> Expression:
    """The token after, and '-' at the end."""
    return Map(before(-1), lambda x: x, default="-")


@program("abc", 5)
def rotate_left() -> Expression:
    """The token after, and the first one at the end."""
    return token_at(Zip(indices, width(EVERYWHERE), lambda i, n: (i + 1) % n if n else 0))


@program("abcd", 6)
def swap_neighbours() -> Expression:
    """The first and second token swapped, the third and fourth, and so on."""
    return token_at(Map(indices, lambda i: i ^ 1))


@program("abcd", 5)
def first_token() -> Expression:
    """The first token, everywhere."""
    return Aggregate(Selector(prefer=Prefer.EARLIEST), tokens)


@program("abcd", 5)
def last_token() -> Expression:
    """The last token, everywhere."""
    return Aggregate(Selector(prefer=Prefer.LATEST), tokens)


@program("abc", 5)
def middle_token() -> Expression:
    """The token in the middle, everywhere."""
    return token_at(Map(width(EVERYWHERE), lambda length: length // 2))


@program("abc", 6)
def every_other() -> Expression:
    """Tokens at even places, '-' at odd ones."""
    return Zip(tokens, indices, lambda x, i: "-" if i % 2 else x)


@program((0, 1, 2), 5)
def add_place() -> Expression:
    """Token plus place, modulo 3."""
    return Zip(tokens, indices, lambda x, i: (x + i) % 3)


@program("abc", 5)
def mirror_agrees() -> Expression:
    """Whether the place on the other side holds the same token."""
    return Zip(tokens, mirrored(), lambda x, y: x == y)


@program("ab", 5)
def palindrome() -> Expression:
    """Whether the tokens read the same backwards, everywhere."""
    wrong = Zip(tokens, mirrored(), lambda x, y: x != y, to_number=True)
    return Map(Aggregate(EVERYWHERE, wrong), lambda share: share == 0)


@program("abcd", 6)
def ends_agree() -> Expression:
    """Whether the first and the last token are the same, everywhere."""
    first = Aggregate(Selector(prefer=Prefer.EARLIEST), tokens)
    last = Aggregate(Selector(prefer=Prefer.LATEST), tokens)
    return Zip(first, last, lambda x, y: x == y)

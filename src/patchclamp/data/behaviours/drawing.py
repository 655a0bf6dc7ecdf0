"""What the generators of prompt pairs share: seeded draws, words of one token, balance.

A generator draws from lists that are cut in two, one part for each split. Words must
be one token each in the tokenizer that will read them, so that prompts in which they
are exchanged keep their length; with a tokenizer the others are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from patchclamp.core.errors import DataError, nearest
from patchclamp.data.behaviours.pairs import Pair, Split
from patchclamp.model.tokens import Tokenizer

T = TypeVar("T")

PATIENCE = 10
"""Draws for each pair that is asked for, before it is said that there are no more."""


class Draw:
    """The random choices of one prompt set: a function of behaviour, split and seed.

    Attributes:
        rng: for choices that need no balance.
        num_redrawn: pairs drawn again because their prompts differed in length.
    """

    def __init__(
        self, behaviour: str, seed: int, split: Split | str, tokenizer: Tokenizer | None
    ) -> None:
        if split not in set(Split):
            raise DataError(
                f"'{behaviour}' has no split '{split}'",
                expected=" or ".join(f"'{s}'" for s in Split),
                nearest=nearest(str(split), Split),
            )
        self.behaviour, self.split, self.tokenizer = behaviour, Split(split), tokenizer
        # A string is hashed by SHA-512 to seed, so it gives the same draws everywhere.
        self.rng = random.Random(f"{behaviour}/{self.split}/{seed}")
        self.num_redrawn = 0

    def part(self, items: Sequence[T]) -> tuple[T, ...]:
        """The part of a list that belongs to the split: every other item."""
        return tuple(items[self.split is Split.HELD_OUT :: 2])

    def words(
        self, items: Sequence[str], *, what: str, least: int = 2, shared: bool = False
    ) -> tuple[str, ...]:
        """The words of a list that are one token after a space.

        Args:
            what: what they are called in the error.
            least: how many a prompt needs.
            shared: take the whole list, not only the part of the split.

        Raises: DataError if fewer than `least` are left.
        """
        given = tuple(items) if shared else self.part(items)
        kept = tuple(word for word in given if self.fits(word))
        self.need(kept, what=what, least=least)
        return kept

    def need(self, kept: Sequence[object], *, what: str, least: int) -> None:
        """Raises: DataError if fewer than `least` words of one token are left."""
        if len(kept) < least:
            raise DataError(
                f"the tokenizer has too few {what} of one token for '{self.behaviour}'",
                got=str(len(kept)),
                expected=f"{least} or more",
                hint="use a behaviour at the level of tokens, such as induction",
            )

    def fits(self, word: str) -> bool:
        """Whether a word is one token after a space (always, without a tokenizer)."""
        return self.adds_one("The", " " + word)

    def adds_one(self, before: str, text: str) -> bool:
        """Whether `text` after `before` is one token more (always, without a tokenizer)."""
        if self.tokenizer is None:
            return True
        short, long = self.lengths([before, before + text])
        return long == short + 1

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens in each text; needs a tokenizer."""
        assert self.tokenizer is not None, "asked only where there is one"
        counts: list[int] = self.tokenizer.encode(texts)["attention_mask"].sum(1).tolist()
        return counts

    def cycle(self, items: Sequence[T]) -> Iterator[T]:
        """All items in random order, then again in another.

        So every item comes equally often to within one, but for pairs that are thrown
        away because they were drawn before.
        """
        while True:
            yield from self.rng.sample(list(items), len(items))

    def pairs(self, num: int, make: Callable[[], Pair]) -> tuple[Pair, ...]:
        """`num` different pairs whose prompts have equal length.

        Raises: DataError for num < 1, or if there are not so many different pairs.
        """
        if num < 1:
            raise DataError(f"'{self.behaviour}' needs pairs", got=str(num), expected="1 or more")
        found: dict[tuple[str, str], Pair] = {}
        for _ in range(PATIENCE * num + PATIENCE):
            pair = make()
            if (pair.clean, pair.corrupt) in found:
                continue
            if self.tokenizer is not None:
                clean, corrupt = self.lengths([pair.clean, pair.corrupt])
                if clean != corrupt:
                    self.num_redrawn += 1
                    continue
            found[pair.clean, pair.corrupt] = pair
            if len(found) == num:
                return tuple(found.values())
        raise DataError(
            f"there are not so many different pairs of '{self.behaviour}'",
            got=f"{num} asked for, {len(found)} found",
            hint="ask for fewer",
        )


def words(text: str) -> tuple[str, ...]:
    """The words of a text, as a list that is written without quotation marks."""
    return tuple(text.split())


def variant_of(behaviour: str, given: str | None, known: Sequence[str]) -> str:
    """The variant asked for, or the first. Raises: DataError if it is unknown."""
    if given is None:
        return known[0]
    if given not in known:
        raise DataError(
            f"'{behaviour}' has no variant '{given}'",
            expected="one of " + ", ".join(f"'{v}'" for v in known),
            nearest=nearest(given, known),
        )
    return given

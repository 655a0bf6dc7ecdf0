"""Induction on random repeats: a segment of random tokens comes again and is continued.

    ... k f w b q z ... k f w -> b, because b came after w before

There are no words in it, so the pairs are made of token ids, for any vocabulary. All
tokens of a row before the repeat differ, so that the current one occurs once before and
its continuation is unambiguous. Nothing tells the answer but that earlier place.

- "continuation replaced": in the corrupt row another token stands at the one place after
  the earlier occurrence, and is the right answer there;
- "segment shuffled": the first occurrence is in another order, so that another of its
  tokens follows the current one and is the right answer.

In both the answers change places between clean and corrupt.

Source: Olsson et al. 2022, "In-context learning and induction heads". The lengths of
segment and prefix are those of `patchclamp.data.induction`, on part of which the bundled
language model was not trained: they are the held-out split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch

from patchclamp.core.errors import DataError
from patchclamp.data.behaviours.drawing import Draw, variant_of
from patchclamp.data.behaviours.pairs import Split, TokenPairs
from patchclamp.data.induction import (
    HELD_OUT_PERIODS,
    HELD_OUT_PREFIXES,
    TRAINING_PERIODS,
    TRAINING_PREFIXES,
)
from patchclamp.model.tokens import Tokenizer

NAME = "induction"
VARIANTS = ("segment shuffled", "continuation replaced")
LEAST_SEEN = 3
"""Tokens of the second occurrence before the answer: by then the repeat shows."""


def generate(
    num: int,
    vocabulary: Sequence[int],
    *,
    length: int = 64,
    first: int | None = None,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    variant: str | None = None,
) -> TokenPairs:
    """Rows of `length` tokens, the answer to which is that of the repeated segment.

    Args:
        vocabulary: ids to draw from, all different.
        first: an id to put before every row, where the network expects one; it counts
            towards the length.

    Raises: DataError for an unknown split or variant, a length at which nothing repeats,
    or too few ids to make the tokens of a row differ.
    """
    variant = variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, None)
    start = [] if first is None else [first]
    shapes = _shapes(length - len(start), draw.split)
    ids = [int(i) for i in vocabulary if i != first]
    needed = max(prefix + period for prefix, period in shapes) + 1
    if len(set(ids)) < len(ids) or len(ids) < needed or num < 1:
        raise DataError(
            f"rows of '{NAME}' cannot be drawn",
            got=f"{num} rows from {len(set(ids))} different ids",
            expected=f"1 row or more, from {needed} different ids or more",
            hint="give a larger vocabulary, or a shorter length",
        )
    cycle = draw.cycle(shapes)
    rows = [_row(draw.rng, ids, *next(cycle), length - len(start), variant) for _ in range(num)]
    return TokenPairs(
        name=NAME,
        clean=torch.tensor([start + clean for clean, _, _, _ in rows]),
        corrupt=torch.tensor([start + corrupt for _, corrupt, _, _ in rows]),
        correct=torch.tensor([[correct] for _, _, correct, _ in rows]),
        wrong=torch.tensor([[wrong] for _, _, _, wrong in rows]),
        position=length - 1,
        split=draw.split,
        source="Olsson et al. 2022",
        index=torch.arange(num),
    )


def vocabulary_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that make fair random tokens: words after a space, or else single visible characters.

    Rare pieces and control tokens are left out, because networks know them badly.
    Raises: DataError if the tokenizer has hardly any of either.
    """
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    for pattern in (r" [A-Za-z]{2,}", r"[ -~]"):
        found = tuple(i for i, piece in enumerate(pieces) if re.fullmatch(pattern, piece))
        if len(found) >= max(TRAINING_PERIODS):
            return found
    raise DataError(
        f"the tokenizer has too few words and letters for '{NAME}'",
        hint="name the ids to draw from: vocabulary=range(...)",
    )


def _shapes(length: int, split: Split) -> list[tuple[int, int]]:
    """(prefix, period) of rows that end within the second occurrence."""
    held = split is Split.HELD_OUT
    prefixes = HELD_OUT_PREFIXES if held else TRAINING_PREFIXES
    periods = HELD_OUT_PERIODS if held else TRAINING_PERIODS
    shapes = [
        (prefix, period)
        for prefix in prefixes
        for period in periods
        if LEAST_SEEN <= length - prefix - period < period
    ]
    if not shapes:
        raise DataError(
            f"rows of {length} tokens hold no repeat of the split '{split}'",
            expected=f"{min(prefixes) + min(periods) + LEAST_SEEN} to "
            f"{max(prefixes) + 2 * max(periods) - 1} tokens",
        )
    return shapes


def _row(
    rng: random.Random, ids: list[int], prefix: int, period: int, length: int, variant: str
) -> tuple[list[int], list[int], int, int]:
    """Clean and corrupt row, the answer on each."""
    drawn = rng.sample(ids, prefix + period + 1)
    before, segment, spare = drawn[:prefix], drawn[prefix:-1], drawn[-1]
    seen = length - prefix - period
    again, current, correct = segment[:seen], segment[seen - 1], segment[seen]
    changed = list(segment)
    if variant == "continuation replaced":
        changed[seen] = wrong = spare
    else:
        while True:
            rng.shuffle(changed)
            place = changed.index(current)
            if place + 1 < period and changed[place + 1] != correct:
                wrong = changed[place + 1]
                break
    return before + segment + again, before + changed + again, correct, wrong

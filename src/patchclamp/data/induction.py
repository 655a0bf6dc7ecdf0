"""Random bytes that repeat: the text on which only induction helps.

A row is a random prefix, then a random segment that repeats until the row is
full. Nothing in it can be learned by heart, because the bytes are drawn afresh,
and nothing can be found at a fixed distance, because the segment's length (the
period) and the prefix vary from row to row. From the second occurrence on, the
way to predict a byte is to find the current one earlier and copy what followed.
Source: Olsson et al. 2022, "In-context learning and induction heads".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import DataError

FIRST_BYTE, LAST_BYTE = 32, 126
"""The printable range of ASCII, from which bytes are drawn."""

HELD_OUT_PERIODS = (*range(24, 29), *range(44, 49))
TRAINING_PERIODS = tuple(p for p in range(8, 65) if p not in HELD_OUT_PERIODS)
"""Periods that the bundled language model was and was not trained on."""

HELD_OUT_PREFIXES = (*range(9, 13), *range(25, 33))
TRAINING_PREFIXES = tuple(a for a in range(25) if a not in HELD_OUT_PREFIXES)
"""Likewise the lengths of the prefix."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Rows of repeating bytes, and where they repeat.

    Attributes:
        input_ids: int64 (row, length).
        prefix: random bytes before the segment, int64 (row).
        period: length of the segment, int64 (row).
    """

    input_ids: Tensor
    prefix: Tensor
    period: Tensor

    @property
    def repeated(self) -> Tensor:
        """Where a byte follows from the bytes before it, bool (row, length).

        These are the bytes of the second and later occurrences, less the first byte
        of the second, at which nothing shows yet that a repeat began.
        """
        places = torch.arange(self.input_ids.shape[1])
        return places[None] > (self.prefix + self.period)[:, None]

    @property
    def source(self) -> Tensor:
        """For a query at each position, the position after the last occurrence of its byte.

        An induction head attends there. -1 in prefix and first occurrence.
        Shapes: int64 (row, length).
        """
        places = torch.arange(self.input_ids.shape[1])[None]
        found = places - self.period[:, None] + 1
        return torch.where(places >= (self.prefix + self.period)[:, None], found, -1)


def repeats(
    num_rows: int,
    *,
    length: int = 128,
    periods: Sequence[int] = TRAINING_PERIODS,
    prefixes: Sequence[int] = TRAINING_PREFIXES,
    seed: int | torch.Generator,
) -> Repeats:
    """Rows with periods and prefixes drawn uniformly from those given.

    Raises: DataError if no row could hold a repeat.
    """
    if num_rows < 1 or min(periods) < 1 or min(prefixes) < 0:
        raise DataError(
            "no rows of repeating bytes could be drawn",
            got=f"num_rows={num_rows}, periods from {min(periods)}, prefixes from {min(prefixes)}",
            expected="num_rows >= 1, periods >= 1, prefixes >= 0",
        )
    if max(prefixes) + max(periods) + 1 >= length:
        raise DataError(
            f"rows of {length} bytes are too short to repeat",
            got=f"prefix up to {max(prefixes)} and period up to {max(periods)}",
            expected="prefix + period + 1 < length",
        )
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def draw(choices: Sequence[int]) -> Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), (num_rows,), generator=generator)]

    period, prefix = draw(periods), draw(prefixes)
    fresh = torch.randint(FIRST_BYTE, LAST_BYTE + 1, (num_rows, length), generator=generator)
    places = torch.arange(length)[None]
    inside = (places - prefix[:, None]) % period[:, None] + prefix[:, None]
    index = torch.where(places < prefix[:, None], places.expand(num_rows, -1), inside)
    return Repeats(input_ids=fresh.gather(1, index), prefix=prefix, period=period)

"""Cases of a property that share a box, as rows to be bounded from below together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp.methods.bounds.property import Case, Numbers


@dataclass(frozen=True, eq=False)
class Goal:
    """What has to hold everywhere in one box: in every case, some row is positive.

    Attributes:
        lower, upper: the box, (num_inputs,) float64.
        rows, offsets: of all cases together: (R, num_outputs) and (R,).
        owner: (R,) which of the cases here a row belongs to.
        cases: the numbers of the cases in the property.
    """

    lower: Numbers
    upper: Numbers
    rows: Numbers
    offsets: Numbers
    owner: Tensor
    cases: tuple[int, ...]

    @property
    def num_cases(self) -> int:
        """How many cases share the box."""
        return len(self.cases)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The rows, (1, R, num_outputs)."""
        return torch.as_tensor(self.rows, dtype=dtype)[None]

    def shifts(self, dtype: torch.dtype) -> Tensor:
        """The offsets, (1, R)."""
        return torch.as_tensor(self.offsets, dtype=dtype)[None]

    def best(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """For each case its largest row, and which: (B, R) -> (B, num_cases) twice."""
        lowest = torch.finfo(values.dtype).min
        kept = torch.where(self._mine, values[:, None], lowest)
        most = kept.max(2)
        return most.values, most.indices

    @property
    def _mine(self) -> Tensor:
        """(1, num_cases, R) whether a row belongs to a case."""
        return (self.owner[None] == torch.arange(self.num_cases)[:, None])[None]

    def margin(self, y: Tensor) -> Tensor:
        """At most 0 where an output (B, num_outputs) is a counterexample: (B,)."""
        values = y @ self.matrix(y.dtype)[0].T + self.shifts(y.dtype)
        return self.best(values)[0].amin(1)


def goals(cases: Sequence[Case]) -> list[Goal]:
    """Cases gathered by box, in the order in which the boxes first appear."""
    together: dict[bytes, list[int]] = {}
    for number, case in enumerate(cases):
        together.setdefault(case.lower.tobytes() + case.upper.tobytes(), []).append(number)
    return [_goal([cases[i] for i in numbers], numbers) for numbers in together.values()]


def _goal(cases: list[Case], numbers: list[int]) -> Goal:
    owner = [i for i, case in enumerate(cases) for _ in case.offsets]
    return Goal(
        cases[0].lower,
        cases[0].upper,
        np.concatenate([c.rows for c in cases]),
        np.concatenate([c.offsets for c in cases]),
        torch.tensor(owner, dtype=torch.int64),
        tuple(numbers),
    )


def outward(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A box of float64 in another precision, no smaller."""
    low, high = lower.to(dtype), upper.to(dtype)
    if dtype != lower.dtype:
        low = torch.where(low > lower, torch.nextafter(low, torch.tensor(-torch.inf)), low)
        high = torch.where(high < upper, torch.nextafter(high, torch.tensor(torch.inf)), high)
    return low, high

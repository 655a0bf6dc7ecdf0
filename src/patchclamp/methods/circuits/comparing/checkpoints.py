"""Heads gained, lost and kept between two checkpoints of one architecture.

Each head's effect is measured on the same examples in both checkpoints, so that the
change of a head is a paired comparison; all heads are tested together.
Source: Park et al. 2025 (heads that emerge in post-training); the tests: sign flips with
the largest statistic of all heads (Westfall & Young 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.methods.statistics import bootstrap_mean

_FEWEST = 8
"""Examples below which sign flips cannot reach a p value of a few percent for many heads."""


class Change(StrEnum):
    """What became of a head."""

    GAINED = "gained"
    """No effect before, an effect after, and the two differ."""
    LOST = "lost"
    """An effect before, none after, and the two differ."""
    KEPT = "kept"
    """An effect in both, and no difference was shown."""
    CHANGED = "changed"
    """An effect in both, and they differ."""
    ABSENT = "absent"
    """No effect was shown in either."""
    UNCLEAR = "unclear"
    """An effect was shown in one only, but no difference, or the reverse."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointChanges:
    """What became of every head.

    Attributes:
        table: columns layer, head, before, before_low, before_high, p_before, after,
            after_low, after_high, p_after, difference, low, high, p, change.
        false_before, false_after: heads gained, lost or changed between two halves of the
            examples of *one* checkpoint: what the method finds where nothing changed.
    """

    table: pl.DataFrame
    false_before: int
    false_after: int

    def heads(self, change: Change) -> list[tuple[int, int]]:
        """(layer, head) of the heads with this verdict."""
        found = self.table.filter(pl.col("change") == str(change))
        return list(found.select("layer", "head").iter_rows())


@dataclass(frozen=True, kw_only=True)
class CheckpointDiff:
    """Which heads matter before, after, both or neither.

    A head has an effect if its mean over examples differs from 0 and is at least `minimum`
    times the largest mean effect of any head of that checkpoint. p values are two-sided,
    by flipping the signs of examples (of their differences, for the change), and hold for
    all heads together: each head's t statistic is compared with the largest of any head
    under the same flips. The same analysis between two halves of the examples of each
    checkpoint should find nothing and is reported beside the result.

    Shapes: effects (head, example), the same heads and examples in both.
    Units: those of the effects.
    Randomness: the sign flips and the bootstrap, by `seed`.
    Cost: num_flips x heads x examples additions; no forward pass.
    Raises: DataError for effects of different shapes, too few examples, NaN.
    Fails when: effects are far from symmetric around 0 in few examples; when the
        checkpoints do the task by other means than heads.
    Source: see the module docstring.
    """

    level: float = 0.05
    minimum: float = 0.05
    num_flips: int = 1999
    seed: int = 0

    def run(
        self,
        before: Float[Tensor, "head example"],
        after: Float[Tensor, "head example"],
        heads: Sequence[tuple[int, int]],
    ) -> CheckpointChanges:
        """Compare effects of the same heads on the same examples.

        Args:
            heads: (layer, head) of every row.
        """
        self._check(before, after, heads)
        old, new = before.double(), after.double()
        return CheckpointChanges(
            table=self._table(old, new, heads),
            false_before=self._false(old),
            false_after=self._false(new),
        )

    def _check(self, before: Tensor, after: Tensor, heads: Sequence[tuple[int, int]]) -> None:
        if self.num_flips + 1 < 1 / self.level:
            raise OptionError(
                f"{self.num_flips} sign flips cannot give p <= {self.level}",
                expected=f"at least {1 / self.level:.0f}",
            )
        if before.ndim != 2 or before.shape != after.shape or before.shape[0] != len(heads):
            raise DataError(
                "effects of two checkpoints must be of the same heads and examples",
                got=f"{tuple(before.shape)} and {tuple(after.shape)} for {len(heads)} heads",
                expected="(head, example) twice",
            )
        if before.shape[1] < _FEWEST:
            raise DataError(
                "too few examples to compare checkpoints",
                got=f"{before.shape[1]}",
                expected=f"at least {_FEWEST}",
            )
        for name, effects in (("first", before), ("second", after)):
            if not bool(torch.isfinite(effects).all()):
                raise DataError(f"the effects of the {name} checkpoint hold NaN or infinity")

    def _table(
        self, before: Tensor, after: Tensor, heads: Sequence[tuple[int, int]]
    ) -> pl.DataFrame:
        tested, changes = self._judged(before, after)
        listed = []
        for i, (layer, head) in enumerate(heads):
            row: dict[str, object] = {"layer": layer, "head": head}
            for name, values, p in zip(
                ("before", "after", "difference"),
                (before[i], after[i], (after - before)[i]),
                (p[i] for p in tested),
                strict=True,
            ):
                interval = bootstrap_mean(values, seed=self.seed)
                prefix = "" if name == "difference" else f"{name}_"
                row |= {
                    name: float(values.mean()),
                    f"{prefix}low": interval.low,
                    f"{prefix}high": interval.high,
                    "p" if name == "difference" else f"p_{name}": float(p),
                }
            row["change"] = str(changes[i])
            listed.append(row)
        return pl.DataFrame(listed)

    def _judged(self, before: Tensor, after: Tensor) -> tuple[list[Tensor], list[Change]]:
        """p of the effects before, after and of the difference; and the verdicts."""
        tested = [self._p(x) for x in (before, after, after - before)]
        shown = [
            (x.mean(1).abs() >= self.minimum * x.mean(1).abs().max()) & (p <= self.level)
            for x, p in zip((before, after), tested, strict=False)
        ]
        differs = (tested[2] <= self.level).tolist()
        each = zip(shown[0].tolist(), shown[1].tolist(), differs, strict=True)
        return tested, [_verdict(*three) for three in each]

    def _p(self, effects: Float[Tensor, "head example"]) -> Float[Tensor, "head"]:
        """Two-sided p of each head's mean, for all heads together."""
        num = effects.shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.num_flips, num), generator=generator).double() * 2 - 1
        squares = effects.square().mean(1)

        def statistic(mean: Tensor) -> Tensor:
            # the spread of flipped effects: their squares do not change
            spread = (squares - mean.square()).clamp(min=0).sqrt()
            floor = 1e-12 * squares.sqrt() + 1e-300
            return mean.abs() / torch.maximum(spread, floor)

        largest = statistic(signs @ effects.T / num).amax(1)
        own = statistic(effects.mean(1))
        hits = (largest[None] >= own[:, None] * (1 - 1e-9)).sum(1)
        return (1 + hits.double()) / (1 + self.num_flips)

    def _false(self, effects: Tensor) -> int:
        """Heads that two halves of the examples of one checkpoint seem to gain or lose."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(effects.shape[1], generator=generator)
        half = effects.shape[1] // 2
        first, second = effects[:, order[:half]], effects[:, order[half : 2 * half]]
        _, changes = self._judged(first, second)
        return sum(c in (Change.GAINED, Change.LOST, Change.CHANGED) for c in changes)


def _verdict(was: bool, now: bool, differs: bool) -> Change:
    match was, now, differs:
        case True, True, True:
            return Change.CHANGED
        case True, True, False:
            return Change.KEPT
        case False, True, True:
            return Change.GAINED
        case True, False, True:
            return Change.LOST
        case False, False, False:
            return Change.ABSENT
        case _:
            return Change.UNCLEAR

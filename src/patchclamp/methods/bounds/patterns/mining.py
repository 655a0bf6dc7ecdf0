"""Which units a class switches on, or off, in nearly all of its examples.

A unit belongs to a class's pattern as active (inactive) if it is active (inactive) in at least a
share delta of the class's examples that are mined. What the pattern is worth is then measured
on examples that were held out: how many of the class follow it, and how many of the others.

Source: Geng et al. 2023, arXiv 2210.16114, section 3.2 (delta-relaxed dominant patterns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.findings import Interval
from patchclamp.methods.bounds.patterns.pattern import Pattern, active_units, relu_sites
from patchclamp.methods.bounds.patterns.shares import binomial_lower, clopper_pearson
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """Hits among independent examples, with an interval."""

    hits: int
    num: int
    interval: Interval

    @property
    def value(self) -> float:
        """hits / num."""
        return self.hits / self.num

    @classmethod
    def of(cls, hits: Tensor, confidence: float) -> Share:
        """From which rows are hits."""
        num, total = int(hits.sum()), hits.numel()
        return cls(hits=num, num=total, interval=clopper_pearson(num, total, confidence))


@dataclass(frozen=True, kw_only=True, eq=False)
class MinedPattern:
    """A class's pattern and what it is worth.

    Attributes:
        pattern: the pattern; its label is the class.
        num_mined: examples of the class that it was mined from.
        lower: for each site, (unit): a lower bound of the share of the class for which the
            unit is in the pattern's state, 0 for free units. All of them hold together
            with the stated confidence, over the choice of the mined examples.
        recall: held-out examples of the class that follow the pattern.
        others: held-out examples of other classes that follow it (the fewer the better).
        precision: share of the class among the held-out examples that follow it; None if
            none does. It depends on how frequent the classes are.
    """

    pattern: Pattern
    num_mined: int
    lower: Mapping[str, Tensor]
    recall: Share
    others: Share
    precision: Share | None


@dataclass(frozen=True, kw_only=True)
class MinePatterns:
    """Dominant activation patterns of classes.

    Shapes: inputs (row, ...); labels (row).
    Randomness: which examples are held out, by `seed`; none where they are given.
    Cost: one forward pass over the examples.
    Raises: OptionError for options out of range; DataError for a class with too few examples.
    Fails when: the examples are not independent draws of what the pattern will meet (several
        by one writer, say): the intervals are then too narrow. Labels that are wrong for
        more than 1 - delta of a class's examples empty the pattern.
    Source: Geng et al. 2023; intervals: Clopper & Pearson 1934, for the units with Bonferroni.

    Attributes:
        delta: share of the mined examples in which a unit must be in one state; above 0.5.
        confidence: of every stated interval and bound.
        held_out: share of each class's examples that are kept for recall and precision.
        sites: what ReLUs read; all of them by default.
        seed: of the division.
    """

    delta: float = 0.99
    confidence: float = 0.95
    held_out: float = 0.3
    sites: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("delta", self.delta, 0.5, 1.0),
            ("confidence", self.confidence, 0.0, 1.0),
            ("held_out", self.held_out, 0.0, 1.0),
        ):
            if not (low < value < high or (name == "delta" and value == 1.0)):
                raise OptionError(
                    f"'{name}' is out of range", got=str(value), expected=f"above {low}, to {high}"
                )

    def run(
        self,
        net: Net,
        inputs: Tensor,
        labels: Int[Tensor, "row"],
        held_out: tuple[Tensor, Int[Tensor, "row"]] | None = None,
    ) -> dict[int, MinedPattern]:
        """The pattern of each class, by class.

        Args:
            held_out: other examples and their classes to measure recall and precision on;
                by default a part of the examples is put aside.
        """
        sites = self.sites or relu_sites(net)
        if len(labels) != len(inputs) or labels.ndim != 1:
            raise DataError(
                "labels that do not fit their inputs",
                got=f"{tuple(labels.shape)} for {len(inputs)} rows",
            )
        if held_out is None:
            aside = self._aside(labels)
            held_out = (inputs[aside], labels[aside])
            inputs, labels = inputs[~aside], labels[~aside]
        mined = active_units(net, inputs, sites)
        kept = active_units(net, held_out[0], sites)
        found = {}
        for label in labels.unique().tolist():
            of_class, of_kept = labels == label, held_out[1] == label
            if not bool(of_kept.any()) or bool(of_kept.all()):
                raise DataError(
                    f"recall of class {label} needs held-out examples in it and outside of it",
                    got=f"{int(of_kept.sum())} of {len(of_kept)}",
                )
            rows = {site: active[of_class] for site, active in mined.items()}
            found[label] = self._measured(label, rows, kept, of_kept)
        return found

    def _aside(self, labels: Tensor) -> Tensor:
        """Which rows are held out: the same share of every class."""
        generator = torch.Generator().manual_seed(self.seed)
        aside = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            rows = (labels == label).nonzero().flatten()
            num = round(self.held_out * len(rows))
            if not 0 < num < len(rows):
                raise DataError(
                    f"class {int(label)} has too few examples to hold some out",
                    got=f"{len(rows)} examples, of which {num} would be held out",
                )
            aside[rows[torch.randperm(len(rows), generator=generator)[:num]]] = True
        return aside

    def _measured(
        self, label: int, rows: Mapping[str, Tensor], kept: Mapping[str, Tensor], of_kept: Tensor
    ) -> MinedPattern:
        states, counts = {}, {}
        num = len(next(iter(rows.values())))
        for site, active in rows.items():
            on = active.sum(0)
            on_enough, off_enough = on >= self.delta * num, num - on >= self.delta * num
            states[site] = on_enough.to(torch.int8) - off_enough.to(torch.int8)
            counts[site] = torch.where(on_enough, on, num - on)
        pattern = Pattern(states, label)
        followed = pattern.held_by(kept)
        return MinedPattern(
            pattern=pattern,
            num_mined=num,
            lower={site: self._lower(pattern, site, counts[site], num) for site in states},
            recall=Share.of(followed[of_kept], self.confidence),
            others=Share.of(followed[~of_kept], self.confidence),
            precision=Share.of(of_kept[followed], self.confidence) if followed.any() else None,
        )

    def _lower(self, pattern: Pattern, site: str, counts: Tensor, num: int) -> Tensor:
        """One-sided bounds for all units at once, the free ones counted too: they were tried.

        Both states of every unit are candidates, so the level is shared among twice as many.
        """
        alpha = (1 - self.confidence) / (2 * pattern.num_units)
        made = {n: binomial_lower(n, num, alpha) for n in counts.unique().tolist()}
        lower = torch.tensor([made[n] for n in counts.tolist()], dtype=torch.float64)
        return torch.where(pattern.states[site] != 0, lower, 0.0)

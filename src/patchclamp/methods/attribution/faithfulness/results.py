"""What a measure of faithfulness found, and whether it depends on how things were removed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, nearest
from patchclamp.core.findings import Interval, Json
from patchclamp.methods.scoring import Passes
from patchclamp.methods.statistics import bootstrap_mean, wilson

RANDOM = "random"
"""The name of the control: the first map, moved to a random place."""


class Verdict(StrEnum):
    """How one map compares with another, over all examples."""

    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over examples, with its 95% interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two maps, with each baseline.

    Attributes:
        first, second: names of the maps.
        verdicts: on the first, by baseline.
        flips: the verdict is not the same with all baselines.
        flipped: share of the examples on which the better map depends on the baseline.
        flipped_interval: of that.
    """

    first: str
    second: str
    verdicts: dict[str, Verdict]
    flips: bool
    flipped: float
    flipped_interval: Interval


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Whether baselines say the same.

    Attributes:
        correlations: (map, baseline, baseline) -> rank correlation over examples; left out
            where there are fewer than three, or all have one value.
        comparisons: of all pairs of maps.
    """

    correlations: dict[tuple[str, str, str], float]
    comparisons: tuple[Comparison, ...]

    @property
    def flips(self) -> tuple[Comparison, ...]:
        """The comparisons that depend on the baseline."""
        return tuple(c for c in self.comparisons if c.flips)


@dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """One measure of several maps with several baselines.

    Shapes: values (map, baseline, example); curves (map, baseline, example, point); scores
        (example,); all in the order of the names.

    Attributes:
        metric: its name.
        options: it was run with.
        higher_is_better: which way `values` go.
        maps: names, the control last.
        baselines: names of what was put in the place of what was removed.
        values: the measure.
        curves: scores while more and more is removed; None for measures without.
        fractions: of the places that were removed (or put back) at each point.
        scores: the target on the inputs.
        seed: of draws and intervals.
        passes: rows that went through the network.
    """

    metric: str
    options: dict[str, Json]
    higher_is_better: bool
    maps: tuple[str, ...]
    baselines: tuple[str, ...]
    values: Tensor
    curves: Tensor | None = None
    fractions: Tensor | None = None
    scores: Tensor
    seed: int
    passes: Passes

    def of(self, map_name: str, baseline: str) -> Tensor:
        """The measure of each example: (example,)."""
        return self.values[_at(map_name, self.maps), _at(baseline, self.baselines)]

    def mean(self, map_name: str, baseline: str) -> Estimate:
        """Over examples, with a bootstrap interval."""
        values = self.of(map_name, baseline)
        interval = bootstrap_mean(values, seed=self.seed)
        return Estimate(value=float(values.double().mean()), interval=interval)

    def advantage(self, first: str, second: str, baseline: str) -> Estimate:
        """By how much the first map is better, example by example; negative where it is worse."""
        values = self._advantages(first, second, baseline)
        interval = bootstrap_mean(values, seed=self.seed)
        return Estimate(value=float(values.mean()), interval=interval)

    def verdict(self, first: str, second: str, baseline: str) -> Verdict:
        """Better or worse only where the interval of the advantage holds no 0."""
        if self.values.shape[2] < 2:  # one example has no interval
            return Verdict.UNDECIDED
        interval = self.advantage(first, second, baseline).interval
        if interval.low > 0:
            return Verdict.BETTER
        return Verdict.WORSE if interval.high < 0 else Verdict.UNDECIDED

    def disagreement(self) -> Disagreement:
        """Whether it matters what was put in the place of what was removed."""
        correlations = {}
        for name in self.maps:
            for a, b in combinations(self.baselines, 2):
                made = rank_correlation(self.of(name, a), self.of(name, b))
                if made is not None:
                    correlations[name, a, b] = made
        comparisons = tuple(self._compared(a, b) for a, b in combinations(self.maps, 2))
        return Disagreement(correlations=correlations, comparisons=comparisons)

    def _advantages(self, first: str, second: str, baseline: str) -> Tensor:
        gain = self.of(first, baseline).double() - self.of(second, baseline).double()
        return gain if self.higher_is_better else -gain

    def _compared(self, first: str, second: str) -> Comparison:
        verdicts = {b: self.verdict(first, second, b) for b in self.baselines}
        signs = torch.stack([self._advantages(first, second, b).sign() for b in self.baselines])
        differ = ((signs > 0).any(0) & (signs < 0).any(0)).sum()
        num = signs.shape[1]
        return Comparison(
            first=first,
            second=second,
            verdicts=verdicts,
            flips=len(set(verdicts.values())) > 1,
            flipped=int(differ) / num,
            flipped_interval=wilson(int(differ), num),
        )


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's, with ties at their mean rank; None for fewer than three or for equal values."""
    if len(a) < 3 or a.unique().numel() == 1 or b.unique().numel() == 1:
        return None
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def _ranks(x: Tensor) -> Tensor:
    below = (x[:, None] > x[None]).sum(1).double()
    equal = (x[:, None] == x[None]).sum(1).double()
    return below + (equal - 1) / 2


def _at(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise OptionError(
            f"no '{name}' was measured",
            expected="one of " + ", ".join(names),
            nearest=nearest(name, names),
        )
    return names.index(name)

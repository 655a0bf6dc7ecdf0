"""Selectivity of units to classes: how well one unit alone tells a class from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.core.errors import DataError

_Z95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class SelectivityResult:
    """One row a unit.

    Attributes:
        best: the class that the unit prefers, chosen on one half of the groups.
        auroc: area under the ROC curve for that class against the rest, on the other half.
        low, high: 95% interval of the area, with rows of one group dependent.
        p: share of label shuffles, each with its own choice of class, that reach this area.
        p_family: share of shuffles in which *any* unit reaches it: corrected for all units.
        null_high, null_mean: 95% quantile and mean of the largest area of any unit under
            shuffled labels.
        num_groups: independent groups that the area was measured on.
        num_shuffles: how many shuffles p and null_high come from.
    """

    best: Int[Tensor, "unit"]
    auroc: Float[Tensor, "unit"]
    low: Float[Tensor, "unit"]
    high: Float[Tensor, "unit"]
    p: Float[Tensor, "unit"]
    p_family: Float[Tensor, "unit"]
    null_high: float
    null_mean: float
    num_groups: int
    num_shuffles: int


@dataclass(frozen=True, kw_only=True)
class Selectivity:
    """Area under the ROC curve of each unit for the class it prefers, with a shuffled-label null.

    The class is chosen on one half of the groups (images, or texts whose tokens hang
    together) and the area measured on the other, so that choosing among many classes
    cannot inflate it. The interval treats rows of one group as dependent. The null
    repeats choice and measurement with labels shuffled over groups where all rows of a
    group have one label (images, labelled texts), or else with each group's labels turned
    by a random offset, which keeps neighbouring tokens alike.

    Shapes: activations (row, unit), labels (row; negative: of no class), groups (row);
        results (unit).
    Units: area in 0..1; .5 is chance.
    Randomness: the split and the shuffles, by `seed`.  Cost: shuffles x rows x units x classes.
    Raises: DataError for fewer than two classes with 4 rows in each half.
    Fails when: a unit answers to a mixture of classes: no one-against-the-rest area shows it.
    Source: Hanley & McNeil 1982 (area); Obuchowski 1997 (clustered variance);
        Westfall & Young 1993 (largest statistic over all units).
    """

    shuffles: int = 200
    seed: int = 0

    def run(
        self,
        activations: Float[Tensor, "row unit"],
        labels: Int[Tensor, "row"],
        groups: Int[Tensor, "row"],
    ) -> SelectivityResult:
        """Measure every unit; see the class."""
        generator = torch.Generator().manual_seed(self.seed)
        halves = _halves(groups, generator)
        first, second = halves[0], halves[1]
        classes = _usable(labels, halves)
        ranks = (_ranks(activations[first]), _ranks(activations[second]))
        best, area = self._chosen(ranks, labels[first], labels[second], classes)
        drawn = torch.empty(self.shuffles, activations.shape[1], dtype=torch.float64)
        for i in range(self.shuffles):
            shuffled = _shuffled(labels, groups, generator)
            drawn[i] = self._chosen(ranks, shuffled[first], shuffled[second], classes)[1]
        largest = drawn.max(1).values
        p = (1 + (drawn >= area).sum(0)).double() / (1 + self.shuffles)
        low, high = torch.zeros_like(area), torch.ones_like(area)
        for number, c in enumerate(classes.tolist()):
            units = (best == number).nonzero()[:, 0]
            if units.numel():
                low[units], high[units] = area_interval(
                    activations[second][:, units], labels[second] == c, groups[second], area[units]
                )
        return SelectivityResult(
            best=classes[best],
            auroc=area,
            low=low,
            high=high,
            p=p,
            p_family=(1 + (largest[:, None] >= area).sum(0)).double() / (1 + self.shuffles),
            null_high=float(largest.quantile(0.95)),
            null_mean=float(largest.mean()),
            num_groups=int(groups[second].unique().numel()),
            num_shuffles=self.shuffles,
        )

    def _chosen(
        self,
        ranks: tuple[Tensor, Tensor],
        first: Int[Tensor, "half"],
        second: Int[Tensor, "half"],
        classes: Int[Tensor, "class"],
    ) -> tuple[Tensor, Tensor]:
        """Best class by the first half, its area on the second."""
        best = areas(ranks[0], first, classes).argmax(1)
        return best, areas(ranks[1], second, classes).gather(1, best[:, None])[:, 0]


def areas(
    ranks: Float[Tensor, "row unit"], labels: Int[Tensor, "row"], classes: Int[Tensor, "class"]
) -> Float[Tensor, "unit class"]:
    """Area under the ROC curve of every unit for every class, from mid-ranks (Mann-Whitney)."""
    member = (labels[:, None] == classes).to(ranks)
    inside = member.sum(0)
    outside = ranks.shape[0] - inside
    total = ranks.T @ member
    return (total - inside * (inside + 1) / 2) / (inside * outside).clamp(min=1)


def _ranks(values: Float[Tensor, "row unit"]) -> Float[Tensor, "row unit"]:
    """Mid-ranks along rows: ties share the mean of their ranks."""
    ordered, order = values.sort(0)
    n = values.shape[0]
    position = torch.arange(1, n + 1, dtype=torch.float64)[:, None].expand(n, values.shape[1])
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    run = new.cumsum(0) - 1
    size = torch.zeros(n, values.shape[1], dtype=torch.float64)
    size.scatter_add_(0, run, torch.ones_like(size))
    total = torch.zeros_like(size).scatter_add_(0, run, position)
    middle = (total / size.clamp(min=1)).gather(0, run)
    return torch.empty_like(middle).scatter_(0, order, middle)


def clustered_deviation(
    values: Float[Tensor, "row unit"], member: Bool[Tensor, "row"], groups: Int[Tensor, "row"]
) -> Float[Tensor, "unit"]:
    """Standard deviation of areas whose rows come in dependent groups (Obuchowski 1997).

    Shapes: values (row, unit); member (row), true for the class; groups (row).
    """
    num_in, num_out = int(member.sum()), int((~member).sum())
    whole = _ranks(values)
    placed_in = (whole[member] - _ranks(values[member])) / num_out
    placed_out = 1 - (whole[~member] - _ranks(values[~member])) / num_in
    area = placed_in.mean(0)
    _, cluster = groups.unique(return_inverse=True)
    num = int(cluster.max()) + 1

    def sums(at: Tensor, placed: Tensor) -> Tensor:
        zero = torch.zeros(num, values.shape[1], dtype=torch.float64)
        return zero.index_add(0, cluster[at], placed - area)

    off_in, off_out = sums(member, placed_in), sums(~member, placed_out)
    held_in, held_out = cluster[member].unique().numel(), cluster[~member].unique().numel()
    variance_in = held_in / max(held_in - 1, 1) / num_in * (off_in**2).sum(0) / num_in
    variance_out = held_out / max(held_out - 1, 1) / num_out * (off_out**2).sum(0) / num_out
    shared = num / max(num - 1, 1) * (off_in * off_out).sum(0) / (num_in * num_out)
    deviation: Tensor = (variance_in + variance_out + 2 * shared).clamp(min=0).sqrt()
    return deviation


def area_interval(
    values: Float[Tensor, "row unit"],
    member: Bool[Tensor, "row"],
    groups: Int[Tensor, "row"],
    area: Float[Tensor, "unit"],
) -> tuple[Float[Tensor, "unit"], Float[Tensor, "unit"]]:
    """95% interval of areas: normal, but exact where the class is separated completely.

    There the estimated variance is zero however few rows there are; the limit is that of
    as many successes out of as many independent groups (Clopper & Pearson 1934).
    """
    spread = _Z95 * clustered_deviation(values, member, groups)
    low, high = (area - spread).clamp(0, 1), (area + spread).clamp(0, 1)
    fewest = min(groups[member].unique().numel(), groups[~member].unique().numel())
    limit = 0.025 ** (1 / fewest)
    return low.masked_fill(area == 1, limit), high.masked_fill(area == 0, 1 - limit)


def _halves(groups: Int[Tensor, "row"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    names = groups.unique()
    order = torch.randperm(names.numel(), generator=generator)
    first = torch.isin(groups, names[order[: names.numel() // 2]])
    return first.nonzero()[:, 0], (~first).nonzero()[:, 0]


def _usable(labels: Int[Tensor, "row"], halves: tuple[Tensor, Tensor]) -> Int[Tensor, "class"]:
    """Classes with at least 4 rows inside and outside in both halves; negatives are no class."""
    classes = labels[labels >= 0].unique()
    enough = torch.ones(classes.numel(), dtype=torch.bool)
    for half in halves:
        count = (labels[half][:, None] == classes).sum(0)
        enough &= (count >= 4) & (half.numel() - count >= 4)
    if int(enough.sum()) < 2:
        raise DataError(
            "selectivity needs two classes with 4 rows in each half of the data",
            got=f"{int(enough.sum())} such classes",
            hint="give more rows",
        )
    usable: Tensor = classes[enough]
    return usable


def _shuffled(
    labels: Int[Tensor, "row"], groups: Int[Tensor, "row"], generator: torch.Generator
) -> Int[Tensor, "row"]:
    """Labels without their tie to the rows: permuted over groups, or turned within each group."""
    names, cluster, sizes = groups.unique(return_inverse=True, return_counts=True)
    of_group = torch.zeros_like(names).scatter(0, cluster, labels)
    if torch.equal(of_group[cluster], labels):  # turning would give every label back
        return of_group[torch.randperm(names.numel(), generator=generator)][cluster]
    made = labels.clone()
    for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
        at = (groups == name).nonzero()[:, 0]
        turn = int(torch.randint(1, max(size, 2), (1,), generator=generator))
        made[at] = labels[at].roll(turn)
    return made

"""What breaks when a group of units is taken away, against random groups of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.edit_kinds import Mean
from patchclamp.core.edits import Edit
from patchclamp.core.findings import Interval, Json, Null
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import Tap
from patchclamp.methods.material import Material, Score, num_rows, scores
from patchclamp.methods.neurons.activity import flat, unit_axes
from patchclamp.methods.statistics import bootstrap_mean, permutation_null
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that are ablated together.

    Attributes:
        name: "mlp.3.post", "attn.3.z head 2", "conv1 channels 0-7".
        kind: what is compared with what: groups of one kind share their nulls where
            they have the same size ("layer", "head", "unit", "channel group").
        members: site -> numbers of its flattened units.
        pool: site -> numbers that a random group of the same size is drawn from.
    """

    name: str
    kind: str
    members: Mapping[str, tuple[int, ...]]
    pool: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """How many units."""
        return sum(len(units) for units in self.members.values())

    @property
    def null_key(self) -> tuple[object, ...]:
        """Groups with this key share their random groups."""
        pool = tuple((site, len(units)) for site, units in sorted(self.pool.items()))
        return self.kind, self.size, pool


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The effect of ablating one group.

    Attributes:
        effect: mean over rows of score(ablated) - score(plain): positive is harm.
        interval: of that mean.
        null: the same for random groups of the same size from the pool.
        edits: what was done, as data.
    """

    group: Group
    effect: float
    interval: Interval
    null: Null
    edits: tuple[dict[str, Json], ...]


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """All groups that the time allowed, and the names of those it did not."""

    done: list[Importance] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    plain: float = 0.0
    num_nulls: int = 0
    seconds_each: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Mean ablation of groups of units, each against random groups of the same size.

    Units are set to their mean over rows and positions of the data. A random group is
    drawn from the pool of its kind (the same layer, or all layers), so that the null
    answers: is it *this* group, or would any group of this size do? The groups share
    nulls of the same kind, size and pool.

    Shapes: none returned as tensors; see `Importance`.
    Units: those of the score; positive is harm.
    Randomness: the random groups and the bootstrap, by `seed`.
    Cost: (groups + nulls per kind) forward passes over the data; fewer nulls, but at least
        `min_nulls`, where time is short; groups that do not fit are named, in order.
    Fails when: another group steps in for the ablated one (backup): effects are lower bounds.
    Source: mean ablation as in Wang et al. 2022; the p value, Phipson & Smyth 2010.
    """

    num_nulls: int = 99
    min_nulls: int = 20
    batch_size: int = 64
    seed: int = 0

    def run(
        self,
        net: Net,
        material: Material,
        score: Score,
        groups: Sequence[Group],
        *,
        seconds: float = float("inf"),
        progress: Progress = SILENT,
    ) -> AblationResult:
        """Ablate every group until the time is used up; the rest is named in `skipped`."""
        deadline = time.monotonic() + seconds
        sites = sorted({s for g in groups for s in (*g.members, *g.pool)})
        means = unit_means(net, material, sites, self.batch_size)
        plain = scores(net, material, score, batch_size=self.batch_size)
        nulls: dict[tuple[object, ...], Tensor] = {}
        generator = torch.Generator().manual_seed(self.seed)

        def effects_of(members: Mapping[str, tuple[int, ...]]) -> Float[Tensor, "row"]:
            edits = ablations(net, members, means)
            edited = scores(net, material, score, edits=edits, batch_size=self.batch_size)
            return edited - plain

        each = (
            _seconds(lambda: [effects_of(d) for d in _random_groups(groups[0], 2, generator)]) / 2
        )
        num_nulls = self._affordable(groups, deadline - time.monotonic(), each)
        result = AblationResult(plain=float(plain.mean()), num_nulls=num_nulls, seconds_each=each)
        progress.start("ablations", len(groups), "groups")
        for number, group in enumerate(groups):
            runs = 1 if group.null_key in nulls else 1 + num_nulls
            if time.monotonic() + runs * each > deadline:
                result.skipped.extend(g.name for g in groups[number:])
                break
            if group.null_key not in nulls:
                drawn = _random_groups(group, num_nulls, generator)
                nulls[group.null_key] = torch.stack([effects_of(d).mean() for d in drawn])
            effects = effects_of(group.members)
            effect = float(effects.mean())
            result.done.append(
                Importance(
                    group=group,
                    effect=effect,
                    interval=bootstrap_mean(effects, seed=self.seed),
                    null=permutation_null(
                        effect,
                        nulls[group.null_key],
                        f"mean ablation of {group.size} random units of the same pool",
                    ),
                    edits=tuple(_described(e) for e in ablations(net, group.members, means)),
                )
            )
            progress.advance()
        progress.finish()
        return result

    def _affordable(self, groups: Sequence[Group], seconds: float, each: float) -> int:
        """As many random groups for each null as the time allows, between the two limits."""
        num_nulls = len({g.null_key for g in groups})
        spare = 0.6 * min(seconds, 1e9) / max(each, 1e-9) - len(groups)
        return int(min(self.num_nulls, max(self.min_nulls, spare / num_nulls)))


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def unit_means(
    net: Net, material: Material, sites: Sequence[str], batch_size: int
) -> dict[str, Float[Tensor, "unit"]]:
    """Mean of every flattened unit over rows and positions, for mean ablation.

    Positions outside the material's mask do not count, where a site has positions.
    """
    taps = {tap.label: tap for tap in net.taps(sites)}
    sums: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    start = 0
    for batch in net.batches(material.call, batch_size):
        acts = net.record(batch, sites)
        stop = start + num_rows(net, batch)
        for label, tap in taps.items():
            whole = flat(acts.tensor(label), tap, unit_axes(tap))
            masked = material.mask if "position" in tap.axes else None
            if masked is not None and masked.shape[1] == whole.shape[1]:
                x = whole[masked[start:stop]]
            else:
                x = whole.flatten(0, 1)
            sums[label] = sums.get(label, torch.zeros(x.shape[1])) + x.sum(0)
            count[label] = count.get(label, 0) + x.shape[0]
        start = stop
    return {label: sums[label] / count[label] for label in taps}


def ablations(
    net: Net, members: Mapping[str, tuple[int, ...]], means: Mapping[str, Tensor]
) -> list[Edit]:
    """Mean ablation of flattened units as edits: one for each site, or for each of its heads."""
    edits: list[Edit] = []
    for site, units in members.items():
        tap = net.taps(site)[0]
        axes = unit_axes(tap)
        if len(axes) == 1:
            edits.append(_mean_edit(tap, means[site][list(units)], {axes[0]: list(units)}))
            continue
        size = int(tap.shape[tap.axes.index(axes[1])])
        for head in sorted({u // size for u in units}):
            own = [u for u in units if u // size == head]
            where: dict[str, object] = {axes[0]: head, axes[1]: [u % size for u in own]}
            edits.append(_mean_edit(tap, means[site][own], where))
    return edits


def _mean_edit(tap: Tap, mean: Tensor, where: Mapping[str, object]) -> Mean:
    unit = tap.unit_axis
    shape = [mean.numel() if a == unit else 1 for a in tap.axes]
    return Mean(site=tap.label, values=mean.reshape(shape), where=where)  # type: ignore[arg-type]  # indices by axis


def _described(edit: Edit) -> dict[str, Json]:
    """The edit as data, with its reference values named rather than listed."""
    data = edit.to_dict()
    data["values"] = "mean over rows and positions of the data"
    return data


def _random_groups(
    group: Group, num: int, generator: torch.Generator
) -> list[dict[str, tuple[int, ...]]]:
    pool = [(site, unit) for site, units in sorted(group.pool.items()) for unit in units]
    drawn = []
    for _ in range(num):
        picked = torch.randperm(len(pool), generator=generator)[: group.size]
        members: dict[str, list[int]] = {}
        for i in picked.tolist():
            members.setdefault(pool[i][0], []).append(pool[i][1])
        drawn.append({site: tuple(sorted(units)) for site, units in members.items()})
    return drawn

"""What every unit does over a dataset: how strong, how often, how alike, driven by what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import Tap
from patchclamp.methods.material import Material, RowKind
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class SiteActivity:
    """One site's units over a dataset.

    Attributes:
        tap: the site.
        axes: axes that number the units: ("unit",), ("channel",) or ("head", "unit").
        values: (observation, unit): one observation a row, or a token of a row.
        group: (observation,) the row it comes from.
        position: (observation,) the token's position (0 for images).
        peak: (row, unit) strongest value of each row.
        table: one row a unit; see `Activity`.
    """

    tap: Tap
    axes: tuple[str, ...]
    values: Float[Tensor, "observation unit"]
    group: Int[Tensor, "observation"]
    position: Int[Tensor, "observation"]
    peak: Float[Tensor, "row unit"]
    table: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Mean, variance, sparsity, dead and dense units of sites.

    Table columns: `site`, `unit`, `mean`, `std`, `peak` (largest value), `active` (share of
    values above zero), `sparsity` (lifetime sparsity, 0 for a unit that always answers
    alike, 1 for one that answers once), `dead` (never moves: its range is under 1e-6 of
    the site's largest value, or, in a rectified site, it is never above zero), `dense`
    (in a rectified site, above zero in more than `dense_above` of all values).
    Positions of an image are pooled by their mean into the observation that other
    methods read, while mean, variance, peak and activity are over all positions.

    Shapes: see `SiteActivity`.
    Units: those of the site.
    Randomness: none.  Cost: one forward pass over the data, values of one site at a time in memory.
    Raises: SiteError for a site without a batch or unit axis.
    Fails when: the data lacks what drives a unit; "dead" always means dead on this data.
    Source: sparsity, Vinje & Gallant 2000 (Treves & Rolls 1991).
    """

    batch_size: int = 64
    dense_above: float = 0.9
    max_observations: int = 4096

    def run(
        self, net: Net, material: Material, taps: Sequence[Tap], progress: Progress = SILENT
    ) -> list[SiteActivity]:
        """Measure the units of every site, all sites in one pass."""
        held = {tap.label: _Gathered(tap, material, self.max_observations) for tap in taps}
        progress.start("activity of units", material.num, "rows")
        start = 0
        labels = [tap.label for tap in taps]
        for batch in net.batches(material.call, self.batch_size):
            acts = net.record(batch, labels)
            rows = 0
            for tap in taps:
                rows = held[tap.label].add(acts.tensor(tap.label), start)
            start += rows
            progress.advance(rows)
        progress.finish()
        return [gathered.result(self.dense_above) for gathered in held.values()]


class _Gathered:
    """Sums and observations of one site, batch by batch."""

    def __init__(self, tap: Tap, material: Material, max_observations: int) -> None:
        self.tap = tap
        self.unit_axes = unit_axes(tap)
        self.by_token = material.kind is RowKind.TEXT and "position" in tap.axes
        self.mask = material.mask
        self.limit = max_observations
        self.count = 0
        self.sums: list[Tensor] = []
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.parts: list[Tensor] = []
        self.groups: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.peaks: list[Tensor] = []
        self.kept = 0

    def add(self, value: Tensor, start: int) -> int:
        """Take one batch; returns how many rows it had."""
        x = flat(value, self.tap, self.unit_axes)  # (row, place, unit)
        rows, places, _ = x.shape
        counted = torch.ones(rows, places, dtype=torch.bool)
        if self.mask is not None and self.by_token and self.mask.shape[1] == places:
            counted = self.mask[start : start + rows]
        every = x[counted].double()
        moments = [every.sum(0), (every**2).sum(0), (every > 0).sum(0).double(), every.abs().sum(0)]
        so_far = self.sums or [torch.zeros_like(m) for m in moments]
        self.sums = [a + b for a, b in zip(so_far, moments, strict=True)]
        self.count += every.shape[0]
        low, high = every.min(0).values, every.max(0).values
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        hidden = x.masked_fill(~counted[..., None], -torch.inf)
        self.peaks.append(hidden.max(1).values)
        if self.kept < self.limit:
            self._observe(x, counted, start)
        return rows

    def _observe(self, x: Tensor, counted: Tensor, start: int) -> None:
        rows, places, _ = x.shape
        group = torch.arange(start, start + rows)[:, None].expand(rows, places)
        place = torch.arange(places)[None].expand(rows, places)
        if self.by_token:
            made, group, place = x[counted], group[counted], place[counted]
        else:
            made, group, place = x.mean(1), group[:, 0], torch.zeros(rows, dtype=torch.long)
        self.parts.append(made)
        self.groups.append(group)
        self.positions.append(place)
        self.kept += made.shape[0]

    def result(self, dense_above: float) -> SiteActivity:
        total, squares, active, strength = self.sums
        if self.low is None or self.high is None:
            raise RuntimeError("no batch was added")
        n = self.count
        mean = total / n
        variance = (squares / n - mean**2).clamp(min=0)
        even = 1 - (strength / n) ** 2 / (squares / n).clamp(min=1e-300)
        sparsity = even / (1 - 1 / n) if n > 1 else torch.zeros_like(even)
        still = squares == 0
        rectified = bool((self.low >= 0).all())
        scale = float(torch.maximum(self.low.abs(), self.high.abs()).max())
        dead = ((self.high - self.low) <= 1e-6 * scale) & (n > 1)  # one value cannot move
        if rectified:
            dead = dead | (self.high <= 0)
        dense = (active / n > dense_above) & ~dead & rectified
        table = pl.DataFrame(
            {
                "site": [self.tap.label] * mean.numel(),
                "unit": unit_names(self.tap, self.unit_axes),
                "mean": mean.numpy(),
                "std": variance.sqrt().numpy(),
                "peak": self.high.numpy(),
                "active": (active / n).numpy(),
                "sparsity": sparsity.clamp(0, 1).masked_fill(still, 1.0).numpy(),
                "dead": dead.numpy(),
                "dense": dense.numpy(),
            }
        )
        return SiteActivity(
            tap=self.tap,
            axes=self.unit_axes,
            values=torch.cat(self.parts)[: self.limit].float(),
            group=torch.cat(self.groups)[: self.limit],
            position=torch.cat(self.positions)[: self.limit],
            peak=torch.cat(self.peaks).float(),
            table=table,
        )


def unit_axes(tap: Tap) -> tuple[str, ...]:
    """The axes that number a site's units: heads and units together, or the unit axis alone."""
    return tuple(a for a in tap.axes if a in ("head", "kv_head", "unit", "channel"))


def unit_names(tap: Tap, axes: Sequence[str]) -> list[str]:
    """`7`, or `head 2 unit 7`, in the order of the flattened units."""
    sizes = [int(tap.shape[tap.axes.index(a)]) for a in axes]
    if len(axes) == 1:
        return [str(i) for i in range(sizes[0])]
    return [f"{axes[0]} {i} {axes[1]} {j}" for i in range(sizes[0]) for j in range(sizes[1])]


def flat(value: Tensor, tap: Tap, axes: Sequence[str]) -> Float[Tensor, "row place unit"]:
    """Batch first, units last, everything between them as places."""
    units = [tap.axes.index(a) for a in axes]
    batch = tap.axes.index("batch")
    places = [i for i in range(value.ndim) if i not in (batch, *units)]
    moved = value.permute(batch, *places, *units)
    num = 1
    for a in units:
        num *= value.shape[a]
    return moved.reshape(value.shape[batch], -1, num)


def strongest(activity: SiteActivity, unit: int, num: int) -> Iterator[tuple[int, float]]:
    """The rows that drive a unit most: (row, peak), strongest first."""
    found = activity.peak[:, unit].topk(min(num, activity.peak.shape[0]))
    yield from zip(found.indices.tolist(), found.values.tolist(), strict=True)

"""A head squeezed to a few directions, and what survives of a task.

From activations on a task: the few directions of a head's queries, keys or values that
the task uses, and how much of the task survives when the rest is taken away; also on a
broader distribution, because directions that suffice for a task are only a partial
account of a head.
Source: Lieberum et al. 2023 (compressing a head, and where that falls short).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.edit_kinds import Patch
from patchclamp.core.edits import Edit
from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.findings import Interval, Null
from patchclamp.engine.targets import Metric
from patchclamp.methods.circuits.checking.measuring import metric_rows
from patchclamp.methods.circuits.heads.weights import key_head
from patchclamp.methods.statistics import bootstrap_mean, permutation_null
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class Survival:
    """What survives at one rank, on one distribution.

    Attributes:
        share: (metric - metric at rank 0) / (metric untouched - metric at rank 0), of means;
            None where the head does not matter (on the broad distribution), and then no null.
        variance: share of the task's variance of these activations within the directions.
        null: the share at as many random directions around the same mean.
        edits: what was done, as data.
    """

    rank: int
    distribution: str
    metric: float
    interval: Interval
    share: float | None
    variance: float
    null: Null | None
    edits: tuple[Edit, ...]


@dataclass(frozen=True, kw_only=True)
class HeadCompression:
    """A head's queries, keys or values squeezed to the top directions that a task uses.

    The directions are the principal components of the head's activations on the task, at
    `positions` (all if None). The edit keeps their mean and the part along the top
    directions: rank 0 leaves the mean only, full rank leaves everything. Curves are also
    measured on `broad`, with the directions and the mean of the task. Where query heads
    share keys and values, squeezing those of a head squeezes them for all that share.

    Shapes: a row of the table for each (rank, distribution).
    Units: those of the metric; `share` is 1 for the untouched head and 0 for its mean.
    Randomness: the null's directions and the bootstrap, by `seed`.
    Cost: (ranks x (1 + num_nulls) + 2) forward passes over each distribution.
    Raises: OptionError for an unknown slot or rank; DataError where the head does not matter
        on the task (its mean does as well), so that there is nothing to survive.
    Fails when: the task is narrow: directions that suffice on it are a partial account;
        compare the curve on `broad`. Positions are the same ones in every row.
    Source: see the module docstring.
    """

    layer: int
    head: int
    slot: str = "v"
    ranks: Sequence[int] = (1, 2, 4, 8)
    positions: Sequence[int] | None = None
    num_nulls: int = 20
    seed: int = 0

    def run(
        self,
        net: Net,
        inputs: object,
        metric: Metric,
        *,
        broad: tuple[object, Metric] | None = None,
    ) -> list[Survival]:
        """Survival at every rank on the task, then on `broad`."""
        site, axis, index, size = self._site(net)
        task = self._recorded(net, site, inputs, index).flatten(0, 1)
        mean = task.mean(0)
        spread, vectors = torch.linalg.eigh((task - mean).double().T @ (task - mean).double())
        variance = spread.flip(0).clamp(min=0).cumsum(0) / spread.sum().clamp(min=1e-30)
        generator = torch.Generator().manual_seed(self.seed)
        bases = [vectors.flip(1).T.to(task)] + [
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=task.dtype))[0]
            for _ in range(self.num_nulls)
        ]
        made = []
        for name, (given, scored) in {"task": (inputs, metric), **_named(broad)}.items():
            part = self._recorded(net, site, given, index)

            def squeezed(directions: Tensor, part: Tensor = part) -> list[Edit]:
                kept = mean + (part - mean) @ directions.T @ directions
                where = {axis: [index], **self._where()}
                return [Patch(site=site, values=kept.unsqueeze(2), where=where)]

            made += self._curve(net, name, (given, scored), squeezed, bases, variance)
        return made

    def _curve(
        self,
        net: Net,
        name: str,
        distribution: tuple[object, Metric],
        squeezed: Callable[[Tensor], list[Edit]],
        bases: Sequence[Float[Tensor, "rank unit"]],
        variance: Float[Tensor, "rank"],
    ) -> list[Survival]:
        """All ranks on one distribution; `bases` holds the task's directions, then random ones."""
        inputs, metric = distribution
        nothing = metric_rows(net, inputs, metric, squeezed(bases[0][:0]))
        lost = metric_rows(net, inputs, metric) - nothing
        matters = _matters(lost)
        if name == "task" and not matters:
            raise DataError(
                f"the {self.slot} of head {self.layer}.{self.head} does not matter here",
                got=f"'{metric.name}' moves by {float(lost.mean()):.1e}, within its error, "
                "when it is held at its mean",
                hint="choose a head, slot and positions whose ablation has an effect",
            )
        made = []
        for rank in self.ranks:
            edits = squeezed(bases[0][:rank])
            rows = metric_rows(net, inputs, metric, edits)
            share, null = None, None
            if matters:
                share = _share(rows, nothing, lost)
                drawn = [
                    _share(metric_rows(net, inputs, metric, squeezed(q[:rank])), nothing, lost)
                    for q in bases[1:]
                ]
                kind = f"{rank} random directions"
                null = permutation_null(share, torch.tensor(drawn), kind)
            made.append(
                Survival(
                    rank=rank,
                    distribution=name,
                    metric=float(rows.mean()),
                    interval=bootstrap_mean(rows, seed=self.seed),
                    share=share,
                    variance=float(variance[rank - 1]),
                    null=null,
                    edits=tuple(edits),
                )
            )
        return made

    def _site(self, net: Net) -> tuple[str, str, int, int]:
        """Site, its head axis, this head's index along it, and the head's units."""
        if self.slot not in ("q", "k", "v"):
            raise OptionError("no such slot", got=repr(self.slot), expected="'q', 'k' or 'v'")
        site = f"attn.{self.layer}.{self.slot}"
        tap, query = net.taps(site)[0], net.taps(f"attn.{self.layer}.q")[0]
        axis = tap.axes[2]
        num, heads, size = int(tap.shape[2]), int(query.shape[2]), int(tap.shape[3])
        index = key_head(net, self.head, heads, num)
        wrong = [r for r in self.ranks if not 1 <= r <= size]
        if wrong or not self.ranks or self.num_nulls < 1:
            raise OptionError(
                "ranks must lie between 1 and the units of the head",
                got=f"{list(self.ranks)}, num_nulls={self.num_nulls}",
                expected=f"1 to {size}, and a null draw",
            )
        return site, axis, index, size

    def _where(self) -> dict[str, list[int]]:
        return {} if self.positions is None else {"position": list(self.positions)}

    def _recorded(
        self, net: Net, site: str, inputs: object, index: int
    ) -> Float[Tensor, "row position unit"]:
        values = net.record(inputs, site).tensor(site)[:, :, index]
        return values if self.positions is None else values[:, list(self.positions)]


def _matters(lost: Float[Tensor, "row"]) -> bool:
    """Whether a mean loss is more than twice its standard error, and not rounding."""
    error = float(lost.std()) / lost.numel() ** 0.5 if lost.numel() > 1 else 0.0
    return abs(float(lost.mean())) > max(2 * error, 1e-6)


def _share(rows: Tensor, nothing: Tensor, lost: Tensor) -> float:
    return float((rows - nothing).mean() / lost.mean())


def _named(broad: tuple[object, Metric] | None) -> dict[str, tuple[object, Metric]]:
    return {} if broad is None else {"broad": broad}


def survival_table(made: Sequence[Survival]) -> pl.DataFrame:
    """Columns: distribution, rank, metric, low, high, share, variance, null_mean, null_high, p."""
    return pl.DataFrame(
        [
            {
                "distribution": s.distribution,
                "rank": s.rank,
                "metric": s.metric,
                "low": s.interval.low,
                "high": s.interval.high,
                "share": s.share,
                "variance": s.variance,
                "null_mean": None if s.null is None else s.null.mean,
                "null_high": None if s.null is None else s.null.high,
                "p": None if s.null is None else s.null.p,
            }
            for s in made
        ]
    )

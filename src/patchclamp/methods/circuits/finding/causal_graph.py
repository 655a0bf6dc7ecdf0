"""Causal explanatory graphs: which unit causes which, for one task, by path intervention.

Correlated units need not cause each other, and a gradient sees only what an infinitely
small change would do. Here every edge is tried. To know what unit i of one layer does
to the task *through* unit j of the next,

1. unit i alone is set to a reference, and the value that unit j would take is noted;
2. in an untouched run, unit j alone is set to that value.

All other units keep their values in both runs, so that nothing but the path over this
edge carries the change; what the metric loses is the edge's effect, row by row. Edges
are kept where the effect is larger than chance would make it. The idea is that of
Ahmad et al. 2023; how the null and the floor are drawn is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.circuit import Circuit, Provenance
from patchclamp.core.errors import DataError, InputError, OptionError
from patchclamp.core.findings import Interval
from patchclamp.methods.circuits.checking.metrics import Metric
from patchclamp.methods.circuits.finding.unit_layers import UnitLayers
from patchclamp.methods.statistics import bootstrap_mean
from patchclamp.model.identity import data_hash
from patchclamp.model.inputs import Call
from patchclamp.net import Net


class Reference(StrEnum):
    """What a unit is set to: nothing, or its mean over background inputs."""

    ZERO = "zero"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalGraph:
    """A graph of causes, and how sure each of its edges is.

    Attributes:
        circuit: units of every layer but the last write, units of every layer but the first
            and the output read; the scores are mean effects, signed.
        p: p value of each edge, corrected for all edges between the same two layers; 1 where
            an edge is not possible.
        low, high: 95% interval of each mean effect, by bootstrap over rows.
        exact: bool (reader, writer): the edge was tried, not only estimated by a gradient.
    """

    circuit: Circuit
    p: np.ndarray
    low: np.ndarray
    high: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True, kw_only=True)
class CausalGraphs:
    """Path interventions on every edge between neighbouring layers of units.

    An edge is kept if its mean effect is beyond chance (`alpha`) and at least `min_share`
    of the largest effect between the same two layers. Chance: the signs of the effects are
    flipped row by row, all edges of two layers together, and the largest |sum| / norm of
    any edge is noted; p is corrected for the number of edges in this way. So an edge is
    kept only if it moves the metric the same way in most rows, and a metric whose labels
    are shuffled keeps none.

    Shapes: inputs of any form with a batch axis; units of a site are taken at all of its
        positions at once. Scores (reader, writer), as in `core.circuit`.
    Units: those of the metric; positive means that the edge holds it up.
    Randomness: sign flips and bootstrap, by `seed`.
    Cost: for two layers of m and n units, m forward passes over the rows and m n more, or
        `max_exact` and one backward pass if that is less. Edges that change nothing in the
        next layer cost nothing. The last layer costs one pass a unit.
    Raises: OptionError; SiteError for fewer than two sites or one without units; DataError for
        fewer than five rows; InputError if `MEAN` has no background.
    Fails when: an edge helps in as many rows as it harms (give the metric of one class, and rows
        of that class, or a correct-answer margin); effects pass through a site that was left
        out between two layers in series (they are then part of the edge) or around both
        (they are then seen by no edge); two units back each other up (each edge alone does
        nothing).
    Source: Ahmad et al. 2023, "Causal analysis for robust interpretability of neural networks".
    """

    reference: Reference = Reference.ZERO
    alpha: float = 0.05
    min_share: float = 0.05
    num_flips: int = 999
    max_exact: int = 4096
    batch_size: int = 2048
    seed: int = 0

    def run(
        self,
        net: Net,
        inputs: object,
        sites: str | Sequence[str],
        metric: Metric,
        *,
        background: object = None,
    ) -> CausalGraph:
        """The graph over `sites` (globs, in the order of the forward pass) and the output.

        Args:
            metric: the task; see `patchclamp.methods.circuits.checking.metrics.Metric`.
            background: inputs over which a unit's mean is taken, for `Reference.MEAN`.
        """
        self._check()
        layers = UnitLayers(net, net.call(inputs), sites, metric, self.batch_size)
        if layers.num_rows < 5:
            raise DataError("sign flips need at least five rows", got=f"{layers.num_rows}")
        layers.hold_at(self._reference(layers, background))
        blank = layers.blank()
        p, low, high = np.ones(blank.shape), np.zeros(blank.shape), np.zeros(blank.shape)
        scores, kept, exact = np.zeros(blank.shape), blank.copy(), blank.copy()
        for at in range(layers.num):
            block = layers.block(at)
            effects, tried = self._effects(layers, at)
            scores[block] = effects.mean(0).T.numpy()
            p[block] = self._p_values(effects).T.numpy()
            low[block], high[block] = self._intervals(effects)
            exact[block] = tried.T.numpy()
            floor = self.min_share * np.abs(scores[block]).max()
            kept[block] = (p[block] <= self.alpha) & (np.abs(scores[block]) >= floor)
        kept &= exact & (np.abs(scores) > 0)
        circuit = layers.circuit(scores, self._record(layers)).with_kept(kept)
        return CausalGraph(circuit=circuit, p=p, low=low, high=high, exact=exact)

    def _check(self) -> None:
        for name in ("alpha", "min_share"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} is a share", got=f"{getattr(self, name):g}")
        for name in ("num_flips", "max_exact", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1", got=str(getattr(self, name)))

    def _record(self, layers: UnitLayers) -> Provenance:
        return Provenance(
            model=layers.net.name,
            model_hash=layers.net.hash,
            data_hash=data_hash(layers.call.tensors()),
            metric=layers.metric.name,
            method="path interventions",
            ablation=str(self.reference),
            direction="noising",
            sign="signed",
            seed=self.seed,
            options={k: v for k, v in asdict(self).items() if k != "seed"},
        )

    def _reference(self, layers: UnitLayers, background: object) -> list[Tensor]:
        """What units are set to, for each layer: (1, place, unit)."""
        if self.reference is Reference.ZERO:
            return [torch.zeros_like(c[:1]) for c in layers.clean]
        if background is None:
            raise InputError("the mean of a unit is taken over background inputs", hint="give them")
        seen = layers.recorded(layers.net.call(background))
        return [x.mean(0, keepdim=True) for x in seen]

    def _effects(
        self, layers: UnitLayers, at: int
    ) -> tuple[Float[Tensor, "row writer reader"], Tensor]:
        """Effects of all edges from a layer on, and which of them were tried (writer, reader)."""
        if at == layers.num - 1:
            effects = layers.direct()[:, :, None]
            return effects, torch.ones(effects.shape[1:], dtype=torch.bool)
        moved = layers.moved(at)  # writer by writer: (row, place, reader)
        slope = layers.slope(at + 1)
        clean = layers.clean[at + 1]
        guess = torch.stack([((clean - m) * slope).sum(1) for m in moved], 1)
        changes = torch.stack([(clean != m).any(0).any(0) for m in moved])
        tried = ~changes  # an edge that changes nothing has the effect 0, and that is exact
        sizes = guess.mean(0).abs().masked_fill(~changes, -1.0).flatten()
        order = sizes.argsort(descending=True, stable=True)[: self.max_exact]
        picked = order[changes.flatten()[order]]
        effects = guess * changes
        num = clean.shape[2]
        for edges in picked.split(max(1, self.batch_size // layers.num_rows)):
            i, j = edges // num, edges % num
            values = torch.stack([moved[a][:, :, b] for a, b in zip(i, j, strict=True)])
            effects[:, i, j] = layers.through(at + 1, j, values)
        tried.view(-1)[picked] = True
        return effects, tried

    def _p_values(self, effects: Float[Tensor, "row writer reader"]) -> Tensor:
        """Chance of so consistent an effect anywhere between these layers (Westfall & Young)."""
        x = effects.flatten(1).double()
        norms = x.norm(dim=0)
        unit = torch.where(norms > 0, x / norms.clamp(min=1e-300), torch.zeros_like(x))
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.num_flips, x.shape[0]), generator=generator) * 2.0 - 1
        largest = (signs.double() @ unit).abs().amax(1).sort().values
        # the margin keeps draws that equal the effect up to rounding on the side of the null
        hits = self.num_flips - torch.searchsorted(largest, unit.sum(0).abs() * (1 - 1e-9))
        return ((1 + hits) / (1 + self.num_flips)).view(effects.shape[1:])

    def _intervals(self, effects: Float[Tensor, "row writer reader"]) -> tuple[np.ndarray, ...]:
        """95% percentile bootstrap over rows: two arrays (reader, writer)."""
        num = effects.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(num, (500, num), generator=generator)
        weights = torch.zeros(500, num).scatter_add_(1, drawn, torch.ones(500, num)) / num
        means = (weights.double() @ effects.flatten(1).double()).sort(0).values
        low, high = means[round(0.025 * 499)], means[round(0.975 * 499)]
        return tuple(x.view(effects.shape[1:]).T.numpy() for x in (low, high))


def gradient_graph(
    net: Net,
    inputs: object,
    sites: str | Sequence[str],
    metric: Metric,
    *,
    batch_size: int = 2048,
) -> Circuit:
    """The same edges by gradients: value of unit i times its gradient through unit j alone.

    The peer that path interventions are compared with. Nothing is kept; use `Circuit.top`.
    """
    layers = UnitLayers(net, net.call(inputs), sites, metric, batch_size)
    scores = np.zeros(layers.blank().shape)
    for at in range(layers.num):
        slopes = layers.slope(at)[:, :, :, None] if at == layers.num - 1 else layers.slopes(at)
        effects = (layers.clean[at][..., None] * slopes).sum(1)
        scores[layers.block(at)] = effects.mean(0).T.numpy()
    record = Provenance(
        model=net.name,
        model_hash=net.hash,
        data_hash=data_hash(layers.call.tensors()),
        metric=metric.name,
        method="gradients through one unit",
        sign="signed",
    )
    return layers.circuit(scores, record)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How alike graphs of clean and of noisy inputs are; 1 is the same.

    Attributes:
        num_edges: how many edges each graph was cut to.
        jaccard, gradient_jaccard: overlap of the kept edges; mean over noise draws.
        rank, gradient_rank: Spearman's correlation of the sizes of all scores.
        intervals: of these four, by name, over noise draws.
    """

    num_edges: int
    jaccard: float
    gradient_jaccard: float
    rank: float
    gradient_rank: float
    intervals: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class GraphStability:
    """Noise on the inputs: does the graph of causes change less than the graph of gradients?

    Both graphs are cut to the same number of edges, by the size of their scores, so that
    thresholds play no part: to `num_edges`, or to as many as the clean graph of causes keeps.
    Noise is Gaussian, its deviation `noise` times that of the inputs.

    Shapes: see `CausalGraphs`.  Units: shares, correlations.
    Randomness: the noise, by `seed`; interval by bootstrap over draws.
    Cost: 1 + `num_draws` graphs of each kind.
    Raises: InputError if the inputs hold no real numbers; DataError if no edge was kept.
    Fails when: noise changes what the network answers: then a stable graph would be wrong.
        With `Reference.ZERO` and rectifiers that seldom change sides, gradient x value *is* the
        effect, and the two graphs bear noise nearly alike, as on the bundled digit networks.
    Source: Ahmad et al. 2023.
    """

    noise: float = 0.2
    num_edges: int | None = None
    num_draws: int = 8
    seed: int = 0

    def run(
        self,
        method: CausalGraphs,
        net: Net,
        inputs: object,
        sites: str | Sequence[str],
        metric: Metric,
        *,
        background: object = None,
    ) -> Stability:
        """Compare both kinds of graph on clean and on noisy inputs."""
        call = net.call(inputs)
        if not any(x.is_floating_point() for x in call.tensors()):
            raise InputError("noise can only be added to real numbers", got="whole numbers")

        def graphs(of: Call) -> tuple[Circuit, Circuit]:
            found = method.run(net, of, sites, metric, background=background).circuit
            return found, gradient_graph(net, of, sites, metric, batch_size=method.batch_size)

        clean = graphs(call)
        num = clean[0].num_edges if self.num_edges is None else self.num_edges
        if not num:
            raise DataError("no edge of the clean graph is kept, so there is nothing to compare")
        generator = torch.Generator().manual_seed(self.seed)
        seen: list[list[float]] = []
        for _ in range(self.num_draws):
            noisy = graphs(self._noisy(call, generator))
            pairs = list(zip(clean, noisy, strict=True))
            overlaps = [_jaccard(a.top(num), b.top(num)) for a, b in pairs]
            seen.append([*overlaps, *(_rank_correlation(a, b) for a, b in pairs)])
        values = torch.tensor(seen).T
        names = ("jaccard", "gradient_jaccard", "rank", "gradient_rank")
        means = dict(zip(names, values.mean(1).tolist(), strict=True))
        intervals = {
            name: bootstrap_mean(v, seed=self.seed) for name, v in zip(names, values, strict=True)
        }
        return Stability(num_edges=num, intervals=intervals, **means)

    def _noisy(self, call: Call, generator: torch.Generator) -> Call:
        made = []
        for x in call.tensors():
            if x.is_floating_point():
                drawn = torch.randn(x.shape, generator=generator).to(x)
                x = x + self.noise * x.std() * drawn
            made.append(x)
        return call.mapped(made)


def _jaccard(a: Circuit, b: Circuit) -> float:
    return float((a.kept & b.kept).sum() / max(1, (a.kept | b.kept).sum()))


def _rank_correlation(a: Circuit, b: Circuit) -> float:
    """Spearman's correlation of |score| over possible edges, ties at their mean rank."""
    ranks = []
    for circuit in (a, b):
        x = np.abs(circuit.scores[circuit.possible])
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    first, second = (r - r.mean() for r in ranks)
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / size) if size > 0 else 0.0

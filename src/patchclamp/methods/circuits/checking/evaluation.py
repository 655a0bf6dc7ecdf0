"""How good a circuit is: faithfulness over its size, completeness, minimality, and chance.

All edges outside the circuit are cut, and the metric is put on a scale on which the network with
every edge cut is 0 and the whole network is 1:

    faithfulness(C) = (m(C) - m(nothing)) / (m(whole) - m(nothing))

A faithful circuit is near 1. Its complement should be near 0 (completeness: nothing
that does the work was left out), and taking any one part away should be seen
(minimality). A curve over sizes says more than one size: its area is CPR (circuit
performance ratio), the area between it and 1 is CMD (circuit-model distance).
Random circuits of the same sizes say what faithfulness costs nothing.

Sources: Wang et al. 2022; Mueller et al. 2025 (MIB: CPR and CMD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.circuit import Circuit, Edge
from patchclamp.core.errors import TargetError
from patchclamp.core.findings import Interval
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Contrast
from patchclamp.methods.circuits.network.masks import connected, metric_rows
from patchclamp.methods.circuits.network.wiring import Wiring

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of MIB, as shares of all edges."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size.

    Attributes:
        share: of all edges (or writers).
        size: edges (or writers) that were chosen.
        num_edges: edges kept; num_connected: of those, on a way from the input to the output.
        faithfulness, interval: over examples.
        random_low, random_mean, random_high: faithfulness of random circuits of this size.
    """

    share: float
    size: int
    num_edges: int
    num_connected: int
    faithfulness: float
    interval: Interval
    random_low: float
    random_mean: float
    random_high: float


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """A circuit's curve.

    Attributes:
        points: smallest size first.
        cpr, cmd: areas; see the module.
        metric_whole, metric_nothing: means over examples.
        num_examples: how many.
        num_falls: how often a larger circuit is less faithful by more than 0.02.
    """

    points: tuple[Point, ...]
    cpr: float
    cmd: float
    metric_whole: float
    metric_nothing: float
    num_examples: int
    num_falls: int

    def size_at(self, level: float) -> Point | None:
        """The smallest measured size from which on the curve stays at this level or above."""
        found = None
        for point in reversed(self.points):
            if point.faithfulness < level:
                break
            found = point
        return found


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Faithfulness over sizes, with intervals over examples and random circuits.

    Shapes: contrasts hold (example, ...); circuit scores (reader, writer).
    Units: faithfulness is a share of the metric's range; see the module.
    Randomness: random circuits and the bootstrap, from `seed`.
    Cost: examples x sizes x (1 + num_random) runs of the masked network.
    Raises: TargetError where whole and empty network do not differ, so that there is no scale.
    Fails when: examples disagree in sign: the ratio is of means, so look at the metric first.
    Source: see the module.

    Attributes:
        fractions: sizes, as shares of all edges.
        num_random: random circuits of each size.
        num_draws: of the bootstrap.
    """

    fractions: tuple[float, ...] = FRACTIONS
    num_random: int = 5
    num_draws: int = 1000
    batch_size: int = 16
    seed: int = 0

    def run(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        circuit: Circuit,
        references: References | None = None,
        *,
        progress: Progress = SILENT,
    ) -> Faithfulness:
        """The curve of the circuit's scores, largest first; its own mask is not used."""
        sizes = self._sizes(circuit.num_possible)
        kept = [circuit.top(size).kept for size in sizes]
        chance = [mask for size in sizes for mask in self._random(circuit, size)]
        return self._measured(
            wiring, contrasts, references, sizes, circuit.num_possible, kept, chance, progress
        )

    def run_nodes(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        scores: Float[np.ndarray, "W"],
        references: References | None = None,
        *,
        progress: Progress = SILENT,
    ) -> Faithfulness:
        """The curve of whole writers: all edges of those with the largest scores are kept.

        Sizes and shares count writers. Roots (embeddings) are kept always and do not count.
        """
        rooted = ~np.any(wiring.feeds, axis=0)
        others = np.flatnonzero(~rooted)
        sizes = self._sizes(len(others))
        order = others[np.argsort(-np.abs(scores[others]), kind="stable")]
        generator = np.random.default_rng(self.seed)

        def mask(writers: np.ndarray) -> np.ndarray:
            on = rooted.copy()
            on[writers] = True
            made: np.ndarray = wiring.possible & on[None]
            return made

        kept = [mask(order[:size]) for size in sizes]
        chance = [
            mask(generator.permutation(others)[:size])
            for size in sizes
            for _ in range(self.num_random)
        ]
        return self._measured(
            wiring, contrasts, references, sizes, len(others), kept, chance, progress
        )

    def _sizes(self, total: int) -> list[int]:
        return sorted({max(1, round(f * total)) for f in self.fractions})

    def _measured(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        references: References | None,
        sizes: Sequence[int],
        total: int,
        kept: Sequence[np.ndarray],
        chance: Sequence[np.ndarray],
        progress: Progress,
    ) -> Faithfulness:
        """Run nothing, everything, the circuits and the random ones."""
        contrasts = [contrasts] if isinstance(contrasts, Contrast) else list(contrasts)
        references = references or References(kind=Ablation.RESAMPLE)
        masks = [np.zeros_like(wiring.possible), wiring.possible, *kept, *chance]
        num = len(masks) * sum(-(-c.num_rows // self.batch_size) for c in contrasts)
        progress.start("faithfulness", num, "runs")
        rows = metric_rows(
            wiring, contrasts, masks, references, batch_size=self.batch_size, progress=progress
        )
        progress.finish()
        nothing, whole, values = rows[0], rows[1], rows[2:]
        scale = on_scale(values, nothing, whole)
        points = []
        for i, size in enumerate(sizes):
            start = len(sizes) + i * self.num_random
            random = scale[start : start + self.num_random]
            points.append(
                Point(
                    share=size / total,
                    size=size,
                    num_edges=int(kept[i].sum()),
                    num_connected=int(connected(wiring, kept[i]).sum()),
                    faithfulness=float(scale[i]),
                    interval=self.interval(values[i], nothing, whole),
                    random_low=float(random.min()),
                    random_mean=float(random.mean()),
                    random_high=float(random.max()),
                )
            )
        return self._curve(points, nothing, whole)

    def interval(self, values: Tensor, nothing: Tensor, whole: Tensor) -> Interval:
        """Bootstrap interval of a ratio of means over examples."""
        generator = torch.Generator().manual_seed(self.seed)
        num = values.numel()
        drawn = torch.randint(num, (self.num_draws, num), generator=generator)
        v, n, w = (x.double()[drawn].mean(1) for x in (values, nothing, whole))
        ratios = (v - n) / (w - n)
        ratios = ratios[ratios.isfinite()]
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975]).double()).tolist()
        return Interval(
            low=low, high=high, method=f"bootstrap over {num} examples, {self.num_draws} draws"
        )

    def _random(self, circuit: Circuit, size: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, size])
        where = np.argwhere(circuit.possible)
        masks = []
        for _ in range(self.num_random):
            mask = np.zeros_like(circuit.possible)
            picked = where[generator.permutation(len(where))[:size]]
            mask[picked[:, 0], picked[:, 1]] = True
            masks.append(mask)
        return masks

    def _curve(self, points: list[Point], nothing: Tensor, whole: Tensor) -> Faithfulness:
        x = np.array([0.0, *(p.share for p in points)])
        y = np.array([0.0, *(p.faithfulness for p in points)])
        if x[-1] < 1:  # the whole network is faithful by definition
            x, y = np.append(x, 1.0), np.append(y, 1.0)
        falls = int((np.diff(y) < -0.02).sum())
        return Faithfulness(
            points=tuple(points),
            cpr=float(np.trapezoid(y, x)),
            cmd=float(np.trapezoid(np.abs(1 - y), x)),
            metric_whole=float(whole.mean()),
            metric_nothing=float(nothing.mean()),
            num_examples=whole.numel(),
            num_falls=falls,
        )


def on_scale(
    values: Float[Tensor, "... N"], nothing: Float[Tensor, "N"], whole: Float[Tensor, "N"]
) -> Float[Tensor, "..."]:
    """Means over examples on the scale from the empty (0) to the whole network (1).

    Raises:
        TargetError: the two do not differ.
    """
    low, high = nothing.double().mean(), whole.double().mean()
    if float((high - low).abs()) < 1e-6 * max(1.0, float(high.abs())):
        raise TargetError(
            "the metric is the same with all edges cut as in the whole network, so "
            "faithfulness has no scale",
            got=f"{float(low):.4g} and {float(high):.4g}",
            hint="check that the network does the task: circuits.behaviour.performs",
        )
    return (values.double().mean(-1) - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a circuit's complement and its parts do.

    Attributes:
        faithfulness: of the circuit.
        complement: of everything but the circuit; near 0 where it is complete.
        losses: for each part that was taken away, the fall of faithfulness.
    """

    faithfulness: float
    complement: float
    losses: dict[Edge, float]


def parts(
    wiring: Wiring,
    contrasts: Sequence[Contrast],
    circuit: Circuit,
    references: References | None = None,
    *,
    max_edges: int = 64,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> Parts:
    """Completeness and minimality of a circuit's mask.

    Args:
        max_edges: how many edges are taken away one by one, largest score first.
    """
    references = references or References(kind=Ablation.RESAMPLE)
    edges = circuit.edges()[:max_edges]
    masks = [np.zeros_like(circuit.possible), circuit.possible, circuit.kept]
    masks.append(circuit.possible & ~circuit.kept)
    row = {r: i for i, r in enumerate((x.node, x.slot) for x in circuit.readers)}
    column = {w: i for i, w in enumerate(circuit.writers)}
    for edge in edges:
        without = circuit.kept.copy()
        without[row[edge.reader, edge.slot], column[edge.writer]] = False
        masks.append(without)
    num = len(masks) * sum(-(-c.num_rows // batch_size) for c in contrasts)
    progress.start("parts of the circuit", num, "runs")
    rows = metric_rows(
        wiring, contrasts, masks, references, batch_size=batch_size, progress=progress
    )
    progress.finish()
    scale = on_scale(rows[2:], rows[0], rows[1])
    return Parts(
        faithfulness=float(scale[0]),
        complement=float(scale[1]),
        losses={e: float(scale[0] - s) for e, s in zip(edges, scale[2:], strict=True)},
    )

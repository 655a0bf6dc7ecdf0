"""Exact effects of edges: each is cut for itself and everything after it is run again.

First-order scores are checked against this. All edges into one reader are edits of
one value of the plain network, so they run together as a wavefront
(engine/wavefront.py): what lies before the reader is not run at all, positions before
the first change are skipped where the network is causal, and only the position that
the metric reads is computed at the end.

Shape suffixes: K edges, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.circuit import Circuit, Edge
from patchclamp.core.errors import EngineError, OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.few_classes import FewClasses, few_classes
from patchclamp.engine.targets import measured, measured_there
from patchclamp.engine.wavefront import Wavefront
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Batch, Contrast
from patchclamp.methods.circuits.network.wiring import EdgeVariants, Wiring, index_of


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Measured effects of edges.

    Attributes:
        edges: in the order that was asked for.
        noising: change of the metric when an edge carries the corrupt value in the clean run.
        denoising: change when it carries the clean value in the corrupt run.
            Both (edge, example); an edge that changes nothing has exactly 0, and so has
            every edge in a direction that was not asked for.
        metric_clean, metric_corrupt: (example,).
        direction: what was measured.
    """

    edges: tuple[Edge, ...]
    noising: Float[Tensor, "K N"]
    denoising: Float[Tensor, "K N"]
    metric_clean: Float[Tensor, "N"]
    metric_corrupt: Float[Tensor, "N"]
    direction: Direction = Direction.BOTH

    @property
    def sizes(self) -> Float[Tensor, "K"]:
        """Mean size per example, over the directions that were measured."""
        num = 2 if self.direction is Direction.BOTH else 1
        return (self.noising.abs() + self.denoising.abs()).mean(1) / num


@dataclass(frozen=True, kw_only=True)
class ExactEdges:
    """The measured effect of each of some edges.

    Shapes: contrasts hold (example, ...); effects (edge, example).
    Units: those of the metric.
    Randomness: that of the references.
    Cost: for every edge, what lies behind its reader.
    Raises: EngineError for an edge that the network lacks.
    Fails when: two edges only matter together: see `parts` and `Evaluation`.
    Source: Wang et al. 2022 and Goldowsky-Dill et al. 2023, for a path of one edge.

    Attributes:
        direction: see `Effects`.
        max_rows: most rows (edges x examples) in one pass, which bounds the memory.
    """

    direction: Direction = Direction.BOTH
    batch_size: int = 16
    max_rows: int = 256

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.batch_size < 1:
            raise OptionError(
                "batch_size and max_rows must be at least 1",
                got=f"{self.batch_size} and {self.max_rows}",
            )

    def run(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        edges: Sequence[Edge] | None = None,
        references: References | None = None,
        *,
        progress: Progress = SILENT,
    ) -> Effects:
        """Measure these edges (None: all that are possible)."""
        contrasts = [contrasts] if isinstance(contrasts, Contrast) else list(contrasts)
        if edges is None:
            index = [(int(r), int(w)) for r, w in np.argwhere(wiring.possible)]
            edges = [wiring.edge(*i) for i in index]
        else:
            index = [index_of(wiring, e) for e in edges]
        references = references or References(kind=Ablation.RESAMPLE)
        found: dict[Direction, list[Tensor]] = {Direction.NOISING: [], Direction.DENOISING: []}
        metrics: dict[Direction, list[Tensor]] = {d: [] for d in found}
        num = sum(c.num_rows for c in contrasts) * len(index)
        progress.start("exact edges", num * (2 if self.direction is Direction.BOTH else 1), "edges")
        for contrast in contrasts:
            for batch in contrast.batches(self.batch_size):
                for direction in found:
                    turned = batch if direction is Direction.NOISING else batch.turned()
                    if self.direction in (direction, Direction.BOTH):
                        effects, base = self._batch(wiring, turned, index, references, progress)
                    else:
                        base = _base(wiring, turned)
                        effects = base.new_zeros(len(index), batch.num_rows)
                    found[direction].append(effects)
                    metrics[direction].append(base)
        progress.finish()
        return Effects(
            edges=tuple(edges),
            noising=torch.cat(found[Direction.NOISING], 1),
            denoising=torch.cat(found[Direction.DENOISING], 1),
            metric_clean=torch.cat(metrics[Direction.NOISING]),
            metric_corrupt=torch.cat(metrics[Direction.DENOISING]),
            direction=self.direction,
        )

    def _batch(
        self,
        wiring: Wiring,
        batch: Batch,
        index: Sequence[tuple[int, int]],
        references: References,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Effects (edge, row) of one batch in one direction, and the metric without any."""
        recorded = wiring.record(batch.clean)
        held = references.of(wiring, batch)
        differences = [(h - v).expand_as(v) for h, v in zip(held, recorded.values, strict=True)]
        with torch.no_grad():
            base = measured(batch.metric, recorded.output, batch.rows)
        effects = base.new_zeros(len(index), batch.num_rows)
        place = {edge: k for k, edge in enumerate(index)}
        wave = Wavefront(wiring.engine, batch.clean)
        few = few_classes(wiring.engine, batch.metric)
        step = max(1, self.max_rows // batch.num_rows)
        for group in wiring.variants(batch.clean, differences, index):
            cheap = None if few is None or group.address in few.after else few
            for start in range(0, len(group.edges), step):
                edges = group.edges[start : start + step]
                rows = _rows(wave, batch, group, edges, cheap)
                effects[[place[e] for e in edges]] = rows - base
                progress.advance(rows.numel())
        return effects, base


def _rows(
    wave: Wavefront,
    batch: Batch,
    group: EdgeVariants,
    edges: Sequence[tuple[int, int]],
    few: FewClasses | None,
) -> Tensor:
    """The metric with each of the edges cut, (edge, row)."""
    metric, num = batch.metric, len(edges)
    address = None if few is None else few.address
    # a network of fixed length has no positions that can be told apart: all are computed
    one = metric.position is not None and wave.has_rows(address)
    output = wave.run(
        {group.address: lambda value: group.make(value, edges)},
        output=address,
        first_row=group.first_row if wave.length else 0,
        position=metric.position if one else None,
    )
    with torch.no_grad():
        if few is not None:
            output = few.logits(output)
        rows = batch.rows.repeat(num)
        found = (measured_there if one else measured)(metric, output, rows)
    return found.reshape(num, batch.num_rows)


def _base(wiring: Wiring, batch: Batch) -> Tensor:
    with torch.no_grad():
        return measured(batch.metric, wiring.record(batch.clean).output, batch.rows)


def verified(circuit: Circuit, effects: Effects) -> Circuit:
    """The circuit with the first-order scores of the measured edges replaced by their effects."""
    scores = circuit.scores.copy()
    row = {(r.node, r.slot): i for i, r in enumerate(circuit.readers)}
    column = {w: i for i, w in enumerate(circuit.writers)}
    for edge, size in zip(effects.edges, effects.sizes.tolist(), strict=True):
        place = row.get((edge.reader, edge.slot))
        if place is None or edge.writer not in column:
            raise EngineError(f"the circuit has no edge {edge}")
        scores[place, column[edge.writer]] = size
    return Circuit(
        writers=circuit.writers,
        readers=circuit.readers,
        possible=circuit.possible,
        kept=circuit.kept,
        scores=scores,
        record=circuit.record,
    )

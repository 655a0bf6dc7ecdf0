"""ACDC: cut edge after edge, from the output backwards, while the behaviour stays.

Readers are taken in reverse order of the forward pass, and of each the latest writers
first. An edge is cut for good if cutting it, with all that was cut before, brings
the network further from the whole one by less than a threshold. So what an edge
counts for depends on what is left when its turn comes: of two edges that do the same work the
first is cut and the second stays.

In direction "noising" the clean input runs and cut edges carry the corrupt value; in
"denoising" the other way round. One alone misses what the other sees: while both
writers of an OR are on, noising cuts the first of them for nothing, and denoising keeps both.
"both" adds up the two distances.

Edges into a node that nobody reads any more change nothing; they are cut without a run.

Source: Conmy et al. 2023, "Towards automated circuit discovery for mechanistic interpretability".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from patchclamp.core.circuit import Circuit, Provenance
from patchclamp.core.errors import EngineError, OptionError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import measured
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Batch, Contrast
from patchclamp.methods.circuits.network.wiring import Wiring, scored


class Distance(StrEnum):
    """How far a circuit is from the whole network, for each example."""

    METRIC = "metric"
    """Size of the difference of the metric."""
    KL = "kl"
    """KL(whole | circuit) of the outputs as logits, where the metric is read."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What ACDC left.

    Attributes:
        circuit: the edges that stay. The score of an edge is how much further from the whole
            network cutting it brought the circuit of that moment (negative: nearer).
        tried: edges whose cutting was run, (reader, writer); for the others nothing had to be.
        distance: of the circuit from the whole network.
        num_runs: passes through the network.
        stopped: `max_runs` ended the work; the edges that were not reached are kept.
    """

    circuit: Circuit
    tried: Bool[np.ndarray, "R W"]
    distance: float
    num_runs: int
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class ACDC:
    """Edges that cannot be cut one after the other; see the module.

    Shapes: contrasts hold (example, ...); scores (reader, writer).
    Units: those of the metric, or nats; means over examples and directions.
    Randomness: that of the references.
    Cost: one whole pass for every edge whose node is still read, batch and direction; the
        references of all examples are held in memory.
    Raises: OptionError for a threshold of 0 or less; TargetError for a KL divergence of an output
        that is no distribution; EngineError for a circuit of another network.
    Fails when: the threshold is of the size of the effects: which of several edges that do the
        same work stays depends on their order.
    Source: see the module.

    Attributes:
        threshold: an edge is cut if the distance grows by less.
        distance: see `Distance`.
        direction: see the module.
        max_runs: passes after which the work stops, for a bound on its cost.
    """

    threshold: float = 0.01
    distance: Distance = Distance.METRIC
    direction: Direction = Direction.BOTH
    max_runs: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise OptionError("the threshold must be above 0", got=f"{self.threshold:g}")
        if self.batch_size < 1 or (self.max_runs is not None and self.max_runs < 1):
            raise OptionError(
                "batch_size and max_runs must be at least 1",
                got=f"{self.batch_size} and {self.max_runs}",
            )

    def run(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        references: References | None = None,
        *,
        within: Circuit | None = None,
        progress: Progress = SILENT,
    ) -> Pruned:
        """Cut what can be cut.

        Args:
            within: start from its kept edges, the others being cut; None for all edges.
            progress: advances by one for every edge; raising from it stops the work.
        """
        contrasts = [contrasts] if isinstance(contrasts, Contrast) else list(contrasts)
        references = references or References(kind=Ablation.RESAMPLE)
        kept = wiring.possible.copy() if within is None else _start(wiring, within)
        scores, tried = np.zeros(kept.shape), np.zeros(kept.shape, dtype=bool)
        runs = self._runs(wiring, contrasts, references)
        num_runs, stopped = 2 * len(runs), False
        now = _distance(wiring, runs, kept)
        progress.start("ACDC", int(kept.sum()), "edges")
        for reader, writer, is_heard in _backwards(wiring, kept):
            if is_heard and self.max_runs is not None and num_runs + len(runs) > self.max_runs:
                stopped = True
                break
            kept[reader, writer] = False
            if is_heard:
                then = _distance(wiring, runs, kept)
                num_runs += len(runs)
                scores[reader, writer], tried[reader, writer] = then - now, True
                if then - now < self.threshold:
                    now = then
                else:
                    kept[reader, writer] = True
            progress.advance()
        progress.finish()
        record = self._record(wiring, contrasts, references)
        return Pruned(
            circuit=scored(wiring, scores, record).with_kept(kept),
            tried=tried,
            distance=now,
            num_runs=num_runs,
            stopped=stopped,
        )

    def _record(
        self, wiring: Wiring, contrasts: Sequence[Contrast], references: References
    ) -> Provenance:
        options = {k: str(v) if isinstance(v, StrEnum) else v for k, v in asdict(self).items()}
        return Provenance(
            model=wiring.net.name,
            model_hash=wiring.net.hash,
            task=contrasts[0].name,
            data_hash=" ".join(c.data_hash for c in contrasts),
            metric=contrasts[0].metric.name,
            method="ACDC",
            ablation=references.kind,
            direction=self.direction,
            sign="signed",
            options=options,
            versions={"torch": torch.__version__},
        )

    def _runs(
        self, wiring: Wiring, contrasts: Sequence[Contrast], references: References
    ) -> list[_Run]:
        """Every batch in every direction that is asked for."""
        found = []
        for contrast in contrasts:
            for batch in contrast.batches(self.batch_size):
                if self.direction is not Direction.DENOISING:
                    found.append(self._whole(wiring, batch, references))
                if self.direction is not Direction.NOISING:
                    found.append(self._whole(wiring, batch.turned(), references))
        return found

    def _whole(self, wiring: Wiring, batch: Batch, references: References) -> _Run:
        with torch.no_grad():
            held = references.of(wiring, batch)
            output = wiring.record(batch.clean).output
            seen = _seen(self.distance, batch, output)
        return _Run(self.distance, batch, held, seen)


@dataclass(frozen=True)
class _Run:
    """A batch in one direction, with what the whole network gives: metrics, or log shares."""

    kind: Distance
    batch: Batch
    held: list[Tensor]
    whole: Tensor

    def distances(self, wiring: Wiring, cut: Tensor) -> Tensor:
        """(row,)."""
        with torch.no_grad():
            output = wiring.run(self.batch.clean, self.held, cut.to(self.held[0].dtype))
            seen = _seen(self.kind, self.batch, output)
            if self.kind is Distance.METRIC:
                return (seen - self.whole).abs()
            divergence: Tensor = (self.whole.exp() * (self.whole - seen)).sum(-1)
            return divergence.reshape(self.batch.num_rows, -1).mean(1)


def _seen(kind: Distance, batch: Batch, output: Tensor) -> Tensor:
    if kind is Distance.METRIC:
        return measured(batch.metric, output, batch.rows)
    logits = output if batch.metric.position is None else output[:, batch.metric.position]
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise TargetError(
            "a KL divergence is between distributions over classes",
            got=f"an output of {tuple(output.shape)}",
            expected="at least two classes along the last axis",
            hint="use distance='metric'",
        )
    return logits.log_softmax(-1)


def _distance(wiring: Wiring, runs: Sequence[_Run], kept: Bool[np.ndarray, "R W"]) -> float:
    """Mean over all examples and directions."""
    cut = torch.from_numpy(wiring.possible & ~kept)[None]
    return float(torch.cat([run.distances(wiring, cut) for run in runs]).double().mean())


def _start(wiring: Wiring, within: Circuit) -> Bool[np.ndarray, "R W"]:
    if within.readers != wiring.readers or within.writers != wiring.writers:
        raise EngineError(
            f"the circuit to start from is not one of {wiring.net.name}",
            got=f"{len(within.readers)} readers and {len(within.writers)} writers",
            expected=f"{len(wiring.readers)} and {len(wiring.writers)}, with its names",
        )
    kept: np.ndarray = within.kept & wiring.possible
    return kept


def _backwards(wiring: Wiring, kept: Bool[np.ndarray, "R W"]) -> Iterator[tuple[int, int, bool]]:
    """Edges of a mask, last reader first, and whether anybody still hears the reader's node.

    The mask may change on the way: all that a node feeds comes later in the forward pass, and
    so has had its turn.
    """
    for reader in reversed(range(len(wiring.readers))):
        fed = wiring.feeds[reader]
        is_heard = not fed.any() or bool(kept[:, fed].any())
        for writer in reversed(np.flatnonzero(kept[reader]).tolist()):
            yield reader, writer, is_heard

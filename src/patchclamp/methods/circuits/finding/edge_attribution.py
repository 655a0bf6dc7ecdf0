"""Edge attribution: the first-order effect of every edge of a network at once.

Replacing what a writer gives to one reader changes the metric by about the change of
the writer's part times the gradient at the reader's input (attribution patching).
That takes one gradient for all edges together, and no copy of the network per head.

One gradient is blind. Where two writers do the same work (OR, a backup), no single one
matters at the clean point; where both are needed (AND), no single one matters at the
corrupt point; where effects change sign on the way between the two (XOR), an average over the way
cancels. On the straight way all parts of the input change together, so points between
see no part without the others (a backup that takes over half way): mixed points, where some places
come from one run and some from the other, do. So the default takes gradients at both ends, between
them and at mixed points, and adds up sizes per example and per point. A first-order
score is a search light, not a measurement; `ExactEdges` measures.

Sources: Nanda 2023 (attribution patching); Syed, Rager & Conmy 2023 (EAP); Hanna,
Pezzelle & Belinkov 2024 (EAP-IG inputs); Marks et al. 2024 (integrating activations).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from patchclamp.core.circuit import Circuit, Provenance
from patchclamp.core.errors import OptionError, TargetError, nearest
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import measured
from patchclamp.methods.circuits.network.contrast import Batch, Contrast
from patchclamp.methods.circuits.network.wiring import Slopes, Wiring, scored


class Direction(StrEnum):
    """Which run is changed; see `Contrast`."""

    NOISING = "noising"
    DENOISING = "denoising"
    BOTH = "both"


class Path(StrEnum):
    """What moves from corrupt to clean along the points between the two runs."""

    NONE = "none"
    """No points between."""
    INPUTS = "inputs"
    """The embeddings or inputs; everything else follows from them (EAP-IG inputs)."""
    ACTIVATIONS = "activations"
    """One source at a time is held on the way, the rest follows from it (EAP-IG activations)."""


class Sign(StrEnum):
    """How effects of examples and points are added up."""

    ABSOLUTE = "absolute"
    SIGNED = "signed"


class BlindSpotWarning(UserWarning):
    """A method is used alone where it is known not to see some kinds of circuit."""


@dataclass(frozen=True, kw_only=True)
class EdgeScores:
    """What edge attribution found.

    Attributes:
        circuit: scores of all edges; none is kept yet.
        nodes: first-order effect of every writer on all that read it, (writer,).
        spread: standard error of each edge's score over examples, (reader, writer).
        metric_clean, metric_corrupt: means over examples.
        num_examples: how many there were.
        caveats: what this choice of options is blind to.
    """

    circuit: Circuit
    nodes: np.ndarray
    spread: np.ndarray
    metric_clean: float
    metric_corrupt: float
    num_examples: int
    caveats: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EdgeAttribution:
    """First-order effects of all edges, by gradients at one or several points.

    Shapes: contrasts hold (example, ...); scores (reader, writer).
    Units: those of the metric, averaged over examples and points. In direction "noising" with
        `sign="signed"`, the change of the metric when an edge carries the corrupt value.
    Randomness: which places are mixed, from `seed`.
    Cost: a forward and a backward for each point, and a forward for each end without one.
        Activations: steps x sources forwards and backwards.
    Raises: TargetError where the gradient is exactly zero everywhere.
    Fails when: one point is used alone: see `caveats` of the result, and the module.
    Source: see the module.

    Attributes:
        direction: ends of the way at which gradients are taken: clean, corrupt or both.
        path: what points between the ends are made of.
        steps: how many points there are between the ends.
        mixed: pairs of mixed points (with path "inputs"): a random half of the places where the
            runs differ (positions of a stream, units of a first layer) comes from the other run,
            then the other half.
        seed: of the halves.
        sign: see `Sign`.
        batch_size: examples at a time.
    """

    direction: Direction = Direction.BOTH
    path: Path = Path.INPUTS
    steps: int = 4
    mixed: int = 1
    seed: int = 0
    sign: Sign = Sign.ABSOLUTE
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError("steps must be at least 1", got=str(self.steps))
        for name, kinds in (("direction", Direction), ("path", Path), ("sign", Sign)):
            value = getattr(self, name)
            if value not in set(kinds):
                raise OptionError(
                    f"no {name} '{value}'",
                    expected=f"one of {', '.join(kinds)}",
                    nearest=nearest(str(value), kinds),
                )
            object.__setattr__(self, name, kinds(value))

    @property
    def caveats(self) -> tuple[str, ...]:
        """Kinds of circuit that these options are known not to see."""
        found = []
        if self.path is Path.NONE and self.direction is Direction.NOISING:
            found.append(
                "gradients at the clean point alone do not see a writer that another one backs up "
                "(OR, backup)"
            )
        if self.path is Path.NONE and self.direction is Direction.DENOISING:
            found.append("gradients at the corrupt point alone do not see parts that need others")
        if self.path is not Path.NONE and self.sign is Sign.SIGNED:
            found.append("effects that change sign on the way (XOR) cancel in a signed integral")
        return tuple(found)

    def run(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        *,
        progress: Progress = SILENT,
    ) -> EdgeScores:
        """Score every edge; see the class."""
        contrasts = [contrasts] if isinstance(contrasts, Contrast) else list(contrasts)
        for caveat in self.caveats:
            warnings.warn(f"edge attribution: {caveat}", BlindSpotWarning, stacklevel=2)
        total = _Totals.empty(wiring)
        progress.start("edge attribution", sum(c.num_rows for c in contrasts), "examples")
        for contrast in contrasts:
            for batch in contrast.batches(self.batch_size):
                self._add(wiring, batch, total)
                progress.advance(batch.num_rows)
        progress.finish()
        if not total.squares.any():  # signed effects may also cancel, which is an answer
            raise TargetError(
                f"the metric '{contrasts[0].metric.name}' has exactly zero gradient at every "
                "point, so first-order scores say nothing",
                hint="a distance from the clean output has no slope at the clean point: use a "
                "logit difference, direction='both' or points between the ends",
            )
        scores, spread = total.mean_and_error()
        record = Provenance(
            model=wiring.net.name,
            model_hash=wiring.net.hash,
            task=contrasts[0].name,
            data_hash=" ".join(c.data_hash for c in contrasts),
            metric=contrasts[0].metric.name,
            method="edge attribution",
            ablation="resample",
            direction=self.direction,
            sign=self.sign,
            options=self._options(),
            versions={"torch": torch.__version__},
        )
        return EdgeScores(
            circuit=scored(wiring, scores, record),
            nodes=total.nodes / total.num,
            spread=spread,
            metric_clean=total.clean / total.num,
            metric_corrupt=total.corrupt / total.num,
            num_examples=total.num,
            caveats=self.caveats + total.caveats(),
        )

    def _options(self) -> dict[str, Json]:
        return {k: str(v) if isinstance(v, StrEnum) else v for k, v in vars(self).items()}

    def _add(self, wiring: Wiring, batch: Batch, total: _Totals) -> None:
        """Effects of one batch, averaged over the points."""
        clean = self._end(wiring, batch, self.direction is not Direction.DENOISING)
        corrupt = self._end(wiring, batch.turned(), self.direction is not Direction.NOISING)
        changes = [y - x for x, y in zip(clean.at, corrupt.at, strict=True)]
        points = [e.slopes for e in (clean, corrupt) if e.slopes is not None]
        total.flat |= {
            name
            for name, end in (("clean", clean), ("corrupt", corrupt))
            if end.slopes is not None and not any(bool(r.any()) for r in end.slopes.reads)
        }
        edges, nodes = self._sized(wiring, changes, points)
        num = len(points)
        if self.path is Path.INPUTS:
            points = [
                *self._between(wiring, batch, clean.at, changes, wiring.roots),
                *self._at_mixed(wiring, batch, clean.at, changes),
            ]
            more_edges, more_nodes = self._sized(wiring, changes, points)
            edges, nodes, num = edges + more_edges, nodes + more_nodes, num + len(points)
        elif self.path is Path.ACTIVATIONS:
            more_edges, more_nodes = self._by_source(wiring, batch, clean.at, changes)
            edges, nodes, num = edges + more_edges, nodes + more_nodes, num + self.steps
        total.add(edges / num, nodes / num, clean.metric, corrupt.metric)

    def _end(self, wiring: Wiring, batch: Batch, with_slopes: bool) -> _End:
        if with_slopes:
            slopes = wiring.slopes(batch.clean, batch.metric, batch.rows)
            return _End(slopes.at, slopes.metric, slopes)
        recorded = wiring.record(batch.clean)
        with torch.no_grad():
            metric = measured(batch.metric, recorded.output, batch.rows)
        return _End(recorded.values, metric, None)

    def _between(
        self,
        wiring: Wiring,
        batch: Batch,
        start: Sequence[Tensor],
        changes: Sequence[Tensor],
        sources: Sequence[int],
    ) -> Iterator[Slopes]:
        """Slopes where these sources are held at points on the way from clean to corrupt."""
        for step in range(self.steps):
            t = (step + 0.5) / self.steps
            held = {i: start[i] + t * changes[i] for i in sources}
            yield wiring.slopes(batch.clean, batch.metric, batch.rows, held)

    def _at_mixed(
        self, wiring: Wiring, batch: Batch, start: Sequence[Tensor], changes: Sequence[Tensor]
    ) -> Iterator[Slopes]:
        """Slopes where half of the differing places of the roots are corrupt, then the others."""
        for draw in range(self.mixed):
            halves = _halves(wiring, changes, self.seed + draw)
            if halves is None:
                return  # nothing differs at two places
            for turned in (False, True):
                held = {
                    i: start[i] + (1 - half if turned else half) * changes[i]
                    for i, half in halves.items()
                }
                yield wiring.slopes(batch.clean, batch.metric, batch.rows, held)

    def _by_source(
        self, wiring: Wiring, batch: Batch, start: Sequence[Tensor], changes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each writer's effects from the points at which its own source is on the way."""
        edges = changes[0].new_zeros(batch.num_rows, *wiring.possible.shape)
        nodes = changes[0].new_zeros(batch.num_rows, len(wiring.writers))
        for i in range(len(changes)):
            alone = [d if j == i else torch.zeros_like(d) for j, d in enumerate(changes)]
            points = self._between(wiring, batch, start, changes, [i])
            more_edges, more_nodes = self._sized(wiring, alone, points)
            edges, nodes = edges + more_edges, nodes + more_nodes
        return edges, nodes

    def _sized(
        self, wiring: Wiring, changes: Sequence[Tensor], points: Iterable[Slopes]
    ) -> tuple[Tensor, Tensor]:
        """Sum over the points of the effects of edges and of writers, by example."""
        edges = changes[0].new_zeros(())
        nodes = changes[0].new_zeros(())
        for slopes in points:
            by_edge = wiring.products(changes, slopes)
            by_node = wiring.node_products(changes, slopes)
            signed = self.sign is Sign.SIGNED
            edges = edges + (by_edge if signed else by_edge.abs())
            nodes = nodes + (by_node if signed else by_node.abs())
        return edges, nodes


def _halves(wiring: Wiring, changes: Sequence[Tensor], seed: int) -> dict[int, Tensor] | None:
    """For every root a mask, 1 at a random half of the places at which a row differs.

    It depends on the row and the seed only, so that batches do not matter. Roots with as many
    places share their halves. None where no row differs at two places.
    """
    differs: dict[int, Tensor] = {}
    for i in wiring.roots:
        changed = (changes[i] != 0).movedim(wiring.place_axis(i), 1)
        places = changed.reshape(*changed.shape[:2], -1).any(2)
        size = places.shape[1]
        differs[size] = differs[size] | places if size in differs else places
    if not any(bool((d.sum(1) > 1).any()) for d in differs.values()):
        return None
    halves = {}
    for size, where in differs.items():
        keys = torch.rand(size, generator=torch.Generator().manual_seed(seed))
        rank = torch.where(where, keys, torch.inf).argsort(1).argsort(1)
        halves[size] = where & (rank < where.sum(1, keepdim=True) / 2)
    made = {}
    for i in wiring.roots:
        axis = wiring.place_axis(i)
        half = halves[changes[i].shape[axis]]
        shape = [half.shape[a] if a == 0 else 1 for a in range(changes[i].ndim)]
        shape[axis] = half.shape[1]
        made[i] = half.reshape(shape).to(changes[i].dtype)
    return made


@dataclass(frozen=True)
class _End:
    """One of the two runs."""

    at: tuple[Tensor, ...]
    metric: Tensor
    slopes: Slopes | None


@dataclass
class _Totals:
    """Sums over examples, in double precision."""

    edges: np.ndarray
    squares: np.ndarray
    nodes: np.ndarray
    clean: float = 0.0
    corrupt: float = 0.0
    num: int = 0
    flat: set[str] = field(default_factory=set)

    @classmethod
    def empty(cls, wiring: Wiring) -> _Totals:
        shape = wiring.possible.shape
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape[1]))

    def add(self, edges: Tensor, nodes: Tensor, clean: Tensor, corrupt: Tensor) -> None:
        by_example = edges.double()
        self.edges += by_example.sum(0).numpy()
        self.squares += (by_example**2).sum(0).numpy()
        self.nodes += nodes.double().sum(0).numpy()
        self.clean += float(clean.sum())
        self.corrupt += float(corrupt.sum())
        self.num += clean.numel()

    def mean_and_error(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.edges / self.num
        variance = np.maximum(self.squares / self.num - mean**2, 0)
        return mean, np.sqrt(variance / max(1, self.num - 1))

    def caveats(self) -> tuple[str, ...]:
        return tuple(
            f"the gradient is exactly zero at the {end} point, which therefore adds nothing"
            for end in sorted(self.flat)
        )

"""How well methods find circuits that are known: every method on every planted network.

Suites:
    motifs      AND, OR, XOR and BACKUP, as transformers and as perceptrons
    together    the same on pairs in which both features always change together
    programs    every program of the RASP-like language, compiled
    hard        the hard variants of compiled programs, and the planted perceptrons,
                convolutional, recurrent and message-passing networks

Every figure is there for edges and for nodes (writers), against both truths; see
`patchclamp.methods.circuits.checking.recovery`. Patching can see the active truth. The
structural one also holds edges that matter on no pair, which no method that patches finds.

Controls. *Random weights*: the same anatomy with weights drawn anew, scored against the
edges that were planted in other weights. Such networks are not at 0.5 against all edges,
because planted edges have kinds (values, embeddings, the output) whose scores are large
in any network; among likes they are. *Shuffled metric*: the sign of every pair's
metric drawn at random. Sizes of effects do not see signs, so this leaves the default
method's scores as they are, to the last bit. It is a control for evidence that effects go one way
(the mean effect over its standard error), and only where every edge carries something, as under
noise: an edge that carries nothing is told apart under any metric.

Opening a network costs far more than scoring it (most of it is `torch.export`), so
every network is opened once for all methods, and its weights are replaced in place.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Circuit, Provenance
from patchclamp.core.errors import OptionError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric
from patchclamp.methods.circuits.checking.recovery import Recovery, edge_recovery, node_recovery
from patchclamp.methods.circuits.finding.acdc import ACDC
from patchclamp.methods.circuits.finding.edge_attribution import (
    BlindSpotWarning,
    Direction,
    EdgeAttribution,
    Path,
    Sign,
)
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges, verified
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.wiring import Wiring, scored, wire
from patchclamp.truth.algorithms import ALGORITHMS, plant_algorithm
from patchclamp.truth.motifs import Form, Pairs, motif
from patchclamp.truth.planted_circuit import PlantedCircuit, Truth
from patchclamp.truth.planted_layers import KINDS, plant_layers
from patchclamp.truth.rasp import PROGRAMS, compiled, hard_variants

Found = tuple[Circuit, np.ndarray | None]
"""Scores of edges; and of writers, where a method gives any."""

Finder = Callable[[Wiring, Contrast], Found]

REQUIRED_MOTIFS = ("and", "or", "xor", "backup")

DEFAULT = "default"


def attribution(method: EdgeAttribution) -> Finder:
    """Edge attribution as a finder, also with options that are known to be blind."""

    def find(wiring: Wiring, pairs: Contrast) -> Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BlindSpotWarning)  # what they miss is shown here
            scores = method.run(wiring, pairs)
        return scores.circuit, scores.nodes

    return find


def evidence(wiring: Wiring, pairs: Contrast) -> Found:
    """Mean signed first-order effect over its standard error: does it go one way?"""
    scores = EdgeAttribution(path=Path.NONE, sign=Sign.SIGNED).run(wiring, pairs)
    made = scores.circuit.scores
    least = 1e-12 * np.abs(made).max() + np.finfo(float).tiny  # effects may be all alike
    return scored(wiring, made / (scores.spread + least), scores.circuit.record), None


def exact(method: ExactEdges) -> Finder:
    """Measured effects of all edges as a finder."""

    def find(wiring: Wiring, pairs: Contrast) -> Found:
        blank = scored(wiring, np.zeros(wiring.possible.shape), Provenance(method="exact edges"))
        return verified(blank, method.run(wiring, pairs)), None

    return find


def pruning(method: ACDC) -> Finder:
    """ACDC as a finder: edges by what cutting them cost."""

    def find(wiring: Wiring, pairs: Contrast) -> Found:
        return method.run(wiring, pairs).circuit, None

    return find


METHODS: dict[str, Finder] = {
    DEFAULT: attribution(EdgeAttribution()),
    "noising only": attribution(EdgeAttribution(direction=Direction.NOISING, path=Path.NONE)),
    "denoising only": attribution(EdgeAttribution(direction=Direction.DENOISING, path=Path.NONE)),
    "both ends": attribution(EdgeAttribution(path=Path.NONE)),
    "signed integral": attribution(EdgeAttribution(sign=Sign.SIGNED)),
    "activations path": attribution(EdgeAttribution(path=Path.ACTIVATIONS)),
    "sixteen points": attribution(EdgeAttribution(steps=16)),
    "ACDC": pruning(ACDC(threshold=1e-3, batch_size=64)),
    "exact, noising": exact(ExactEdges(direction=Direction.NOISING, max_rows=2048)),
    "exact, denoising": exact(ExactEdges(direction=Direction.DENOISING, max_rows=2048)),
    "exact, both": exact(ExactEdges(max_rows=2048)),
}
"""What is compared. ACDC has one threshold for all networks."""


def motifs(
    names: Iterable[str] = REQUIRED_MOTIFS, num_seeds: int = 3, pairs: Pairs = Pairs.ALL
) -> Iterator[PlantedCircuit]:
    """Motifs in both forms."""
    for name in names:
        for form in Form:
            yield from (motif(name, seed, form, pairs=pairs) for seed in range(num_seeds))


def programs() -> Iterator[PlantedCircuit]:
    """Every compiled program."""
    yield from (compiled(name) for name in PROGRAMS)


def hard() -> Iterator[PlantedCircuit]:
    """48 transformers, and 27 networks of other kinds."""
    yield from hard_variants(0)
    for name in KINDS:
        yield from (plant_layers(name, seed) for seed in range(2))
    yield from (plant_algorithm(name) for name in ALGORITHMS)


SUITES: dict[str, Callable[[], Iterator[PlantedCircuit]]] = {
    "motifs": motifs,
    "together": lambda: motifs(pairs=Pairs.TOGETHER),
    "programs": programs,
    "hard": hard,
}


def suite(name: str) -> Iterator[PlantedCircuit]:
    """The planted circuits of a suite; see the module.

    Raises:
        OptionError: there is no such suite.
    """
    if name not in SUITES:
        raise OptionError(f"no suite '{name}'", nearest=nearest(name, SUITES))
    return SUITES[name]()


@dataclass(frozen=True, kw_only=True)
class FindingBench:
    """Methods over planted circuits.

    Shapes: tables (circuit x method x part x truth). A part of which everything, or nothing, is
        true has no row.
    Units: see `Recovery`; seconds are of the CPU, for scoring alone.
    Randomness: intervals and controls, from `seed`.
    Cost: opening every network, and every method on it.
    Raises: what methods raise.
    Fails when: nothing known.
    Source: Syed et al. 2023 and Conmy et al. 2023 (edges as a ranking against a known circuit).

    Attributes:
        methods: by name.
        num_draws: of the bootstrap.
    """

    methods: Mapping[str, Finder] = field(default_factory=lambda: METHODS)
    num_draws: int = 200
    seed: int = 0

    def run(
        self, circuits: Iterable[PlantedCircuit], *, progress: Progress = SILENT
    ) -> pl.DataFrame:
        """Every method on every circuit."""
        rows = []
        progress.start("finding planted circuits", None, "circuits")
        for planted in circuits:
            wiring = opened(planted)
            for name, find in self.methods.items():
                pairs = contrast(wiring.net, planted.clean, planted.corrupt, planted.metric)
                rows += self._rows(planted, name, find, wiring, pairs)
            progress.advance()
        progress.finish()
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def random_weights(
        self, circuits: Iterable[PlantedCircuit], num_seeds: int = 3
    ) -> pl.DataFrame:
        """Every method on networks of the same anatomy, against edges they do not have."""
        rows = []
        for planted in circuits:
            wiring = opened(planted)
            pairs = contrast(wiring.net, planted.clean, planted.corrupt, planted.metric)
            for seed in range(num_seeds):
                with drawn_weights(wiring.net.module, self.seed + seed):
                    for name, find in self.methods.items():
                        rows += self._rows(planted, name, find, wiring, pairs)
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def shuffled_metric(
        self, circuits: Iterable[PlantedCircuit], num_seeds: int = 3
    ) -> pl.DataFrame:
        """Every method with the sign of every pair's metric drawn at random."""
        rows = []
        for planted in circuits:
            wiring = opened(planted)
            for seed in range(num_seeds):
                metric = random_signs(planted.metric, planted.num_pairs, self.seed + seed)
                pairs = contrast(wiring.net, planted.clean, planted.corrupt, metric)
                for name, find in self.methods.items():
                    rows += self._rows(planted, name, find, wiring, pairs)
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def _rows(
        self, planted: PlantedCircuit, name: str, find: Finder, wiring: Wiring, pairs: Contrast
    ) -> list[tuple[object, ...]]:
        began = time.process_time()
        circuit, nodes = find(wiring, pairs)
        seconds = time.process_time() - began
        found: list[Recovery] = []
        for truth in Truth:
            edges = planted.edges(truth)
            writers = {edge.writer for edge in edges}
            if 0 < len(edges) < circuit.num_possible:
                found.append(
                    edge_recovery(circuit, edges, truth, num_draws=self.num_draws, seed=self.seed)
                )
            if 0 < len(writers) < int(circuit.possible.any(0).sum()):
                found.append(
                    node_recovery(
                        circuit, nodes, writers, truth, num_draws=self.num_draws, seed=self.seed
                    )
                )
        head = (planted.name, str(planted.family), name)
        return [(*head, *_columns(r), seconds) for r in found]


SCHEMA = {
    "circuit": pl.String,
    "family": pl.String,
    "method": pl.String,
    "part": pl.String,
    "truth": pl.String,
    "auroc": pl.Float64,
    "auroc_low": pl.Float64,
    "auroc_high": pl.Float64,
    "average_precision": pl.Float64,
    "average_precision_low": pl.Float64,
    "average_precision_high": pl.Float64,
    "auroc_among_likes": pl.Float64,
    "num_like_pairs": pl.Int64,
    "num_true": pl.Int64,
    "num": pl.Int64,
    "seconds": pl.Float64,
}
"""Columns of the tables."""


def _columns(r: Recovery) -> Sequence[object]:
    return (
        str(r.part),
        str(r.truth),
        r.auroc,
        r.auroc_interval.low,
        r.auroc_interval.high,
        r.average_precision,
        r.average_precision_interval.low,
        r.average_precision_interval.high,
        r.auroc_among_likes,
        r.num_like_pairs,
        r.num_true,
        r.num,
    )


def opened(planted: PlantedCircuit) -> Wiring:
    """The wiring of a copy of a planted network."""
    net = patchclamp.open(copy.deepcopy(planted.module), planted.clean[:2])
    return wire(net)


@contextmanager
def drawn_weights(module: nn.Module, seed: int) -> Iterator[None]:
    """While this holds, every weight is normal, of a size that keeps that of what it reads."""
    generator = torch.Generator().manual_seed(seed)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(drawn * (fan_in**-0.5 if p.ndim > 1 else 0.1))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(module.parameters(), before, strict=True):
                p.copy_(old)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Signed:
    """A metric, turned round for some pairs."""

    metric: Metric
    signs: Tensor

    @property
    def name(self) -> str:
        return f"{self.metric.name}, signs shuffled"

    @property
    def position(self) -> int | None:
        return self.metric.position

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return self.metric(output, rows) * self.signs[rows].to(output)


def random_signs(metric: Metric, num_pairs: int, seed: int) -> Metric:
    """The metric times 1 or -1, drawn for every pair."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (num_pairs,), generator=generator) - 1
    return _Signed(metric=metric, signs=signs)

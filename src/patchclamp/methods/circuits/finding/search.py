"""From a behaviour to a circuit that has been checked: one call for the whole way.

1. Does the network do it at all? If not, there is nothing to explain.
2. Score all edges to first order, on the training pairs.
3. Cut the largest ones exactly, and say how far the two agree.
4. Keep the smallest measured share of edges whose circuit is faithful enough.
5. Check that circuit on held-out pairs: other names, other templates.

Everything needed to do it again is in the circuit's record; `again` does it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from patchclamp.core.circuit import Circuit, Node, Provenance
from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.data.behaviours import token_pairs
from patchclamp.data.behaviours.pairs import PromptSet, Split, TokenPairs, tokenised
from patchclamp.methods.circuits.checking.behaviour import Performance, performs
from patchclamp.methods.circuits.checking.evaluation import Evaluation, Faithfulness, Parts, parts
from patchclamp.methods.circuits.checking.metrics import metric_for
from patchclamp.methods.circuits.finding.edge_attribution import (
    Direction,
    EdgeAttribution,
    EdgeScores,
    Path,
    Sign,
)
from patchclamp.methods.circuits.finding.exact_edges import Effects, ExactEdges
from patchclamp.methods.circuits.network.ablation import Ablation, references
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.masks import connected
from patchclamp.methods.circuits.network.wiring import Wiring, wire
from patchclamp.net import Net

GRID = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.07,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
)
"""Sizes that are tried, as shares of all edges."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A behaviour with its pairs, for finding and for checking.

    Attributes:
        name, variant: of the behaviour; the file's name for the user's own pairs.
        train, held_out: pairs, one `TokenPairs` for each length of prompt.
        seed: that the shipped pairs were drawn with; None for the user's own.
    """

    name: str
    train: tuple[TokenPairs, ...]
    held_out: tuple[TokenPairs, ...]
    variant: str = ""
    seed: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Training and held-out pairs."""
        return sum(map(len, self.train)), sum(map(len, self.held_out))


def shipped_task(
    net: Net,
    name: str,
    *,
    num: int = 32,
    num_held_out: int = 32,
    seed: int = 0,
    variant: str = "",
) -> Task:
    """A shipped behaviour for this network; held-out pairs share no name or template.

    Raises: DataError as for `patchclamp.data.behaviours.token_pairs`.
    """
    sets = {}
    for split, count in ((Split.TRAIN, num), (Split.HELD_OUT, num_held_out)):
        sets[split] = token_pairs(
            name,
            count,
            tokenizer=net.tokenizer,
            seed=seed,
            split=split,
            variant=variant or None,
        )
    return Task(
        name=name,
        train=sets[Split.TRAIN],
        held_out=sets[Split.HELD_OUT],
        variant=variant,
        seed=seed,
    )


def own_task(net: Net, pairs: PromptSet, *, held_out_share: float = 0.5, seed: int = 0) -> Task:
    """The user's pairs, split at random into those for finding and those for checking.

    Raises: DataError for fewer than four pairs, or as for `tokenised`.
    """
    if net.tokenizer is None:
        raise DataError(f"{net.name} has no tokenizer and cannot take prompts of text")
    if len(pairs) < 4:
        raise DataError("a circuit needs at least four pairs", got=str(len(pairs)))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(len(pairs) - 2, max(2, round(len(pairs) * (1 - held_out_share))))
    picked = (sorted(order[:cut]), sorted(order[cut:]))
    halves = [
        tokenised(
            dataclasses.replace(pairs, pairs=tuple(pairs.pairs[i] for i in rows)), net.tokenizer
        )
        for rows in picked
    ]
    return Task(name=pairs.name, train=halves[0], held_out=halves[1], seed=seed)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A circuit with its evidence.

    Attributes:
        circuit: scores of all edges, the kept ones marked, and the record.
        wiring: of the network.
        performance: of the whole network on the held-out pairs.
        scores: first-order scores.
        effects: exact effects of the edges with the largest scores.
        agreement: rank correlation of the two over those edges.
        train, held_out: faithfulness over sizes.
        parts: completeness and minimality on the held-out pairs.
        by_node: faithfulness over how many whole writers are kept, on the held-out pairs.
    """

    circuit: Circuit
    wiring: Wiring
    performance: Performance
    scores: EdgeScores
    effects: Effects
    agreement: float
    train: Faithfulness
    held_out: Faithfulness
    parts: Parts
    by_node: Faithfulness | None = None
    warnings: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes that a kept edge touches."""
        return tuple(self.circuit.nodes())


@dataclass(frozen=True, kw_only=True)
class CircuitSearch:
    """Find the circuit of a task and check it; see the module.

    Shapes: those of the task's pairs. Units: those of the task's metric.
    Randomness: random circuits and bootstrap, from `seed`.
    Cost: attribution, `verify` exact edges, and sizes x (2 + num_random) masked runs of all pairs.
    Raises: DataError where the network does not do the task, unless `force`.
    Fails when: the circuit of one prompt set is taken for that of another.
    Source: the steps are those of Wang et al. 2022, Hanna et al. 2024 and Mueller et al. 2025.

    Attributes:
        level: faithfulness that the kept circuit must reach on the training pairs.
        ablation: what cut edges carry.
        verify: how many of the largest edges are cut exactly.
        force: go on where the network does not do the task; the result says so.
    """

    attribution: EdgeAttribution = field(default_factory=EdgeAttribution)
    level: float = 0.9
    ablation: Ablation = Ablation.RESAMPLE
    fractions: tuple[float, ...] = GRID
    verify: int = 32
    num_random: int = 3
    max_parts: int = 32
    batch_size: int = 16
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise OptionError("the level of faithfulness is a share", got=f"{self.level}")

    def run(
        self,
        net: Net,
        task: Task,
        *,
        performance: Performance | None = None,
        progress: Progress = SILENT,
    ) -> Found:
        """Find, keep, check.

        Args:
            performance: of the network on the held-out pairs, where it was measured already.
        """
        performance = performance or performs(net, task.held_out)
        if performance.objection is not None and not self.force:
            performance.require()
        drawn = Provenance(
            task=task.name,
            seed=task.seed,
            options={
                "variant": task.variant,
                "num": task.sizes[0],
                "num_held_out": task.sizes[1],
            },
        )
        train, held_out = contrasts_of(net, task.train), contrasts_of(net, task.held_out)
        return self.on(wire(net), train, held_out, performance, drawn, progress=progress)

    def on(
        self,
        wiring: Wiring,
        train: Sequence[Contrast],
        held_out: Sequence[Contrast],
        performance: Performance,
        drawn: Provenance,
        *,
        progress: Progress = SILENT,
    ) -> Found:
        """The same for any contrasts.

        Args:
            drawn: task, seed and options that say how the contrasts were drawn.
        """
        noted = [*wiring.notes]
        if performance.objection is not None:
            noted.append(performance.objection)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = self.attribution.run(wiring, train, progress=progress)
        noted += [str(w.message) for w in caught]
        noted += [c for c in scores.caveats if c not in " ".join(noted)]
        held = references(wiring, train, self.ablation, batch_size=self.batch_size, seed=self.seed)
        evaluation = Evaluation(
            fractions=self.fractions,
            num_random=self.num_random,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        curve = evaluation.run(wiring, train, scores.circuit, held, progress=progress)
        circuit, reached = self._kept(wiring, scores.circuit, curve)
        if not reached:
            noted.append(f"no measured size stays at a faithfulness of {self.level:g}")
        circuit = self._recorded(circuit, drawn, train, held_out)
        exact = ExactEdges(batch_size=self.batch_size)
        top = circuit.top(self.verify).edges()
        effects = exact.run(wiring, train, top, held, progress=progress)
        return Found(
            circuit=circuit,
            wiring=wiring,
            performance=performance,
            scores=scores,
            effects=effects,
            agreement=_agreement(circuit, effects),
            train=curve,
            held_out=evaluation.run(wiring, held_out, circuit, held, progress=progress),
            parts=parts(
                wiring,
                held_out,
                circuit,
                held,
                max_edges=self.max_parts,
                batch_size=self.batch_size,
                progress=progress,
            ),
            by_node=evaluation.run_nodes(wiring, held_out, scores.nodes, held, progress=progress),
            warnings=tuple(dict.fromkeys(noted)),
        )

    def _kept(self, wiring: Wiring, circuit: Circuit, curve: Faithfulness) -> tuple[Circuit, bool]:
        """The connected part of the smallest circuit that is faithful enough."""
        point = curve.size_at(self.level)
        size = circuit.num_possible if point is None else point.num_edges
        kept = circuit.top(size)
        return kept.with_kept(connected(wiring, kept.kept)), point is not None

    def _recorded(
        self,
        circuit: Circuit,
        drawn: Provenance,
        train: Sequence[Contrast],
        held_out: Sequence[Contrast],
    ) -> Circuit:
        options: dict[str, Json] = {
            **drawn.options,
            "held_out_hash": " ".join(c.data_hash for c in held_out),
            "attribution": dict(circuit.record.options),
            "level": self.level,
            "fractions": list(self.fractions),
            "batch_size": self.batch_size,
            "search_seed": self.seed,
            "force": self.force,
        }
        record = dataclasses.replace(
            circuit.record,
            task=drawn.task,
            data_hash=" ".join(c.data_hash for c in train),
            ablation=self.ablation,
            seed=drawn.seed,
            options=options,
        )
        return dataclasses.replace(circuit, record=record)


def contrasts_of(net: Net, pairs: Sequence[TokenPairs]) -> list[Contrast]:
    """Contrasts of token pairs, one for each length."""
    return [contrast(net, p.clean, p.corrupt, metric_for(p), name=p.name) for p in pairs]


def _agreement(circuit: Circuit, effects: Effects) -> float:
    """Spearman's rank correlation of first-order scores and exact sizes; 0 for fewer than three."""
    if len(effects.edges) < 3:
        return 0.0
    row = {(r.node, r.slot): i for i, r in enumerate(circuit.readers)}
    column = {w: i for i, w in enumerate(circuit.writers)}
    first = [abs(circuit.scores[row[e.reader, e.slot], column[e.writer]]) for e in effects.edges]
    return _spearman(np.array(first), effects.sizes.numpy())


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(v, kind="stable"), kind="stable").astype(float) for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A circuit found again from its record.

    Attributes:
        found: what was found now.
        same_edges: Jaccard index of the kept edges; 1 where they are the same.
        largest_change: of any score, relative to the largest score.
    """

    found: Found
    same_edges: float
    largest_change: float


def again(net: Net, circuit: Circuit, *, progress: Progress = SILENT) -> Reproduction:
    """Find a circuit once more, from nothing but its record.

    Raises:
        DataError: the record is of another network, or not of a shipped behaviour.
    """
    record = circuit.record
    if record.model_hash != net.hash:
        raise DataError(
            "the circuit was found in another network",
            got=f"{record.model} with weights {record.model_hash[:12]}",
            expected=f"{net.name} with weights {net.hash[:12]}",
        )
    options = record.options
    num, num_held = options.get("num"), options.get("num_held_out")
    if record.seed is None or not isinstance(num, int) or not isinstance(num_held, int):
        raise DataError("the record does not say how the pairs were drawn")
    task = shipped_task(
        net,
        record.task,
        num=num,
        num_held_out=num_held,
        seed=record.seed,
        variant=str(options.get("variant", "")),
    )
    try:
        search = _search(record)
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"the record's options cannot be read: {e}") from None
    found = search.run(net, task, progress=progress)
    if found.circuit.record.data_hash != record.data_hash:
        raise DataError(
            "the pairs drawn now are not those of the record",
            hint="the generator or the tokenizer has changed",
        )
    both = (found.circuit.kept & circuit.kept).sum()
    either = (found.circuit.kept | circuit.kept).sum()
    scale = max(float(np.abs(circuit.scores).max()), 1e-12)
    return Reproduction(
        found=found,
        same_edges=float(both / either) if either else 1.0,
        largest_change=float(np.abs(found.circuit.scores - circuit.scores).max()) / scale,
    )


def _search(record: Provenance) -> CircuitSearch:
    """The options of a record. Raises KeyError, TypeError or ValueError for a damaged one."""
    options = record.options
    inner, fractions = options["attribution"], options["fractions"]
    if not isinstance(inner, Mapping) or not isinstance(fractions, (list, tuple)):
        raise TypeError("'attribution' or 'fractions' is missing")
    attribution = EdgeAttribution(
        direction=Direction(str(inner["direction"])),
        path=Path(str(inner["path"])),
        steps=int(str(inner["steps"])),
        mixed=int(str(inner["mixed"])),
        seed=int(str(inner["seed"])),
        sign=Sign(str(inner["sign"])),
        batch_size=int(str(inner["batch_size"])),
    )
    return CircuitSearch(
        attribution=attribution,
        level=float(str(options["level"])),
        fractions=tuple(float(str(f)) for f in fractions),
        ablation=Ablation(record.ablation),
        batch_size=int(str(options["batch_size"])),
        seed=int(str(options["search_seed"])),
        force=bool(options["force"]),
    )

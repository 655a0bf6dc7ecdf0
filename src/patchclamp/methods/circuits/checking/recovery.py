"""How well scores find a circuit that is known: AUROC and average precision.

AUROC is the chance that a true edge scores above one that is not, ties counting half;
average precision is the mean, over the true edges, of the share of true ones among all
that score at least as high. Both depend on the order of scores alone, and edges with the
same score are never put in an order: many edges of planted networks have exactly 0.

Where few of many edges are true, average precision says more. Edges and nodes are reported
apart, and every figure says which truth it is against: "structural" (the construction
uses the edge) or "active" (patching this edge alone moves the metric).

Anatomy alone tells something: values carry more than queries, and the embedding reaches
everything, in random networks too. So there is also an AUROC among likes: over pairs of a
true edge and another one from the same site to the same site and slot, which differ in
units and heads only. Scores that know nothing of the circuit are at 0.5 there.

Sources: Fawcett 2006 (AUROC by ranks); Su, Yuan & Zhu 2015 (average precision).

Shape suffixes: D draws of the bootstrap, G distinct scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Int

from patchclamp.core.circuit import Circuit, Edge, Node, Reader
from patchclamp.core.errors import DataError, OptionError, nearest
from patchclamp.core.findings import Interval

TRUTHS = ("structural", "active")


class Part(StrEnum):
    """What is found."""

    EDGES = "edges"
    NODES = "nodes"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How well scores tell what is true from what is not.

    Attributes:
        part: edges, or nodes (writers).
        truth: "structural" or "active".
        auroc, average_precision: see the module; 0.5 and `num_true / num` are chance.
        auroc_interval, average_precision_interval: over what is possible.
        auroc_among_likes: see the module; None where no true one has a like that is not.
        num_true, num: how many are true, and possible.
        num_like_pairs: pairs that `auroc_among_likes` is about.
    """

    part: Part
    truth: str
    auroc: float
    auroc_interval: Interval
    average_precision: float
    average_precision_interval: Interval
    auroc_among_likes: float | None
    num_true: int
    num: int
    num_like_pairs: int


def edge_recovery(
    circuit: Circuit,
    true: Iterable[Edge],
    truth: str,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Recovery:
    """How well the sizes of a circuit's scores find these edges among all that are possible.

    Raises:
        DataError: a true edge is not possible in this network, or none is true, or all are.
        OptionError: `truth` is no kind of truth.
    """
    is_true = np.zeros_like(circuit.possible)
    row = {r: i for i, r in enumerate(circuit.readers)}
    column = {w: i for i, w in enumerate(circuit.writers)}
    for edge in true:
        reader, writer = row.get(Reader(edge.reader, edge.slot)), column.get(edge.writer)
        if reader is None or writer is None or not circuit.possible[reader, writer]:
            raise DataError(f"the true edge {edge} is none of the network's")
        is_true[reader, writer] = True
    on = circuit.possible
    return recovery(
        np.abs(circuit.scores[on]),
        is_true[on],
        Part.EDGES,
        truth,
        kinds=_kinds(circuit)[on],
        num_draws=num_draws,
        seed=seed,
    )


def node_recovery(
    circuit: Circuit,
    nodes: Float[np.ndarray, "W"] | None,
    true: Iterable[Node],
    truth: str,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Recovery:
    """How well writers' scores find these nodes among all writers that anybody can read.

    Args:
        nodes: a score for every writer; None for the largest of its edges.

    Raises:
        DataError: a true node is no writer of the network, or none is true, or all are.
        OptionError: `truth` is no kind of truth.
    """
    if nodes is None:
        nodes = np.abs(np.where(circuit.possible, circuit.scores, 0.0)).max(0)
    if nodes.shape != (len(circuit.writers),):
        raise DataError(
            "there is one score for each writer",
            got=str(nodes.shape),
            expected=f"({len(circuit.writers)},)",
        )
    wanted = set(true)
    read = {w for j, w in enumerate(circuit.writers) if circuit.possible[:, j].any()}
    on = np.array([w in read for w in circuit.writers])
    for node in sorted(wanted - read, key=str):
        raise DataError(
            f"the true node '{node}' is no writer of the network",
            nearest=nearest(str(node), [str(w) for w in read]),
        )
    is_true = np.array([w in wanted for w in circuit.writers])
    sites = _numbered([w.site for w in circuit.writers])
    return recovery(
        np.abs(nodes[on]),
        is_true[on],
        Part.NODES,
        truth,
        kinds=sites[on],
        num_draws=num_draws,
        seed=seed,
    )


def recovery(
    scores: Float[np.ndarray, "E"],
    is_true: Bool[np.ndarray, "E"],
    part: Part,
    truth: str,
    *,
    kinds: Int[np.ndarray, "E"] | None = None,
    num_draws: int = 1000,
    seed: int = 0,
) -> Recovery:
    """Both figures, with intervals from a bootstrap that draws what is true and what is not apart.

    Args:
        kinds: those of one kind are likes; None: all are.

    Randomness: the bootstrap, from `seed`. Cost: draws x distinct scores.

    Raises:
        DataError: none is true, or all are; a score is NaN.
        OptionError: `truth` is no kind of truth, or there are no draws.
    """
    if truth not in TRUTHS:
        raise OptionError(f"no truth '{truth}'", expected=" or ".join(TRUTHS))
    if num_draws < 1:
        raise OptionError("a bootstrap has at least one draw", got=str(num_draws))
    yes_G, no_G = _counts(scores, is_true, part)
    generator = np.random.default_rng(seed)
    num_true, num_false = int(yes_G.sum()), int(no_G.sum())
    yes_DG = generator.multinomial(num_true, yes_G / num_true, num_draws)
    no_DG = generator.multinomial(num_false, no_G / num_false, num_draws)
    likes, num_pairs = _among_likes(
        scores, is_true, np.zeros(len(scores)) if kinds is None else kinds
    )
    method = f"bootstrap over {num_true} true and {num_false} other {part}, {num_draws} draws"
    return Recovery(
        part=part,
        truth=truth,
        auroc=float(_auroc(yes_G, no_G)),
        auroc_interval=_interval(_auroc(yes_DG, no_DG), method),
        average_precision=float(_average_precision(yes_G, no_G)),
        average_precision_interval=_interval(_average_precision(yes_DG, no_DG), method),
        auroc_among_likes=likes,
        num_true=num_true,
        num=num_true + num_false,
        num_like_pairs=num_pairs,
    )


def auroc(scores: Float[np.ndarray, "E"], is_true: Bool[np.ndarray, "E"]) -> float:
    """The chance that a true one scores above another, ties counting half.

    Raises:
        DataError: none is true, or all are; a score is NaN.
    """
    return float(_auroc(*_counts(scores, is_true, Part.EDGES)))


def average_precision(scores: Float[np.ndarray, "E"], is_true: Bool[np.ndarray, "E"]) -> float:
    """Mean over the true ones of the share of true ones that score at least as high.

    Raises:
        DataError: none is true, or all are; a score is NaN.
    """
    return float(_average_precision(*_counts(scores, is_true, Part.EDGES)))


def _counts(
    scores: np.ndarray, is_true: np.ndarray, part: Part
) -> tuple[Int[np.ndarray, "G"], Int[np.ndarray, "G"]]:
    """How many true and other ones have each distinct score, lowest first."""
    if scores.shape != is_true.shape or scores.ndim != 1:
        raise DataError(
            "scores and truth must be lists of one length",
            got=f"{scores.shape} and {is_true.shape}",
        )
    if bool(np.isnan(scores).any()):
        raise DataError("a score is NaN")
    num_true = int(is_true.sum())
    if num_true in (0, is_true.size):
        raise DataError(
            f"there is nothing to tell apart: {'all' if num_true else 'none'} of the {part} are "
            "true",
            got=f"{num_true} of {is_true.size}",
            expected="some that are true and some that are not",
        )
    values, place = np.unique(scores, return_inverse=True)
    yes = np.bincount(place[is_true], minlength=values.size)
    return yes, np.bincount(place[~is_true], minlength=values.size)


def _among_likes(
    scores: np.ndarray, is_true: np.ndarray, kinds: np.ndarray
) -> tuple[float | None, int]:
    """AUROC over pairs of one kind, and how many there are."""
    won, num = 0.0, 0
    for kind in np.unique(kinds):
        mine = kinds == kind
        num_true = int(is_true[mine].sum())
        pairs = num_true * (int(mine.sum()) - num_true)
        if pairs:
            won += pairs * auroc(scores[mine], is_true[mine])
            num += pairs
    return (won / num if num else None), num


def _kinds(circuit: Circuit) -> Int[np.ndarray, "R W"]:
    """A number for every pair of sites, and slot, that an edge may go between."""
    writers = _numbered([w.site for w in circuit.writers])
    readers = _numbered([f"{r.slot} {r.node.site}" for r in circuit.readers])
    kinds: np.ndarray = readers[:, None] * len(circuit.writers) + writers
    return kinds


def _numbered(names: Sequence[str]) -> Int[np.ndarray, "_"]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def _auroc(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """From counts (..., G), lowest score first."""
    below = np.cumsum(no, -1) - no / 2
    made: np.ndarray = (yes * below).sum(-1) / (yes.sum(-1) * no.sum(-1))
    return made


def _average_precision(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """From counts (..., G), lowest score first."""
    true_above = np.cumsum(yes[..., ::-1], -1)
    all_above = np.cumsum((yes + no)[..., ::-1], -1)
    # where nothing is above, nothing is counted either
    precision = true_above / np.maximum(all_above, 1)
    made: np.ndarray = (yes[..., ::-1] * precision).sum(-1) / yes.sum(-1)
    return made


def _interval(draws: np.ndarray, method: str) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(low=float(low), high=float(high), method=method)

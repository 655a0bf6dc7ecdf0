"""How much two circuits share, by node, edge, head and kind of head, against chance.

Two circuits of a network overlap by chance alone, and the more so as both prefer the same
kinds of edge. The null therefore moves the second circuit's edges at random within groups
of like edges: same kind of reader (query, key, value, MLP, output) and same distance in
layers where layers are named, same reader site elsewhere.
Source: Merullo et al. 2024 (circuit overlap across tasks); Jaccard 1912.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from patchclamp.core.circuit import Circuit, Node, Reader
from patchclamp.core.errors import DataError
from patchclamp.methods.statistics import permutation_null, wilson

_LAYER = re.compile(r"(attn|mlp)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class CircuitComparison:
    """Overlap of two circuits of one network, or of networks with the same layers and heads.

    For each level: the Jaccard index (shared over either), the share of A's that B has and
    the reverse. Levels: "edge", "node" (as `Circuit.nodes`), "head", and
    "head: KIND" where kinds are given. The interval treats items as independent draws, which
    edges into one reader are not: it is a lower bound on the uncertainty.

    The null shuffles B's kept edges within groups of the same kind of reader and the same
    layer distance (same reader site, where sites name no layer), so B keeps its number of
    edges in each group; nodes and heads follow from the shuffled edges.

    Shapes: a row of the table for each level.
    Units: shares of 1.
    Randomness: the null's shuffles, by `seed`.
    Cost: num_nulls shuffles of the mask.
    Raises: DataError for circuits over different parts, or with no edge.
    Fails when: circuits were found with different ablations or metrics: overlap then
        compares methods as much as tasks. Records are not compared.
    Source: see the module docstring.
    """

    num_nulls: int = 999
    seed: int = 0

    def run(
        self,
        a: Circuit,
        b: Circuit,
        kinds: Mapping[tuple[int, int], Collection[str]] | None = None,
    ) -> pl.DataFrame:
        """Columns: level, num_a, num_b, shared, jaccard, low, high, share_of_a, share_of_b,
        null_mean, null_low, null_high, p.

        Args:
            kinds: (layer, head) -> kinds of head, as `heads.kinds_of` gives them.
        """
        a, b = aligned(a, b)
        groups = _groups(a)
        levels = _levels(kinds or {})
        own = {level: pick(a, a.kept) for level, pick in levels.items()}
        other = {level: pick(b, b.kept) for level, pick in levels.items()}
        generator = np.random.default_rng(self.seed)
        drawn: dict[str, list[float]] = {level: [] for level in levels}
        for _ in range(self.num_nulls):
            shuffled = _shuffled(b.kept, groups, generator)
            for level, pick in levels.items():
                drawn[level].append(_jaccard(own[level], pick(b, shuffled)))
        listed = []
        for level in levels:
            mine, theirs = own[level], other[level]
            either, both = len(mine | theirs), len(mine & theirs)
            if either == 0:
                continue
            jaccard = both / either
            interval = wilson(both, either)
            null = permutation_null(
                jaccard, torch.tensor(drawn[level]), "B's edges moved among like edges"
            )
            listed.append(
                {
                    "level": level,
                    "num_a": len(mine),
                    "num_b": len(theirs),
                    "shared": both,
                    "jaccard": jaccard,
                    "low": interval.low,
                    "high": interval.high,
                    "share_of_a": both / len(mine) if mine else 0.0,
                    "share_of_b": both / len(theirs) if theirs else 0.0,
                    "null_mean": null.mean,
                    "null_low": null.low,
                    "null_high": null.high,
                    "p": null.p,
                }
            )
        return pl.DataFrame(listed)


def aligned(a: Circuit, b: Circuit) -> tuple[Circuit, Circuit]:
    """Both circuits over the parts that they have in common, in A's order.

    Layers and heads must correspond one to one. Only what writes to the stream before the
    first layer may differ (a network with a table of positions and one without): it is left
    out of both.

    Raises:
        DataError: a layer, head or reader of one is not in the other; or one has no edge.
    """
    for name, circuit in (("first", a), ("second", b)):
        if circuit.num_edges == 0:
            raise DataError(f"the {name} circuit keeps no edge, so there is nothing to compare")
    _same({str(r) for r in a.readers}, {str(r) for r in b.readers}, "reader")
    _same(
        {str(w) for w in a.writers if _layer(w) is not None or not _layered(a)},
        {str(w) for w in b.writers if _layer(w) is not None or not _layered(b)},
        "writer",
    )
    common = set(a.writers) & set(b.writers)
    writers = tuple(w for w in a.writers if w in common)
    a, b = _over(a, writers, a.readers), _over(b, writers, a.readers)
    if not bool((a.possible == b.possible).all()):
        reader, writer = (int(i) for i in np.argwhere(a.possible != b.possible)[0])
        raise DataError(
            "only one of the two networks has this edge, so their circuits cannot be compared",
            got=str(a.edge(reader, writer)),
        )
    return a, b


def _same(mine: set[str], theirs: set[str], what: str) -> None:
    missing = sorted(mine ^ theirs)
    if missing:
        where = "second" if missing[0] in mine else "first"
        raise DataError(
            "the circuits are over different parts and cannot be compared",
            got=f"{what} {missing[0]}, which the {where} lacks ({len(missing)} differ)",
            expected="the same layers and heads in both",
        )


def _over(circuit: Circuit, writers: tuple[Node, ...], readers: tuple[Reader, ...]) -> Circuit:
    row = {r: i for i, r in enumerate(circuit.readers)}
    column = {w: i for i, w in enumerate(circuit.writers)}
    chosen = np.ix_([row[r] for r in readers], [column[w] for w in writers])
    return Circuit(
        writers=writers,
        readers=readers,
        possible=circuit.possible[chosen],
        kept=circuit.kept[chosen],
        scores=circuit.scores[chosen],
        record=circuit.record,
    )


def _layered(circuit: Circuit) -> bool:
    return any(_layer(w) is not None for w in circuit.writers)


def _layer(node: Node) -> int | None:
    found = _LAYER.match(node.site)
    return int(found[2]) if found else None


def _kind(reader: Reader) -> str:
    return reader.slot or reader.node.site.split(".")[0]


def _groups(circuit: Circuit) -> list[np.ndarray]:
    """Flat indices of possible edges, in groups of like edges."""
    found: dict[Hashable, list[int]] = {}
    last = 1 + max((n for w in circuit.writers if (n := _layer(w)) is not None), default=0)
    for r, w in np.argwhere(circuit.possible):
        reader, writer = circuit.readers[r], circuit.writers[w]
        key: Hashable = reader.node.site
        if _layered(circuit):
            to, start = _layer(reader.node), _layer(writer)
            distance = (last if to is None else to) - (-1 if start is None else start)
            key = (_kind(reader), distance)
        found.setdefault(key, []).append(int(r) * len(circuit.writers) + int(w))
    return [np.array(group) for group in found.values()]


def _shuffled(
    kept: np.ndarray, groups: list[np.ndarray], generator: np.random.Generator
) -> np.ndarray:
    flat = kept.ravel().copy()
    for group in groups:
        flat[group] = generator.permutation(flat[group])
    return flat.reshape(kept.shape)


class _Pick:
    """The items of one level among an edge mask."""

    def __init__(self, level: str, heads: frozenset[tuple[int, int]] | None = None) -> None:
        self.level, self.heads = level, heads

    def __call__(self, circuit: Circuit, kept: np.ndarray) -> set[object]:
        if self.level == "edge":
            return set(np.flatnonzero(kept).tolist())
        wrote, took = (np.flatnonzero(kept.sum(axis)) for axis in (0, 1))
        nodes = {circuit.writers[w] for w in wrote} | {circuit.readers[r].node for r in took}
        if self.level == "node":
            return set(nodes)
        found = {(n, node.unit) for node in nodes if (n := _head_layer(node)) is not None}
        return set(found if self.heads is None else found & self.heads)


def _head_layer(node: Node) -> int | None:
    """Layer of a query head's node; None for other nodes, also for shared key heads."""
    layer = _layer(node)
    return layer if layer is not None and node.site == f"attn.{layer}.z" else None


def _levels(kinds: Mapping[tuple[int, int], Collection[str]]) -> dict[str, _Pick]:
    names = sorted({str(kind) for found in kinds.values() for kind in found})
    levels = {level: _Pick(level) for level in ("edge", "node", "head")}
    for name in names:
        of_kind = frozenset(h for h, found in kinds.items() if name in {str(k) for k in found})
        levels[f"head: {name}"] = _Pick("head", of_kind)
    return levels


def _jaccard(mine: set[object], theirs: set[object]) -> float:
    either = mine | theirs
    return len(mine & theirs) / len(either) if either else 0.0

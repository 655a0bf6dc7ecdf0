"""A circuit that was found, as people read it and as machines do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from patchclamp.cli import terminal

if TYPE_CHECKING:
    from patchclamp.core.circuit import Circuit
    from patchclamp.core.findings import Interval, Json
    from patchclamp.methods.circuits.checking.behaviour import Performance
    from patchclamp.methods.circuits.checking.evaluation import Point
    from patchclamp.methods.circuits.finding.search import Found

LEVELS = (0.8, 0.95, 0.99)
"""Faithfulness whose sizes are stated."""

EDGES_SHOWN, NODES_SHOWN = 20, 12
"""Rows and names of the summary; JSON has all."""

ROUNDING = 1e-6
"""Numbers below it are what single precision leaves of nothing."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The smallest measured size that is faithful enough on the training pairs, on both sets."""

    level: float
    train: Point | None
    held_out: Point | None


@dataclass(frozen=True, kw_only=True)
class EdgeRow:
    """One edge: what found it, what it does, and what the circuit is without it.

    Attributes:
        noising, denoising: mean change of the metric, exact.
        loss: fall of the circuit's faithfulness; None where that was not measured.
    """

    edge: str
    kept: bool
    score: float
    noising: float
    denoising: float
    loss: float | None


def reached(found: Found, level: float) -> bool:
    """Whether less than the whole network is faithful enough, on pairs that it was not found on."""
    point = found.train.size_at(level)
    small = point is not None and point.share < 1
    return small and found.parts.faithfulness >= level


def sizes(found: Found, level: float) -> list[Size]:
    """Sizes for the usual levels and the one that was asked for."""
    held_out = {point.num_edges: point for point in found.held_out.points}
    listed = []
    for wanted in sorted({*LEVELS, level}):
        point = found.train.size_at(wanted)
        other = None if point is None else held_out[point.num_edges]
        listed.append(Size(level=wanted, train=point, held_out=other))
    return listed


def edge_rows(found: Found) -> list[EdgeRow]:
    """The edges that were measured exactly, largest first-order score first."""
    circuit, effects = found.circuit, found.effects
    scores = _by_edge(circuit)
    means = zip(effects.noising.mean(1).tolist(), effects.denoising.mean(1).tolist(), strict=True)
    return [
        EdgeRow(
            edge=str(edge),
            kept=scores[str(edge)][1],
            score=scores[str(edge)][0],
            noising=noising,
            denoising=denoising,
            loss=found.parts.losses.get(edge),
        )
        for edge, (noising, denoising) in zip(effects.edges, means, strict=True)
    ]


def _by_edge(circuit: Circuit) -> dict[str, tuple[float, bool]]:
    """Score and mask of every possible edge."""
    return {
        str(circuit.edge(r, w)): (float(circuit.scores[r, w]), bool(circuit.kept[r, w]))
        for r, w in zip(*(index.tolist() for index in circuit.possible.nonzero()), strict=True)
    }


def print_performance(performance: Performance) -> None:
    """Whether the network does what is to be explained: before anything is explained."""
    p = performance
    interval = p.accuracy_interval
    terminal.data(
        terminal.shown(
            f"{p.model}, {p.name}: right on {p.accuracy:.0%} of {p.num} held-out prompts "
            f"({interval.low:.0%} to {interval.high:.0%}), by chance {p.chance:.0%}"
        )
    )
    _table(
        (p.metric, "mean", "95% interval"),
        [
            ("clean prompts", _number(p.clean), _span(p.clean_interval)),
            ("corrupt prompts", _number(p.corrupt), _span(p.corrupt_interval)),
            ("clean less corrupt", _number(p.contrast), _span(p.contrast_interval)),
        ],
    )


def print_found(found: Found, level: float) -> None:
    """Performance, size, faithfulness, and the largest edges."""
    circuit, parts = found.circuit, found.parts
    print_performance(found.performance)
    names = [str(node) for node in found.nodes]
    more = f" and {len(names) - NODES_SHOWN} more" if len(names) > NODES_SHOWN else ""
    terminal.data(
        terminal.shown(
            f"\nThe circuit keeps {circuit.num_edges:,} of {circuit.num_possible:,} edges "
            f"({_share(circuit.num_edges / circuit.num_possible)}) between {len(names)} nodes: "
            f"{', '.join(names[:NODES_SHOWN])}{more}.\n"
            f"On {found.held_out.num_examples} held-out pairs its faithfulness is "
            f"{_number(parts.faithfulness)}, and that of everything but it "
            f"{_number(parts.complement)}.\n"
        )
    )
    _table(
        ("faithfulness", "edges", "share", "training", "", "held out", "", "random circuits"),
        [_size_cells(size) for size in sizes(found, level)],
    )
    if found.by_node is not None:
        enough = found.by_node.size_at(level)
        number_of = "no measured number is" if enough is None else f"{enough.size:,} are"
        terminal.data(
            f"\nOf whole writers with all their edges, {number_of} enough for {level:.0%}."
        )
    rows = edge_rows(found)
    terminal.data(
        f"\nThe {min(len(rows), EDGES_SHOWN)} edges with the largest scores. Noising and denoising "
        f"are exact changes of the {circuit.record.metric};\nranks of scores and exact sizes "
        f"correlate by {_number(found.agreement)} over {len(rows)} edges.\n"
    )
    _table(
        ("edge", "kept", "score", "noising", "denoising", "loss without it"),
        [
            (
                row.edge,
                "yes" if row.kept else "no",
                *map(_number, (row.score, row.noising, row.denoising, row.loss)),
            )
            for row in rows[:EDGES_SHOWN]
        ],
    )


def warn(found: Found, level: float) -> None:
    """What to be careful about, to stderr."""
    said = list(found.warnings)
    curve = found.held_out
    if curve.num_falls:
        said.append(
            f"larger is not always more faithful: {curve.num_falls} of {len(curve.points)} steps "
            "of the held-out curve fall, because some edges work against the behaviour"
        )
    point = found.train.size_at(level)
    if point is None or point.share >= 1:
        said.append(f"no part of the network has a faithfulness of {level:g} on the training pairs")
    elif not reached(found, level):
        said.append(
            f"the circuit does not reach {level:g} on held-out pairs, but "
            f"{_number(found.parts.faithfulness)}; give more pairs, or a higher --level"
        )
    for text in said:
        terminal.message(f"warning: {text}")


def performance_json(performance: Performance) -> dict[str, Json]:
    """Every number of a performance, and whether it is one."""
    plain: dict[str, Json] = asdict(performance)
    return {**plain, "present": performance.present, "objection": performance.objection}


def found_json(found: Found, level: float) -> dict[str, Json]:
    """All that the summary says, and the rows that it leaves out."""
    circuit, record = found.circuit, found.circuit.record
    curves = {"train": found.train, "held_out": found.held_out}
    return {
        "model": record.model,
        "model_hash": record.model_hash,
        "task": record.task,
        "metric": record.metric,
        "pairs": {name: curve.num_examples for name, curve in curves.items()},
        "performance": performance_json(found.performance),
        "circuit": {
            "edges": circuit.num_edges,
            "possible": circuit.num_possible,
            "share": circuit.num_edges / circuit.num_possible,
            "nodes": [str(node) for node in found.nodes],
            "kept": [str(edge) for edge in circuit.edges()],
        },
        "level": level,
        "reached": reached(found, level),
        "faithfulness": found.parts.faithfulness,
        "complement": found.parts.complement,
        "sizes": [asdict(size) for size in sizes(found, level)],
        "curves": {name: asdict(curve) for name, curve in curves.items()},
        "by_node": None if found.by_node is None else asdict(found.by_node),
        "measured_edges": [asdict(row) for row in edge_rows(found)],
        "rank_agreement": found.agreement,
        "warnings": list(found.warnings),
    }


def _size_cells(size: Size) -> tuple[str, ...]:
    if size.train is None or size.held_out is None:
        return (f"{size.level:.0%}", "not reached", *[""] * 6)
    train, held_out = size.train, size.held_out
    return (
        f"{size.level:.0%}",
        f"{train.num_edges:,}",
        _share(train.share),
        _number(train.faithfulness),
        f"({_span(train.interval)})",
        _number(held_out.faithfulness),
        f"({_span(held_out.interval)})",
        f"{_number(held_out.random_low)} to {_number(held_out.random_high)}",
    )


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    terminal.table(sys.stdout, heads, rows)


def _number(value: float | None) -> str:
    from patchclamp.report.text import number

    return number(None if value is None else _rounded(value))


def _rounded(value: float) -> float:
    """Three decimals are what such numbers are worth; small ones keep their size, down to noise."""
    if abs(value) >= 0.001:
        return round(value, 3)
    return value if abs(value) >= ROUNDING else 0.0


def _span(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _share(share: float) -> str:
    from patchclamp.report.text import share as percentage

    return percentage(share)

"""How well methods find planted circuits: all methods on all planted networks.

    python benchmarks/circuit_recovery.py [--check]

AUROC and average precision of edges and of nodes, against the structural and the active
truth, with CPU-seconds; and the negative controls. Bars, for the default method against
active edges: motifs at least .99 each; compiled programs .98 on average; hard variants a
median of .95 over at least 50 networks of which at least ten are no transformers; networks with
random weights .5 within .1, among likes. Writes results/circuit_recovery.json.
"""

from __future__ import annotations

import argparse
import sys

import polars as pl
import torch
from paired import write

from patchclamp.core.progress import Silent
from patchclamp.truth.finding_bench import (
    DEFAULT,
    METHODS,
    REQUIRED_MOTIFS,
    SUITES,
    FindingBench,
    evidence,
    motifs,
    suite,
)
from patchclamp.truth.motifs import MOTIFS
from patchclamp.truth.planted_circuit import PlantedCircuit
from patchclamp.truth.rasp.hard import HARD_PROGRAMS, Variant, hard_variant

NUM_SEEDS = 3
CONTROL = {DEFAULT: METHODS[DEFAULT]}


class Dots(Silent):
    """A dot for every circuit."""

    def advance(self, amount: int = 1) -> None:
        print("." * amount, end="", flush=True, file=sys.stderr)


def summary(table: pl.DataFrame) -> list[dict[str, object]]:
    """Figures over networks, for every method, part and truth."""
    pairs = pl.col("num_like_pairs")
    return (
        table.group_by("method", "part", "truth", maintain_order=True)
        .agg(
            pl.len().alias("num"),
            pl.col("auroc").mean().alias("auroc_mean"),
            pl.col("auroc").median().alias("auroc_median"),
            pl.col("auroc").min().alias("auroc_least"),
            pl.col("average_precision").mean().alias("average_precision_mean"),
            pl.col("average_precision").min().alias("average_precision_least"),
            pl.col("auroc_among_likes").mean().alias("auroc_among_likes_mean"),
            ((pl.col("auroc_among_likes") * pairs).sum() / pairs.sum()).alias(
                "auroc_among_likes_over_pairs"
            ),
            pairs.sum().alias("num_like_pairs"),
            pl.col("seconds").sum().alias("seconds"),
        )
        .to_dicts()
    )


def controls() -> dict[str, pl.DataFrame]:
    """Tables of the controls; see `finding_bench`."""
    bench = FindingBench(methods=CONTROL)
    buried = [hard_variant(name, Variant.BURIED) for name in HARD_PROGRAMS]
    signed = FindingBench(methods={"evidence": evidence})
    by_kind = {
        "random weights, motifs": motifs(num_seeds=1),
        "random weights, programs": list(suite("programs"))[::3],
        "random weights, hard": hard_sample(),
    }
    found = {name: bench.random_weights(c, NUM_SEEDS) for name, c in by_kind.items()}
    found["shuffled metric, default, buried"] = bench.shuffled_metric(buried, NUM_SEEDS)
    found["true metric, evidence, buried"] = signed.run(buried)
    found["shuffled metric, evidence, buried"] = signed.shuffled_metric(buried, 10)
    return found


def hard_sample() -> list[PlantedCircuit]:
    """Hard networks in which true edges have likes: decoys, and other kinds of network."""
    return [c for c in suite("hard") if not c.name.endswith(("rotated", "scaled", "noise"))]


def missed(tables: dict[str, pl.DataFrame], control: dict[str, pl.DataFrame]) -> dict[str, object]:
    """Every bar, what it was, and what was found."""

    def of(table: pl.DataFrame) -> pl.DataFrame:
        return table.filter(
            (pl.col("method") == DEFAULT)
            & (pl.col("part") == "edges")
            & (pl.col("truth") == "active")
        )

    required = of(tables["motifs"])
    hard = of(tables["hard"])
    random = of(pl.concat([t for name, t in control.items() if name.startswith("random")]))
    likes = random["auroc_among_likes"].drop_nulls()
    found: dict[str, tuple[float, float]] = {
        "motifs, least AUROC": (float(required["auroc"].min() or 0), 0.99),
        "programs, mean AUROC": (float(of(tables["programs"])["auroc"].mean() or 0), 0.98),
        "hard, median AUROC": (float(hard["auroc"].median() or 0), 0.95),
        "hard, networks": (len(hard), 50),
        "hard, no transformers": (len(hard.filter(pl.col("family") != "transformer")), 10),
        "random weights, among likes, 0.1 less |AUROC - 0.5|": (
            0.1 - abs(float(likes.mean() or 0) - 0.5),
            0.0,
        ),
    }
    return {
        name: {"found": value, "at_least": bar, "missed": value < bar}
        for name, (value, bar) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    bench = FindingBench()
    tables = {name: bench.run(suite(name), progress=Dots()) for name in SUITES}
    others = [name for name in MOTIFS if name not in REQUIRED_MOTIFS]
    tables["other motifs"] = bench.run(motifs(others, num_seeds=2), progress=Dots())
    control = controls()
    bars = missed(tables, control)
    summaries = {name: summary(table) for name, table in {**tables, **control}.items()}
    worst = pl.concat(tables.values()).filter(
        (pl.col("method") == DEFAULT) & (pl.col("truth") == "active") & (pl.col("auroc") < 1)
    )
    for name, rows in summaries.items():
        print(f"\n{name}")
        for r in rows:
            likes = r["auroc_among_likes_mean"]
            print(
                f"  {r['method']:<18}{r['part']:<6}{r['truth']:<11}{r['num']:4}"
                f"  AUROC mean {r['auroc_mean']:.3f} median {r['auroc_median']:.3f}"
                f" least {r['auroc_least']:.3f}  AP {r['average_precision_mean']:.3f}"
                f"  likes {'  -  ' if likes is None else f'{likes:.3f}'}  {r['seconds']:7.2f} s"
            )
    for name, bar in bars.items():
        print(name, bar)
    data = {
        "bars": bars,
        "summary": summaries,
        "default_below_1_active": worst.drop("seconds").to_dicts(),
    }
    write("circuit_recovery", data)
    if check and any(bar["missed"] for bar in bars.values()):
        sys.exit("bar missed")


if __name__ == "__main__":
    main()

"""The default method on every planted network: the bars of the benchmark, and the controls."""

from __future__ import annotations

import polars as pl
import pytest

from patchclamp.truth.finding_bench import DEFAULT, METHODS, FindingBench, suite

pytestmark = pytest.mark.slow
BENCH = FindingBench(methods={DEFAULT: METHODS[DEFAULT]}, num_draws=20)


def active_edges(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter((pl.col("part") == "edges") & (pl.col("truth") == "active"))


def test_motifs() -> None:
    found = active_edges(BENCH.run(suite("motifs")))
    assert len(found) == 24
    assert found["auroc"].min() >= 0.99


def test_programs() -> None:
    found = active_edges(BENCH.run(suite("programs")))
    assert len(found) >= 40
    assert found["auroc"].mean() >= 0.98


def test_hard_variants() -> None:
    found = active_edges(BENCH.run(suite("hard")))
    assert len(found) >= 50
    assert len(found.filter(pl.col("family") != "transformer")) >= 10
    assert found["auroc"].median() >= 0.95


def test_random_weights() -> None:
    circuits = [c for c in suite("hard") if not c.name.endswith(("rotated", "scaled", "noise"))]
    found = active_edges(BENCH.random_weights(circuits, num_seeds=3))
    likes = found["auroc_among_likes"].drop_nulls()
    assert len(likes) >= 50
    assert likes.mean() == pytest.approx(0.5, abs=0.1)

"""The default method finds planted circuits, and nothing where there is none: a sample.

All planted networks are in tests/slow/test_finding_all.py.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.core.errors import OptionError
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.network.contrast import contrast
from patchclamp.truth.finding_bench import (
    DEFAULT,
    METHODS,
    REQUIRED_MOTIFS,
    FindingBench,
    drawn_weights,
    evidence,
    opened,
    random_signs,
    suite,
)
from patchclamp.truth.motifs import Form, Pairs, motif
from patchclamp.truth.planted_circuit import PlantedCircuit
from patchclamp.truth.planted_layers import plant_layers
from patchclamp.truth.rasp import Variant, compiled, hard_variant

BENCH = FindingBench(methods={DEFAULT: METHODS[DEFAULT]}, num_draws=20)


def active_edges(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter((pl.col("part") == "edges") & (pl.col("truth") == "active"))


@pytest.mark.parametrize("form", Form)
def test_motifs(form: Form) -> None:
    table = BENCH.run(motif(name, 0, form) for name in REQUIRED_MOTIFS)
    edges = active_edges(table)
    assert len(edges) == len(REQUIRED_MOTIFS)
    assert edges["auroc"].min() >= 0.99
    assert edges["average_precision"].min() >= 0.99
    nodes = table.filter((pl.col("part") == "nodes") & (pl.col("truth") == "active"))
    assert nodes["auroc"].min() >= 0.99


SAMPLE = {
    "program": lambda: compiled("sort_distinct"),
    "worst program": lambda: compiled("any_twice"),
    "buried": lambda: hard_variant("sort_distinct", Variant.BURIED),
    "twins": lambda: hard_variant("ends_agree", Variant.TWINS),
    "convolutions": lambda: plant_layers("corner"),
    "recurrent": lambda: plant_layers("coincidence"),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_others(name: str) -> None:
    planted = SAMPLE[name]()
    table = BENCH.run([planted])
    assert active_edges(table)["auroc"].item() >= 0.95
    # what is structural and never active cannot be seen: told, not hidden
    structural = table.filter((pl.col("part") == "edges") & (pl.col("truth") == "structural"))
    assert structural["num_true"].item() == len(planted.structural)


def test_a_latch_needs_exact_edges() -> None:
    """Saturated steps have no slope anywhere near: first order is blind, and cutting is not."""
    names = (DEFAULT, "sixteen points", "exact, both", "ACDC")
    bench = FindingBench(methods={n: METHODS[n] for n in names}, num_draws=20)
    found = active_edges(bench.run([plant_layers("toggle")]))
    auroc = dict(zip(found["method"], found["auroc"], strict=True))
    assert auroc[DEFAULT] < 0.8
    assert auroc[DEFAULT] < auroc["sixteen points"] < 1
    assert auroc["exact, both"] == auroc["ACDC"] == 1


@pytest.mark.parametrize(
    ("name", "form", "blind", "sees"),
    [
        ("or", Form.TRANSFORMER, "noising only", "denoising only"),
        ("and", Form.TRANSFORMER, "denoising only", "noising only"),
        ("or", Form.MLP, "exact, noising", "exact, denoising"),
        ("and", Form.MLP, "exact, denoising", "exact, noising"),
        ("backup", Form.MLP, "both ends", "exact, both"),
    ],
)
def test_one_end_alone_is_blind_where_it_is_said_to_be(
    name: str, form: Form, blind: str, sees: str
) -> None:
    methods = (blind, sees, DEFAULT)
    bench = FindingBench(methods={n: METHODS[n] for n in methods}, num_draws=20)
    planted = motif(name, 0, form, pairs=Pairs.TOGETHER)
    found = active_edges(bench.run([planted]))
    auroc = dict(zip(found["method"], found["auroc"], strict=True))
    assert auroc[sees] == 1
    assert auroc[blind] < 0.95
    if name != "backup":
        assert auroc[DEFAULT] == 1


# ---- controls -----------------------------------------------------------------------


def test_random_weights_know_nothing() -> None:
    circuits = [motif(name, 0, Form.MLP) for name in ("and", "backup")]
    circuits += [hard_variant("sort_distinct", Variant.DECOYS)]
    circuits += [plant_layers("select"), plant_layers("coincidence")]
    likes = active_edges(BENCH.random_weights(circuits, num_seeds=4))["auroc_among_likes"]
    assert len(likes) == 4 * len(circuits)
    assert likes.mean() == pytest.approx(0.5, abs=0.1)


def test_weights_are_put_back() -> None:
    wiring = opened(motif("and", 0, Form.MLP))
    before = [p.clone() for p in wiring.net.module.parameters()]
    with drawn_weights(wiring.net.module, 0):
        pass
    for p, q in zip(wiring.net.module.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def signed(planted: PlantedCircuit, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The default method's scores under the metric, and under shuffled signs."""
    wiring = opened(planted)
    shuffled = random_signs(planted.metric, planted.num_pairs, seed)
    return tuple(
        EdgeAttribution()
        .run(wiring, contrast(wiring.net, planted.clean, planted.corrupt, metric))
        .circuit.scores
        for metric in (planted.metric, shuffled)
    )


def test_sizes_do_not_see_the_signs_of_a_metric() -> None:
    """So a shuffled metric is no control for them: they say where, not which way."""
    true, shuffled = signed(motif("xor", 0, Form.MLP), 1)
    np.testing.assert_array_equal(true, shuffled)
    assert true.any()


def test_evidence_that_effects_go_one_way_is_gone_under_a_shuffled_metric() -> None:
    circuits = [hard_variant("sort_distinct", Variant.BURIED)]
    bench = FindingBench(methods={"evidence": evidence}, num_draws=20)
    found = active_edges(bench.shuffled_metric(circuits, 12))
    assert found["auroc_among_likes"].mean() == pytest.approx(0.5, abs=0.1)


def test_unknown_suites_are_refused() -> None:
    with pytest.raises(OptionError, match="no suite 'motiv'"):
        suite("motiv")

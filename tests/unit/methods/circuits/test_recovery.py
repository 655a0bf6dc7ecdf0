"""AUROC and average precision: by hand, against scikit-learn, with ties, among likes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from patchclamp.core.circuit import Circuit, Edge, Node, Reader
from patchclamp.core.errors import DataError, OptionError
from patchclamp.methods.circuits.checking.recovery import (
    Part,
    auroc,
    average_precision,
    edge_recovery,
    node_recovery,
    recovery,
)


def test_by_hand() -> None:
    truth = np.array([True, False, True, False])
    assert auroc(np.array([4.0, 3.0, 2.0, 1.0]), truth) == 0.75
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), truth) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert auroc(np.zeros(4), truth) == 0.5  # all tied: nothing is known
    assert average_precision(np.zeros(4), truth) == 0.5
    assert auroc(np.array([1.0, 0, 1, 0]), truth) == 1
    assert auroc(np.array([0.0, 1, 0, 1]), truth) == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_against_a_library_with_ties(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.random(60) < 0.2
    truth[:2] = True, False
    scores = generator.integers(levels, size=60).astype(float)
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert average_precision(scores, truth) == pytest.approx(
        average_precision_score(truth, scores), abs=1e-12
    )


def test_order_and_scale_do_not_matter() -> None:
    generator = np.random.default_rng(0)
    truth, scores = generator.random(40) < 0.3, generator.integers(5, size=40) * 1.0
    order = generator.permutation(40)
    for figure in (auroc, average_precision):
        value = figure(scores, truth)
        assert figure(scores[order], truth[order]) == pytest.approx(value, abs=1e-12)
        assert figure(np.exp(3 * scores) + 7, truth) == pytest.approx(value, abs=1e-12)


def test_the_interval_covers_and_shrinks() -> None:
    """Scores of two normal distributions one deviation apart have an AUROC of Phi(1/sqrt 2)."""
    truth_value, covered, widths = 0.76025, 0, {}
    for num in (40, 360):
        hits = []
        for seed in range(30):
            generator = np.random.default_rng([seed, num])
            is_true = np.arange(num) % 4 == 0
            scores = generator.normal(size=num) + is_true
            found = recovery(scores, is_true, Part.EDGES, "active", num_draws=120, seed=seed)
            low, high = found.auroc_interval.low, found.auroc_interval.high
            hits.append(low <= truth_value <= high)
            assert low <= found.auroc <= high
            assert found.average_precision_interval.low <= found.average_precision_interval.high
            widths[num] = high - low
        covered = np.mean(hits)
        assert 0.8 <= covered <= 1  # 0.95 is aimed at
    assert widths[360] < widths[40] / 2


def test_draws_follow_the_seed() -> None:
    generator = np.random.default_rng(0)
    is_true, scores = np.arange(30) % 3 == 0, generator.normal(size=30)
    same = [recovery(scores, is_true, Part.EDGES, "active", seed=5) for _ in range(2)]
    other = recovery(scores, is_true, Part.EDGES, "active", seed=6)
    assert same[0] == same[1]
    assert other.auroc == same[0].auroc
    assert other.auroc_interval != same[0].auroc_interval


def circuit(scores: np.ndarray, possible: np.ndarray | None = None) -> Circuit:
    writers = (Node("embed"), Node("attn.0.z", 0), Node("attn.0.z", 1))
    readers = (
        Reader(Node("attn.0.z", 0), "v"),
        Reader(Node("attn.0.z", 1), "v"),
        Reader(Node("logits")),
    )
    if possible is None:
        possible = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)
    return Circuit(
        writers=writers,
        readers=readers,
        possible=possible,
        kept=np.zeros_like(possible),
        scores=np.where(possible, scores, 0.0),
    )


TRUE = [Edge(Node("embed"), Node("attn.0.z", 0), "v"), Edge(Node("attn.0.z", 0), Node("logits"))]


def test_edges_and_nodes_apart() -> None:
    made = circuit(np.array([[-5.0, 9, 9], [1, 9, 9], [6, 4, 2]]))
    found = edge_recovery(made, TRUE, "active")
    # sizes count: 5 and 4 are true, 1, 6 and 2 are not, and impossible edges are left out
    assert (found.num_true, found.num) == (2, 5)
    assert found.auroc == pytest.approx(4 / 6)
    assert (found.part, found.truth) == (Part.EDGES, "active")
    # among likes: embed to values of heads (5 over 1), heads to logits (4 over 2)
    assert found.auroc_among_likes == 1
    assert found.num_like_pairs == 2
    nodes = node_recovery(made, np.array([1.0, 3, 2]), [e.writer for e in TRUE], "structural")
    assert nodes.auroc == 0.5  # embed below head 1, head 0 above
    assert nodes.auroc_among_likes == 1
    assert (nodes.part, nodes.truth, nodes.num_true, nodes.num) == (
        Part.NODES,
        "structural",
        2,
        3,
    )
    by_edges = node_recovery(made, None, [Node("embed"), Node("attn.0.z", 0)], "active")
    assert by_edges.auroc == 1  # largest edges: 6, 4, 2


def test_no_likes() -> None:
    made = circuit(np.ones((3, 3)))
    only = [Edge(Node("embed"), Node("logits"))]
    found = edge_recovery(made, only, "active")
    assert found.auroc_among_likes is None
    assert found.num_like_pairs == 0
    assert found.auroc == 0.5


def test_bad_truths() -> None:
    made = circuit(np.ones((3, 3)))
    every = [made.edge(r, w) for r, w in np.argwhere(made.possible)]
    with pytest.raises(DataError, match="all of the edges are true"):
        edge_recovery(made, every, "active")
    with pytest.raises(DataError, match="none of the edges are true"):
        edge_recovery(made, [], "active")
    with pytest.raises(DataError, match="none of the network's"):
        edge_recovery(made, [Edge(Node("attn.0.z", 0), Node("attn.0.z", 1), "v")], "active")
    with pytest.raises(OptionError, match="no truth 'activ'"):
        edge_recovery(made, TRUE, "activ")
    with pytest.raises(DataError, match="all of the nodes are true"):
        node_recovery(made, None, made.writers, "active")
    with pytest.raises(DataError, match="no writer"):
        node_recovery(made, None, [Node("attn.0.z", 7)], "active")
    with pytest.raises(DataError, match="one score for each writer"):
        node_recovery(made, np.ones(2), [Node("embed")], "active")
    truth = np.array([True, False])
    with pytest.raises(DataError, match="NaN"):
        auroc(np.array([np.nan, 1.0]), truth)
    with pytest.raises(DataError, match="one length"):
        auroc(np.ones(3), truth)
    with pytest.raises(OptionError, match="at least one draw"):
        recovery(np.ones(2), truth, Part.EDGES, "active", num_draws=0)

"""Graphs of causes: closed forms, planted edges of two families, controls, stability."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Circuit
from patchclamp.core.errors import DataError, InputError, OptionError, SiteError
from patchclamp.data import load_data
from patchclamp.methods.circuits.finding.causal_graph import (
    CausalGraphs,
    GraphStability,
    Reference,
    gradient_graph,
)
from patchclamp.net import Net
from patchclamp.specimens import build
from tests.snapshots import snapshot

SITES = ("first", "second")
FIRST = {(0, 0): 1.0, (1, 0): 1.0, (2, 1): -1.0, (3, 4): 1.0}
"""Weights from inputs' units to the second layer; (3, 4) ends in a unit that nothing reads."""
TRUE = {
    "first[0]->second[0]",
    "first[1]->second[0]",
    "first[2]->second[1]",
    "second[0]->:output",
    "second[1]->:output",
}


@dataclass(frozen=True)
class Margin:
    """Output of the class less the mean of the others."""

    classes: Tensor
    name: str = "margin of the class"
    position: int | None = None

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        own = output.gather(1, self.classes[rows][:, None])[:, 0]
        return own - (output.sum(1) - own) / (output.shape[1] - 1)


class Dense(nn.Module):
    """Two rectified layers of six units; weak random weights beside the planted ones."""

    def __init__(self, clutter: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        with torch.no_grad():
            for module in (self.one, self.two, self.head):
                module.bias.zero_()
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(clutter * drawn)
            self.one.weight.copy_(torch.eye(6))
            for (i, j), weight in FIRST.items():
                self.two.weight[j, i] = weight
            self.two.bias[1] = 3.0  # so that what takes away from it has something to take
            self.head.weight[0, 0], self.head.weight[0, 1] = 1.0, -1.0
            self.head.weight[:, 4] = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.two(self.first(self.one(x)))))
        return logits


class Images(nn.Module):
    """The same with channels: 3 x 3 kernels, and the mean over places before the head."""

    def __init__(self, clutter: float) -> None:
        super().__init__()
        dense = Dense(clutter)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.one = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.head = dense.head
        with torch.no_grad():
            for mine, theirs in ((self.one, dense.one), (self.two, dense.two)):
                mine.weight.zero_()
                mine.weight[:, :, 1, 1] = theirs.weight
            self.two.bias.copy_(dense.two.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.two(self.first(self.one(x))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def planted(family: str, clutter: float = 0.01, num: int = 24) -> tuple[Net, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num, 6) if family == "mlp" else (num, 6, 4, 4)
    inputs = 0.5 + torch.rand(shape, generator=generator)
    module = Dense(clutter) if family == "mlp" else Images(clutter)
    return patchclamp.open(module.eval(), inputs), inputs


def first_class(num: int = 24) -> Margin:
    return Margin(torch.zeros(num, dtype=torch.long))


def kept(circuit: Circuit) -> set[str]:
    return {str(edge) for edge in circuit.edges()}


@pytest.mark.parametrize("family", ["mlp", "cnn"])
@pytest.mark.parametrize("clutter", [0.0, 0.01])
def test_the_planted_edges_are_found_and_no_others(family: str, clutter: float) -> None:
    net, inputs = planted(family, clutter)
    before = snapshot(net.module)
    graph = CausalGraphs().run(net, inputs, SITES, first_class())
    assert snapshot(net.module) == before
    assert kept(graph.circuit) == TRUE
    assert graph.exact[graph.circuit.possible].all()
    found = graph.circuit.kept
    assert (graph.p[found] <= 0.05).all()
    assert ((graph.low <= graph.circuit.scores) & (graph.circuit.scores <= graph.high))[found].all()
    assert Circuit.from_json(graph.circuit.to_json()).edges() == graph.circuit.edges()


def test_effects_equal_the_closed_form() -> None:
    """Through rectifiers that are on, an edge carries weight x value x what is read of it."""
    net, inputs = planted("mlp", 0.0)
    graph = CausalGraphs().run(net, inputs, SITES, first_class())
    x = inputs.mean(0)
    wanted = {
        "first[0]->second[0]": x[0],
        "first[1]->second[0]": x[1],
        "first[2]->second[1]": x[2],  # less of a unit that is read with weight -1
        "second[0]->:output": x[0] + x[1],
        "second[1]->:output": -(3 - x[2]),
    }
    circuit = graph.circuit
    got = {str(circuit.edge(r, w)): circuit.scores[r, w] for r, w in np.argwhere(circuit.kept)}
    assert got == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)
    # where nothing bends, gradients say the same
    peer = gradient_graph(net, inputs, SITES, first_class()).scores
    hidden = slice(0, 6), slice(0, 6)
    np.testing.assert_allclose(peer[hidden], circuit.scores[hidden], rtol=1e-5, atol=1e-6)


def test_the_effect_of_an_edge_leaves_all_other_paths_alone() -> None:
    """By brute force on weights: the edge alone is cut, which its unit's other edges are not."""
    torch.manual_seed(0)
    module = Dense(0.4).eval()
    inputs = torch.randn(8, 6)
    net = patchclamp.open(module, inputs)
    metric = first_class(8)
    circuit = CausalGraphs(alpha=0.9, min_share=0.0).run(net, inputs, SITES, metric).circuit
    rows = torch.arange(8)
    plain = metric(module(inputs), rows)
    for i, j in itertools.product(range(6), range(6)):
        cut = Dense(0.4).eval()
        with torch.no_grad():
            cut.two.weight[j, i] = 0.0
            lost = float((plain - metric(cut(inputs), rows)).mean())
        assert circuit.scores[j, i] == pytest.approx(lost, abs=1e-5)


def test_estimates_rank_edges_and_only_tried_edges_are_kept() -> None:
    net, inputs = planted("mlp")
    graph = CausalGraphs(max_exact=3).run(net, inputs, SITES, first_class())
    assert kept(graph.circuit) == TRUE
    hidden = graph.exact[:6, :6]
    full = CausalGraphs().run(net, inputs, SITES, first_class())
    assert hidden.sum() < full.exact[:6, :6].sum()
    np.testing.assert_allclose(
        graph.circuit.scores, full.circuit.scores, atol=0.02 * np.abs(full.circuit.scores).max()
    )


def test_a_mean_reference_measures_against_the_background() -> None:
    net, inputs = planted("mlp", 0.0)
    method = CausalGraphs(reference=Reference.MEAN)
    with pytest.raises(InputError, match="background"):
        method.run(net, inputs, SITES, first_class())
    graph = method.run(net, inputs, SITES, first_class(), background=inputs - 0.5)
    assert kept(graph.circuit) >= {"first[0]->second[0]", "first[1]->second[0]"}
    scores = graph.circuit.scores
    assert scores[0, 0] == pytest.approx(0.5, abs=1e-5)
    # at its own mean a unit holds nothing up, on average
    own = method.run(net, inputs, SITES, first_class(), background=inputs)
    assert not own.circuit.num_edges


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_a_shuffled_metric_keeps_no_edge(family: str) -> None:
    net, inputs = planted(family)
    counts = []
    for seed in range(10):
        labels = torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(seed))
        graph = CausalGraphs(num_flips=199).run(net, inputs, SITES, Margin(labels))
        counts.append(graph.circuit.num_edges)
    # three blocks of edges share two nulls at 5%: one shuffle in ten may be unlucky
    assert sum(c > 0 for c in counts) <= 1


def test_random_labels_on_a_trained_network_keep_no_edge() -> None:
    train, test = load_data("digits", split="train"), load_data("digits", split="test")
    assert train.labels is not None
    assert test.labels is not None
    torch.manual_seed(0)
    module = build("digits_mlp", hidden=(12, 8)).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    for batch in torch.randperm(len(train.inputs))[:960].split(32):
        loss = F.cross_entropy(module(train.inputs[batch]), train.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net = patchclamp.open(module.eval(), test.inputs[:2])
    images, labels = test.inputs[:40], test.labels[:40]
    sites = ("layers.0.act", "layers.1.act")
    right = CausalGraphs().run(net, images, sites, Margin(labels))
    wrong = [
        CausalGraphs().run(net, images, sites, Margin(labels[torch.randperm(40)])) for _ in range(3)
    ]
    assert right.circuit.num_edges > 5
    assert sorted(w.circuit.num_edges for w in wrong)[1] == 0
    # one class, rows of that class: the graph of the task, and how it bears noise
    own = torch.where(test.labels == 3)[0][:12]
    stability = GraphStability(num_draws=4).run(
        CausalGraphs(), net, test.inputs[own], sites, Margin(test.labels[own])
    )
    assert stability.num_edges > 5
    assert stability.jaccard > 0.5
    assert stability.rank > 0.7
    assert stability.intervals["jaccard"].low <= stability.jaccard


def test_stability_of_graphs_without_noise_is_perfect() -> None:
    net, inputs = planted("mlp")
    same = GraphStability(noise=0.0, num_draws=2).run(
        CausalGraphs(), net, inputs, SITES, first_class()
    )
    assert same.num_edges == len(TRUE)
    assert (same.jaccard, same.gradient_jaccard) == (1.0, 1.0)
    assert (same.rank, same.gradient_rank) == pytest.approx((1.0, 1.0))


def test_bad_requests_are_refused() -> None:
    net, inputs = planted("mlp")
    with pytest.raises(SiteError, match="at least two"):
        CausalGraphs().run(net, inputs, "first", first_class())
    with pytest.raises(DataError, match="five rows"):
        CausalGraphs().run(net, inputs[:3], SITES, first_class(3))
    with pytest.raises(OptionError, match="alpha"):
        CausalGraphs(alpha=1.5).run(net, inputs, SITES, first_class())
    labels = torch.arange(24) % 2
    with pytest.raises(DataError, match="nothing to compare"):
        GraphStability().run(CausalGraphs(), net, inputs, SITES, Margin(labels))

"""Path patching: one way only, against closed forms, single edges and runs by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.circuit import Edge, Node, Reader
from patchclamp.core.errors import EngineError, OptionError
from patchclamp.engine.targets import ClassScore
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges
from patchclamp.methods.circuits.finding.path_patching import PathPatching, to_receivers
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import Wiring, index_of, wire
from patchclamp.truth.planted_circuit import PlantedCircuit
from patchclamp.truth.rasp import Variant, hard_variant
from patchclamp.truth.rasp.edges import Pass
from patchclamp.truth.rasp.transformer import PlantedTransformer
from tests.networks import opened

RESAMPLE = References(kind=Ablation.RESAMPLE)


def linear() -> tuple[Wiring, Contrast, nn.Sequential]:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double().eval()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    net = patchclamp.open(module, x)
    return wire(net), contrast(net, x, y, ClassScore(0)), module


def ways() -> list[list[Edge]]:
    """Every path of the linear network from an input to output 0."""
    return [
        [
            Edge(Node(":input", i), Node("0", j)),
            Edge(Node("0", j), Node("1", k)),
            Edge(Node("1", k), Node("2", 0)),
        ]
        for i in range(3)
        for j in range(4)
        for k in range(2)
    ]


def test_in_a_linear_network_it_is_the_product_of_the_weights() -> None:
    w, c, module = linear()
    paths = ways()
    found = PathPatching().run(w, c, paths)
    first, second, third = (layer.weight.detach() for layer in module)
    change = c.corrupt.tensors()[0] - c.clean.tensors()[0]
    for n, path in enumerate(paths):
        i, j, k = (edge.writer.unit for edge in path)
        expected = change[:, i] * first[j, i] * second[k, j] * third[0, k]
        torch.testing.assert_close(found.noising[n], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.denoising[n], -expected, rtol=0, atol=1e-12)
    total = found.metric_corrupt - found.metric_clean
    torch.testing.assert_close(found.noising.sum(0), total, rtol=0, atol=1e-12)


def test_paths_share_the_runs_they_begin_with() -> None:
    w, c, _ = linear()
    paths = ways()
    found = PathPatching(direction=Direction.NOISING).run(w, c, paths[::-1])
    assert found.num_runs == 12 + 24 + 24  # first edges, pairs of edges, whole paths
    assert not found.denoising.any()
    forwards = PathPatching(direction=Direction.NOISING).run(w, c, paths)
    torch.testing.assert_close(found.noising.flip(0), forwards.noising, rtol=0, atol=0)
    assert [steps[0][0] for steps in found.paths] == [path[0] for path in paths[::-1]]


@pytest.mark.parametrize("name", ["tiny_lm", "digits_cnn"])
def test_a_path_of_one_edge_is_that_edge(name: str) -> None:
    net, inputs = opened(name)
    w = wire(net)
    c = contrast(net, inputs, inputs.flip(0), ClassScore(3, -1 if name == "tiny_lm" else None))
    where = np.argwhere(w.possible)
    where = where[np.random.default_rng(0).permutation(len(where))[:12]]
    readers = [w.readers[r] for r, _ in where]
    edges = [Edge(w.writers[j], r.node, r.slot) for r, (_, j) in zip(readers, where, strict=True)]
    one = PathPatching().run(w, c, [[e] for e in edges])
    exact = ExactEdges().run(w, c, edges)
    for a, b in ((one.noising, exact.noising), (one.denoising, exact.denoising)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert float(exact.noising.abs().max()) > 1e-4
    torch.testing.assert_close(one.metric_clean, exact.metric_clean)
    torch.testing.assert_close(one.metric_corrupt, exact.metric_corrupt)


@cache
def induction() -> tuple[PlantedCircuit, PlantedTransformer, Wiring, Contrast]:
    planted = hard_variant("induction", Variant.DECOYS)
    assert isinstance(planted.module, PlantedTransformer)
    net = patchclamp.open(planted.module, planted.clean[:2])
    return (
        planted,
        planted.module,
        wire(net),
        contrast(net, planted.clean, planted.corrupt, planted.metric),
    )


def true_paths(planted: PlantedCircuit) -> list[list[Edge]]:
    """Ways of true edges from an embedding to the logits, through at least two nodes."""
    found: list[list[Edge]] = []
    growing = [[e] for e in planted.active if e.writer.site in ("embed", "position")]
    while growing:
        path = growing.pop()
        if path[-1].reader.site == "logits":
            found += [path] if len(path) > 2 else []
        else:
            growing += [[*path, e] for e in planted.active if e.writer == path[-1].reader]
    return sorted(found, key=str)


def test_runs_by_hand_in_a_transformer() -> None:
    planted, module, w, c = induction()
    paths = true_paths(planted)
    assert paths
    found = PathPatching().run(w, c, paths)
    rows = torch.arange(planted.num_pairs)

    def metric(run: torch.Tensor) -> torch.Tensor:
        at = planted.metric.position
        return planted.metric(run if at is None else run[:, at], rows)

    for ids, others, effects in (
        (planted.clean, planted.corrupt, found.noising),
        (planted.corrupt, planted.clean, found.denoising),
    ):
        with torch.no_grad():
            donor, base = Pass(), Pass()
            donor.run(module, others)
            before = metric(base.run(module, ids))
            for n, path in enumerate(paths):
                written = donor.written
                for edge in path:
                    nested = Pass(edge=edge, donor=written)
                    after = metric(nested.run(module, ids))
                    written = nested.written
                torch.testing.assert_close(effects[n], after - before, rtol=0, atol=1e-9)
    assert float(found.noising.abs().max()) > 0.1


def test_ways_through_decoys_do_nothing() -> None:
    planted, _, w, c = induction()
    true = {e.reader for e in planted.structural}
    decoys = [n for n in w.writers if n.site.endswith(".z") and n not in true]
    assert decoys
    paths = [[Edge(Node("embed"), head, "v"), Edge(head, Node("logits"))] for head in decoys]
    found = PathPatching().run(w, c, paths)
    assert float(found.noising.abs().max()) < 1e-6
    assert float(found.denoising.abs().max()) < 1e-6


def test_a_sender_to_receivers_is_those_edges_cut_together() -> None:
    net, inputs = opened("tiny_lm")
    w = wire(net)
    c = contrast(net, inputs, inputs.flip(0), ClassScore(3, -1))
    sender = w.writers[0]
    receivers = [r for r in w.readers if r.slot == "v"]
    step = to_receivers(w, sender, receivers)
    found = PathPatching(direction=Direction.NOISING).run(w, c, [[step]])
    kept = w.possible.copy()
    for edge in step:
        kept[index_of(w, edge)] = False
    rows = metric_rows(w, [c], [w.possible, kept], RESAMPLE)
    torch.testing.assert_close(found.noising[0], rows[1] - rows[0], rtol=0, atol=1e-5)
    # the receivers together are not the sum of the receivers apart
    apart = PathPatching(direction=Direction.NOISING).run(w, c, [[e] for e in step])
    assert float((apart.noising.sum(0) - found.noising[0]).abs().max()) > 1e-4


def test_through_receivers_on_to_the_output() -> None:
    """Two steps, the first of several edges: in a linear network the sum of its paths."""
    w, c, _ = linear()
    middle = [Node("0", j) for j in range(4)]
    first = to_receivers(w, Node(":input", 0), [Reader(n) for n in middle])
    second = [Edge(n, Node("1", 1)) for n in middle]
    last = Edge(Node("1", 1), Node("2", 0))
    found = PathPatching().run(w, c, [[first, second, last]])
    single = [p for p in ways() if p[0].writer.unit == 0 and p[2].writer.unit == 1]
    apart = PathPatching().run(w, c, single)
    torch.testing.assert_close(found.noising[0], apart.noising.sum(0), rtol=0, atol=1e-12)


def test_other_references() -> None:
    w, c, module = linear()
    zeros = References(
        kind=Ablation.ZERO, fixed=tuple(torch.zeros(1, n).double() for n in (3, 4, 2))
    )
    path = ways()[0]
    found = PathPatching(direction=Direction.NOISING).run(w, c, [path], zeros)
    first, second, third = (layer.weight.detach() for layer in module)
    expected = -c.clean.tensors()[0][:, 0] * first[0, 0] * second[0, 0] * third[0, 0]
    torch.testing.assert_close(found.noising[0], expected, rtol=0, atol=1e-12)


def test_broken_paths_are_refused() -> None:
    w, c, _ = linear()
    first, second, third = ways()[0]
    with pytest.raises(EngineError, match=r"broken: an edge leaves '0\[1\]'") as caught:
        PathPatching().run(w, c, [[first, Edge(Node("0", 1), Node("1", 0))]])
    assert "0[0]" in str(caught.value)
    with pytest.raises(EngineError, match="broken"):
        PathPatching().run(w, c, [[third, second]])
    with pytest.raises(EngineError, match=r"no '0\[9\]'"):
        PathPatching().run(w, c, [[Edge(Node(":input", 0), Node("0", 9))]])
    for path in ([], [first, []]):
        with pytest.raises(OptionError, match="at least one step"):
            PathPatching().run(w, c, [path])
    with pytest.raises(OptionError, match="no receivers"):
        to_receivers(w, Node(":input", 0), [])
    with pytest.raises(OptionError, match="batch_size"):
        PathPatching(batch_size=0)

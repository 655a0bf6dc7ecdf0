"""Contrasts, attribution, references, masks and evaluation on the bundled language model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Edge, Node
from patchclamp.core.errors import EngineError, InputError, OptionError, TargetError
from patchclamp.data.behaviours import token_pairs
from patchclamp.methods.circuits.checking.evaluation import Evaluation, on_scale, parts
from patchclamp.methods.circuits.checking.metrics import LogitDifference, metric_for
from patchclamp.methods.circuits.finding.edge_attribution import (
    BlindSpotWarning,
    Direction,
    EdgeAttribution,
    Path,
    Sign,
)
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges, verified
from patchclamp.methods.circuits.network.ablation import (
    Ablation,
    OptimalAblation,
    References,
    references,
)
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.masks import connected, metric_rows, of_nodes
from patchclamp.methods.circuits.network.wiring import Wiring, index_of, wire
from patchclamp.net import Net
from tests.snapshots import snapshot


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("tiny-lm")


@pytest.fixture(scope="module")
def wiring(net: Net) -> Wiring:
    return wire(net)


@pytest.fixture(scope="module")
def pairs(net: Net) -> Contrast:
    (found,) = token_pairs("induction", 6, tokenizer=net.tokenizer, variant="segment shuffled")
    return contrast(net, found.clean, found.corrupt, metric_for(found))


class Distance:
    """Squared distance from the clean output: its slope there is exactly 0."""

    name, position = "distance", -1

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return (output - self.clean[rows]).square().sum(1)


def test_unequal_lengths_are_refused(net: Net) -> None:
    metric = LogitDifference(correct=torch.tensor([[1]]), wrong=torch.tensor([[2]]))
    with pytest.raises(InputError, match="12 and 15 tokens"):
        contrast(net, torch.ones(1, 12).long(), torch.ones(1, 15).long(), metric)
    with pytest.raises(InputError, match="nothing to explain"):
        contrast(net, torch.ones(1, 12).long(), torch.ones(1, 12).long(), metric)


def test_attribution_is_the_same_at_any_batch_size(wiring: Wiring, pairs: Contrast) -> None:
    whole = EdgeAttribution(batch_size=6).run(wiring, pairs)
    single = EdgeAttribution(batch_size=1).run(wiring, pairs)
    scale = np.abs(whole.circuit.scores).max()
    assert np.abs(whole.circuit.scores - single.circuit.scores).max() < 1e-5 * scale
    assert np.abs(whole.spread - single.spread).max() < 1e-4 * scale
    assert whole.num_examples == 6


def test_attribution_leaves_the_network_as_found(wiring: Wiring, pairs: Contrast) -> None:
    before = snapshot(wiring.net.module)
    EdgeAttribution(steps=1).run(wiring, pairs)
    assert snapshot(wiring.net.module) == before
    assert all(p.grad is None for p in wiring.net.module.parameters())


def test_options_that_are_blind_warn(wiring: Wiring, pairs: Contrast) -> None:
    for options, words in (
        ({"direction": Direction.NOISING, "path": Path.NONE}, "backs up"),
        ({"direction": Direction.DENOISING, "path": Path.NONE}, "need others"),
        ({"sign": Sign.SIGNED}, "XOR"),
    ):
        with pytest.warns(BlindSpotWarning, match=words):
            EdgeAttribution(**options, steps=1).run(wiring, pairs)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EdgeAttribution(steps=1).run(wiring, pairs).caveats == ()


def test_a_metric_without_slope_is_said(net: Net, wiring: Wiring, pairs: Contrast) -> None:
    clean = net.run(pairs.clean).output[:, -1]
    flat = contrast(net, pairs.clean, pairs.corrupt, Distance(clean))
    one = EdgeAttribution(direction=Direction.NOISING, path=Path.NONE)
    with pytest.warns(BlindSpotWarning), pytest.raises(TargetError, match="exactly zero gradient"):
        one.run(wiring, flat)
    found = EdgeAttribution(steps=1).run(wiring, flat)
    assert any("zero at the clean point" in c for c in found.caveats)


def test_integrated_sum_is_the_change_of_the_metric(wiring: Wiring, pairs: Contrast) -> None:
    """Completeness: along the inputs, effects of the roots add up to the metric's change."""
    method = EdgeAttribution(sign=Sign.SIGNED, steps=60, mixed=0, direction=Direction.BOTH)
    with pytest.warns(BlindSpotWarning):
        found = method.run(wiring, pairs)
    roots = [wiring.writers.index(Node(name)) for name in ("embed", "position")]
    change = found.metric_corrupt - found.metric_clean
    assert abs(found.nodes[roots].sum() - change) < 0.05 * abs(change)


def test_directions_of_exact_edges(wiring: Wiring, pairs: Contrast) -> None:
    """Single edges against masks, in both directions, at any number of rows."""
    edges = EdgeAttribution(steps=1).run(wiring, pairs).circuit.top(9).edges()
    effects = ExactEdges(max_rows=8).run(wiring, pairs, edges)
    other = ExactEdges(max_rows=500, batch_size=2).run(wiring, pairs, edges)
    assert torch.allclose(effects.noising, other.noising, atol=1e-4)
    turned = contrast(wiring.net, pairs.corrupt, pairs.clean, pairs.metric)
    held = References(kind=Ablation.RESAMPLE)
    for got, way in ((effects.noising, pairs), (effects.denoising, turned)):
        masks = [wiring.possible]
        for edge in edges:
            mask = wiring.possible.copy()
            mask[index_of(wiring, edge)] = False
            masks.append(mask)
        rows = metric_rows(wiring, [way], masks, held)
        assert torch.allclose(got, rows[1:] - rows[0], atol=1e-4)
    circuit = EdgeAttribution(steps=1).run(wiring, pairs).circuit
    exact = verified(circuit, effects)
    place = index_of(wiring, edges[0])
    assert exact.scores[place] == pytest.approx(float(effects.sizes[0]))


def test_unknown_edges_are_refused(wiring: Wiring) -> None:
    with pytest.raises(EngineError, match=r"nearest 'attn\.1\.z\[3\]'"):
        index_of(wiring, Edge(Node("attn.1.z", 33), Node("logits")))
    with pytest.raises(EngineError, match="comes later"):
        index_of(wiring, Edge(Node("attn.1.z", 0), Node("attn.0.z", 0), "q"))


def test_references_by_kind(wiring: Wiring, pairs: Contrast) -> None:
    recorded = wiring.record(pairs.corrupt).values
    attention = next(i for i, v in enumerate(recorded) if v.ndim == 4)
    mean = references(wiring, [pairs], "mean").fixed[attention]
    assert torch.allclose(mean[0, :, 0], recorded[attention].mean((0, 2)), atol=1e-5)
    positional = references(wiring, [pairs], Ablation.POSITIONAL_MEAN, batch_size=4)
    assert torch.allclose(positional.fixed[attention][0], recorded[attention].mean(0), atol=1e-5)
    assert not any(bool(x.any()) for x in references(wiring, [pairs], "zero").fixed)
    noise = references(wiring, [pairs], "noise", seed=3)
    whole = noise.of(wiring, pairs.batch(range(6)))[attention]
    part = noise.of(wiring, pairs.batch([4, 5]))[attention]
    assert torch.allclose(whole[4:], part, atol=1e-5)
    added = whole - wiring.record(pairs.clean).values[attention]
    assert float(added.std()) == pytest.approx(float(recorded[attention].std()), rel=0.2)
    with pytest.raises(OptionError, match="nearest 'zero'"):
        references(wiring, [pairs], "zeros")
    with pytest.raises(OptionError, match="learned"):
        references(wiring, [pairs], Ablation.OPTIMAL)


def test_optimal_constants_hurt_less_than_means(wiring: Wiring, pairs: Contrast) -> None:
    circuit = EdgeAttribution(steps=1).run(wiring, pairs).circuit.top(20)
    cut = torch.from_numpy(wiring.possible & ~circuit.kept).float()[None]
    learned = OptimalAblation(steps=15).fit(wiring, [pairs], cut)
    whole = metric_rows(wiring, [pairs], [wiring.possible], learned)[0]
    losses = []
    for held in (references(wiring, [pairs], "mean"), learned):
        rows = metric_rows(wiring, [pairs], [circuit.kept], held)[0]
        losses.append(float((rows - whole).square().mean()))
    assert losses[1] < 0.8 * losses[0]


def test_only_connected_edges_do_anything(wiring: Wiring, pairs: Contrast) -> None:
    circuit = EdgeAttribution(steps=1).run(wiring, pairs).circuit.top(14)
    pruned = connected(wiring, circuit.kept)
    assert 0 < pruned.sum() < circuit.kept.sum()
    rows = metric_rows(wiring, [pairs], [circuit.kept, pruned], References(kind=Ablation.RESAMPLE))
    assert torch.allclose(rows[0], rows[1], atol=1e-4)
    assert not connected(wiring, of_nodes(wiring, [Node("mlp.0.out")])).any()
    with pytest.raises(EngineError, match="no writer"):
        of_nodes(wiring, [Node("mlp.7.out")])


def test_faithfulness_has_its_ends_and_a_chance_level(wiring: Wiring, pairs: Contrast) -> None:
    circuit = EdgeAttribution(steps=2).run(wiring, pairs).circuit
    curve = Evaluation(fractions=(0.02, 0.1, 0.3, 1.0), num_random=4).run(wiring, pairs, circuit)
    first, *_, last = curve.points
    assert last.faithfulness == pytest.approx(1, abs=1e-4)
    assert abs(first.faithfulness) < 0.2
    assert curve.points[2].faithfulness > 0.8
    assert curve.points[1].random_high < 0.3
    assert all(
        p.interval.low <= p.faithfulness + 1e-9 <= p.interval.high + 2e-9 for p in curve.points
    )
    share, faith = [0.0], [0.0]
    for point in curve.points:
        share.append(point.share)
        faith.append(point.faithfulness)
    assert curve.cpr == pytest.approx(np.trapezoid(faith, share))
    at = curve.size_at(0.8)
    assert at is not None
    assert at.num_edges <= curve.points[2].num_edges


def test_no_scale_is_an_error() -> None:
    with pytest.raises(TargetError, match="no scale"):
        on_scale(torch.zeros(3), torch.ones(3), torch.ones(3))
    assert on_scale(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([5.0])) == 0.5


def test_parts_of_the_induction_circuit(wiring: Wiring, pairs: Contrast) -> None:
    """Whole, complement, and what the loss of each edge does."""
    scores = EdgeAttribution(steps=2).run(wiring, pairs).circuit
    found = parts(wiring, [pairs], scores.top(41), max_edges=5)
    assert found.faithfulness > 0.8
    assert found.complement < 0.3
    assert max(found.losses.values()) > 0.1


def test_random_weights_have_no_circuit_that_beats_chance() -> None:
    """Control: an untrained network's largest edges are not the induction circuit."""
    from patchclamp.specimens.tiny_lm import TinyLM

    torch.manual_seed(0)
    module: nn.Module = TinyLM().eval()
    net = patchclamp.open(module, torch.zeros(2, 16).long())
    trained = patchclamp.open("tiny-lm")
    (found,) = token_pairs("induction", 6, tokenizer=trained.tokenizer)
    pairs = contrast(net, found.clean, found.corrupt, metric_for(found))
    scores = EdgeAttribution(steps=1).run(wire(net), pairs)
    assert abs(scores.metric_clean) < 0.5
    assert float(np.abs(scores.circuit.scores).max()) < 0.1

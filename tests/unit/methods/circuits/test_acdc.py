"""ACDC: the sequence is exactly that of cutting one edge after the other and looking."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Circuit
from patchclamp.core.errors import EngineError, OptionError, TargetError
from patchclamp.core.progress import Silent
from patchclamp.engine.targets import ClassScore, FunctionScore
from patchclamp.methods.circuits.finding.acdc import ACDC, Distance
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import Wiring, index_of, wire
from patchclamp.truth.motifs import Form, Pairs, motif
from patchclamp.truth.planted_circuit import PlantedCircuit
from tests.networks import opened

RESAMPLE = References(kind=Ablation.RESAMPLE)

Planted = tuple[PlantedCircuit, Wiring, Contrast]


@cache
def wired(name: str, form: Form, pairs: Pairs = Pairs.ALL) -> Planted:
    planted = motif(name, 1, form, pairs=pairs)
    net = patchclamp.open(planted.module, planted.clean[:2])
    c = contrast(net, planted.clean, planted.corrupt, planted.metric)
    return planted, wire(net), c


@cache
def perceptron() -> tuple[Wiring, Contrast]:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    net = patchclamp.open(module.eval(), x)
    return wire(net), contrast(net, x, y, ClassScore(1))


def oracle(w: Wiring, c: Contrast, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Noising with a mask run for every single edge, and nothing left out."""

    whole = metric_rows(w, [c], [w.possible], RESAMPLE)

    def distance(kept: np.ndarray) -> float:
        rows = metric_rows(w, [c], [kept], RESAMPLE, batch_size=64)
        return float((rows - whole).abs().double().mean())

    kept, scores, now = w.possible.copy(), np.zeros(w.possible.shape), 0.0
    for reader, writer in np.argwhere(w.possible)[::-1]:
        kept[reader, writer] = False
        then = distance(kept)
        scores[reader, writer] = then - now
        if then - now < threshold:
            now = then
        else:
            kept[reader, writer] = True
    return kept, scores


@pytest.mark.parametrize("threshold", [0.003, 0.02, 0.05])
def test_the_sequence_is_the_naive_one(threshold: float) -> None:
    w, c = perceptron()
    found = ACDC(threshold=threshold, direction=Direction.NOISING).run(w, c)
    kept, scores = oracle(w, c, threshold)
    np.testing.assert_array_equal(found.circuit.kept, kept)
    np.testing.assert_allclose(found.circuit.scores, scores, atol=1e-6)
    assert 0 < found.circuit.num_edges < found.circuit.num_possible
    rows = metric_rows(w, [c], [w.possible, kept], RESAMPLE)
    assert found.distance == pytest.approx(float((rows[1] - rows[0]).abs().mean()), abs=1e-6)


def test_the_sequence_is_the_naive_one_in_a_transformer() -> None:
    _, w, c = wired("backup", Form.TRANSFORMER)
    found = ACDC(threshold=0.01, direction=Direction.NOISING, batch_size=64).run(w, c)
    kept, scores = oracle(w, c, 0.01)
    np.testing.assert_array_equal(found.circuit.kept, kept)
    np.testing.assert_allclose(found.circuit.scores, scores, atol=1e-9)
    # edges into nodes that nobody hears cost nothing
    assert found.tried.sum() < w.possible.sum()
    assert float(np.abs(scores[~found.tried]).max()) < 1e-9
    assert found.num_runs == 2 + int(found.tried.sum())


def test_batches_do_not_matter() -> None:
    w, c = perceptron()
    one = ACDC(threshold=0.03, batch_size=6).run(w, c)
    several = ACDC(threshold=0.03, batch_size=4).run(w, c)
    np.testing.assert_array_equal(one.circuit.kept, several.circuit.kept)
    np.testing.assert_allclose(one.circuit.scores, several.circuit.scores, atol=1e-6)


def test_one_direction_is_blind_and_both_are_not() -> None:
    planted, w, c = wired("or", Form.MLP, Pairs.TOGETHER)
    kept = {d: set(ACDC(direction=d, batch_size=64).run(w, c).circuit.edges()) for d in Direction}
    assert kept[Direction.BOTH] == planted.active
    assert kept[Direction.DENOISING] == planted.active
    # one writer is enough for the OR, so the other is cut, and all that feeds it
    assert len(kept[Direction.NOISING]) == 3
    assert kept[Direction.NOISING] < planted.active


def test_nothing_is_kept_where_nothing_that_matters_differs() -> None:
    planted, w, _ = wired("and", Form.MLP)
    net = w.net
    true = {e.writer.unit for e in planted.structural if e.writer.site == ":input"}
    corrupt = planted.clean.clone()
    others = [i for i in range(corrupt.shape[1]) if i not in true]
    corrupt[:, others] = torch.rand(len(corrupt), len(others))
    found = ACDC().run(w, contrast(net, planted.clean, corrupt, planted.metric))
    assert found.circuit.num_edges == 0
    assert found.distance < 1e-5


def test_divergence_is_that_of_the_logits() -> None:
    w, c = perceptron()
    found = ACDC(threshold=1e9, distance=Distance.KL, direction=Direction.NOISING).run(w, c)
    assert found.circuit.num_edges == 0  # so the output is that of the corrupt inputs
    x, y = (w.record(call).output for call in (c.clean, c.corrupt))
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert found.distance == pytest.approx(float(expected), abs=1e-5)
    assert sum(found.circuit.scores[w.possible]) == pytest.approx(found.distance, abs=1e-5)


def test_divergence_at_every_position() -> None:
    net, inputs = opened("tiny_lm")
    w = wire(net)
    corrupt = inputs.roll(1, 0)

    def everywhere(output: Tensor) -> Tensor:
        return output[..., 5].mean(1)

    c = contrast(net, inputs, corrupt, FunctionScore(everywhere))
    last = [r for r in range(len(w.readers)) if not w.feeds[r].any()]
    within = circuit_of(w, last)
    found = ACDC(threshold=1e9, distance=Distance.KL, direction=Direction.NOISING).run(
        w, c, within=within
    )
    x, y = (net.run(i).output.log_softmax(-1) for i in (inputs, corrupt))
    expected = (x.exp() * (x - y)).sum(-1).mean()
    assert found.distance == pytest.approx(float(expected), rel=1e-4)


def circuit_of(w: Wiring, readers: list[int]) -> Circuit:
    kept = np.zeros_like(w.possible)
    kept[readers] = w.possible[readers]
    zeros = np.zeros(kept.shape)
    return Circuit(
        writers=w.writers, readers=w.readers, possible=w.possible, kept=kept, scores=zeros
    )


def test_it_starts_from_a_circuit() -> None:
    planted, w, c = wired("and", Form.MLP)
    start = np.zeros_like(w.possible)
    for edge in planted.active:
        start[index_of(w, edge)] = True
    start[0, 0] = True
    given = circuit_of(w, []).with_kept(start)
    found = ACDC(batch_size=64).run(w, c, within=given)
    assert set(found.circuit.edges()) == planted.active
    assert found.tried.sum() <= start.sum()
    np.testing.assert_array_equal(given.kept, start)  # left as it was


def test_it_can_be_stopped_by_a_number_of_runs() -> None:
    _, w, c = wired("and", Form.MLP)
    whole = ACDC(batch_size=64).run(w, c)
    part = ACDC(batch_size=64, max_runs=20).run(w, c)
    assert not whole.stopped
    assert part.stopped
    assert part.num_runs <= 20
    # what was done is the beginning of the same sequence, and the rest is kept
    assert part.tried.sum() == 8
    np.testing.assert_array_equal(part.circuit.scores[part.tried], whole.circuit.scores[part.tried])
    first = np.flatnonzero(part.tried.any(1))[0]
    np.testing.assert_array_equal(part.circuit.kept[:first], w.possible[:first])


def test_it_can_be_stopped_by_who_watches() -> None:
    class Impatient(Silent):
        left = 5

        def advance(self, amount: int = 1) -> None:
            self.left -= amount
            if self.left == 0:
                raise KeyboardInterrupt

    w, c = perceptron()
    before = [p.clone() for p in w.net.module.parameters()]
    with pytest.raises(KeyboardInterrupt):
        ACDC().run(w, c, progress=Impatient())
    for p, q in zip(w.net.module.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_every_edge_is_reported() -> None:
    class Counting(Silent):
        total, done = 0, 0

        def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
            self.total = total or 0

        def advance(self, amount: int = 1) -> None:
            self.done += amount

    w, c = perceptron()
    watch = Counting()
    ACDC().run(w, c, progress=watch)
    assert watch.total == watch.done == w.possible.sum()


def test_the_record_comes_back_from_json() -> None:
    w, c = perceptron()
    found = ACDC(threshold=0.03, distance=Distance.METRIC).run(w, c).circuit
    again = Circuit.from_json(found.to_json())
    assert again.record == found.record
    assert again.record.options["threshold"] == 0.03
    assert again.record.method == "ACDC"
    np.testing.assert_array_equal(again.kept, found.kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"threshold": float("nan")}, "threshold must be above 0"),
        ({"max_runs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_options(options: dict[str, float], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ACDC(**options)


def test_bad_circuits_and_outputs() -> None:
    w, c = perceptron()
    _, other, _ = wired("and", Form.MLP)
    with pytest.raises(EngineError, match="not one of"):
        ACDC().run(w, c, within=circuit_of(other, []))
    torch.manual_seed(0)
    net = patchclamp.open(
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).eval(), torch.randn(2, 3)
    )
    pairs = contrast(net, torch.randn(2, 3), torch.randn(2, 3), ClassScore(0))
    with pytest.raises(TargetError, match="between distributions"):
        ACDC(distance=Distance.KL).run(wire(net), pairs)


def test_the_order_is_backwards() -> None:
    """Of two edges that do the same work, the one that is read later in the list is cut."""
    with torch.no_grad():
        module = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        module[0].weight.fill_(1.0)
        module[0].bias.zero_()
        module[2].weight.fill_(0.5)
        module[2].bias.fill_(0.0)
    net = patchclamp.open(module, torch.ones(2, 1))
    w, c = wire(net), contrast(net, torch.ones(2, 1), torch.zeros(2, 1), ClassScore(0))
    found = ACDC(threshold=0.6, direction=Direction.NOISING).run(w, c)
    # the first to go costs 0.5; the second brings the distance from 0.5 to 1
    names = [str(e) for e, _ in itertools.groupby(found.circuit.edges())]
    assert names == []
    found = ACDC(threshold=0.4, direction=Direction.NOISING).run(w, c)
    assert found.circuit.num_edges == 4

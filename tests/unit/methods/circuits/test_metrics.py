"""Metrics against closed forms; and whether a network performs a behaviour at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.errors import DataError, OptionError, TargetError
from patchclamp.data.behaviours import catalogue, induction, token_pairs
from patchclamp.data.behaviours.pairs import MetricKind, Split, TokenPairs
from patchclamp.methods.circuits.checking.behaviour import performs
from patchclamp.methods.circuits.checking.metrics import (
    KLDivergence,
    LogitDifference,
    LogitOf,
    Metric,
    ProbabilityDifference,
    metric_for,
)
from patchclamp.net import Net
from patchclamp.specimens.tiny_lm import TinyLM
from tests.word_tokenizer import WordTokenizer

CORRECT = torch.tensor([[0, -1], [1, 2]])
WRONG = torch.tensor([[1], [3]])
ROWS = torch.tensor([1, 0, 1])
LOGITS = torch.tensor(
    [[0.0, 1.0, 5.0, -1.0], [2.0, -3.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64
)


def test_logit_difference_is_a_difference_of_means_with_a_constant_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    values = LogitDifference(correct=CORRECT, wrong=WRONG)(logits, ROWS)
    assert values.tolist() == [4.0, 5.0, 0.0]
    (slope,) = torch.autograd.grad(values.sum(), logits)
    expected = [[0, 0.5, 0.5, -1], [1, -1, 0, 0], [0, 0.5, 0.5, -1]]
    assert torch.equal(slope, torch.tensor(expected, dtype=torch.float64))


def test_probability_difference_of_two_classes_is_a_hyperbolic_tangent() -> None:
    metric = ProbabilityDifference(correct=torch.tensor([[0]]), wrong=torch.tensor([[1]]))
    apart = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([apart, torch.zeros_like(apart)], 1)
    values = metric(logits, torch.zeros(9, dtype=torch.int64))
    torch.testing.assert_close(values, torch.tanh(apart / 2), atol=1e-12, rtol=0)
    (slope,) = torch.autograd.grad(values.sum(), apart)
    torch.testing.assert_close(slope, 0.5 / torch.cosh(apart / 2) ** 2, atol=1e-12, rtol=0)


def test_probability_difference_adds_up_the_answers_and_leaves_padding_out() -> None:
    values = ProbabilityDifference(correct=CORRECT, wrong=WRONG)(LOGITS, ROWS)
    shares = LOGITS.softmax(1)
    expected = [
        shares[0, 1] + shares[0, 2] - shares[0, 3],
        shares[1, 0] - shares[1, 1],
        torch.tensor(0.25),
    ]
    assert values.tolist() == pytest.approx([float(x) for x in expected], abs=1e-12)


def test_divergence_has_no_gradient_at_its_reference_and_the_right_one_elsewhere() -> None:
    metric = KLDivergence(reference=LOGITS)
    rows = torch.arange(3)
    clean = LOGITS.clone().requires_grad_()
    values = metric(clean, rows)
    (slope,) = torch.autograd.grad(values.sum(), clean)
    assert values.abs().max() < 1e-15
    assert slope.abs().max() < 1e-15
    moved = (LOGITS + 3 * torch.eye(3, 4)).requires_grad_()
    values = metric(moved, rows)
    (slope,) = torch.autograd.grad(values.sum(), moved)
    p, q = LOGITS.softmax(1), moved.softmax(1)
    torch.testing.assert_close(values, (p * (p / q).log()).sum(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope, (q - p).detach(), atol=1e-12, rtol=0)


def test_the_logit_of_a_class() -> None:
    assert LogitOf(classes=torch.tensor([2, 0]))(LOGITS, ROWS).tolist() == [0.0, 0.5, 1.0]


ALL: tuple[Metric, ...] = (
    LogitDifference(correct=CORRECT, wrong=WRONG),
    ProbabilityDifference(correct=CORRECT, wrong=WRONG),
    KLDivergence(reference=LOGITS[:2]),
    LogitOf(classes=torch.tensor([3, 0])),
)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_every_metric_keeps_to_its_rows_and_checks_what_it_is_given(metric: Metric) -> None:
    values = metric(LOGITS, ROWS)
    assert values.shape == (3,)
    assert values[[2, 0]].equal(metric(LOGITS[[2, 0]], ROWS[[2, 0]]))
    assert metric.position == -1
    with pytest.raises(TargetError, match="no such example"):
        metric(LOGITS, torch.tensor([0, 1, 2]))
    with pytest.raises(TargetError, match="which example each row"):
        metric(LOGITS, torch.tensor([0, 1]))
    with pytest.raises(TargetError, match=r"one row of logits.*set position="):
        metric(LOGITS[:, None], ROWS)
    with pytest.raises((DataError, TargetError), match=r"vocabulary|other classes"):
        metric(LOGITS[:, :2], ROWS)


def test_metrics_without_sense_are_refused() -> None:
    for kind in (LogitDifference, ProbabilityDifference):
        with pytest.raises(DataError, match="both correct and wrong"):
            kind(correct=CORRECT, wrong=torch.tensor([[1], [2]]))
        with pytest.raises(DataError, match="no wrong answer"):
            kind(correct=CORRECT, wrong=torch.tensor([[1], [-1]]))
    with pytest.raises(DataError, match="not finite"):
        KLDivergence(reference=torch.tensor([[0.0, math.inf]]))
    with pytest.raises(DataError, match="not logits"):
        KLDivergence(reference=torch.tensor([0.0, 1.0]))
    with pytest.raises(DataError, match="negative"):
        LogitOf(classes=torch.tensor([-1]))
    with pytest.raises(DataError, match="one class for each example"):
        LogitOf(classes=torch.tensor([[1]]))


# ---- whether a network performs a behaviour ------------------------------------------------


class Copier(nn.Module):
    """Induction as it is defined: what followed the last earlier occurrence gets logit 5."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.vocab = vocab

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        same = (input_ids[:, :, None] == input_ids[:, None]).tril(-1)
        places = torch.arange(input_ids.shape[1])
        source = torch.where(same, places, -1).max(2).values + 1
        copied = torch.nn.functional.one_hot(input_ids.gather(1, source), self.vocab)
        return self.scale * copied


class Habit(nn.Module):
    """The same logits whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def opened(module: nn.Module) -> Net:
    return patchclamp.open(module, torch.arange(64).view(2, 32))


@pytest.mark.parametrize("variant", induction.VARIANTS)
def test_a_network_that_copies_performs_induction_and_nothing_else(variant: str) -> None:
    pairs = induction.generate(24, range(32, 127), variant=variant)
    found = performs(opened(Copier(128)), pairs)
    assert found.present
    found.require()
    assert found.accuracy == 1.0
    assert (found.clean, found.corrupt, found.contrast) == (5.0, -5.0, 10.0)
    assert found.chance == 0.5
    assert found.accuracy_interval.low == pytest.approx(24 / (24 + 1.959964**2), abs=1e-6)


def test_the_bundled_language_model_performs_induction_on_lengths_it_has_not_seen() -> None:
    net = patchclamp.open("tiny-lm")
    for variant in induction.VARIANTS:
        pairs = induction.generate(24, range(32, 127), split=Split.HELD_OUT, variant=variant)
        found = performs(net, pairs)
        assert found.accuracy >= 0.9
        assert found.contrast_interval.low > 2
        assert found.present


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_random_weights_perform_nothing(name: str) -> None:
    """The negative control: at chance, and refused before anything is explained."""
    tokenizer = WordTokenizer()
    vocabulary = range(32, 127) if name == "induction" else None
    pairs = token_pairs(
        name, 48, tokenizer=None if vocabulary else tokenizer, vocabulary=vocabulary
    )
    torch.manual_seed(1)
    net = opened(TinyLM(vocab=600, context=128, width=32, num_layers=1, num_heads=2))
    assert max(int(b.correct.max()) for b in pairs) < 600
    found = performs(net, pairs)
    assert not found.present
    if name != "greater than":
        assert found.accuracy_interval.low <= found.chance <= found.accuracy_interval.high
    with pytest.raises(DataError, match=f"'{name}'"):
        found.require()


def test_a_habit_is_no_behaviour_although_it_is_always_right() -> None:
    """Late years whatever was asked: accuracy 1, and nothing between clean and corrupt."""
    tokenizer = WordTokenizer()
    pairs = token_pairs("greater than", 24, tokenizer=tokenizer)
    logits = torch.zeros(600)
    logits[tokenizer.known["99"]] = 9.0
    found = performs(opened(Habit(logits)), pairs)
    assert found.accuracy == 1.0
    assert found.contrast == 0.0
    assert not found.present
    assert found.objection is not None
    assert "alike on clean and corrupt" in found.objection


def test_performance_is_asked_of_enough_pairs_of_one_behaviour() -> None:
    net = opened(Copier(128))
    few = induction.generate(5, range(32, 127))
    assert "too few" in str(performs(net, few).objection)
    with pytest.raises(DataError, match="too few"):
        performs(net, few).require()
    with pytest.raises(DataError, match="one behaviour; got no pairs"):
        performs(net, [])
    with pytest.raises(OptionError, match="batch_size"):
        performs(net, few, batch_size=0)
    with pytest.raises(DataError, match="outside the vocabulary of the network"):
        performs(opened(Habit(torch.zeros(40))), few)
    with pytest.raises(TargetError, match="not finite"):
        performs(opened(Habit(torch.full((128,), math.nan))), few)


def test_the_size_of_batches_and_of_buckets_changes_nothing() -> None:
    net = opened(TinyLM(vocab=128, context=64, width=32, num_layers=1, num_heads=2))
    pairs = induction.generate(12, range(32, 127))
    whole, cut = performs(net, pairs), performs(net, pairs, batch_size=5)
    parts = performs(net, [pairs.rows(range(4)), pairs.rows(range(4, 12))])
    for other in (cut, parts):
        assert other.clean == pytest.approx(whole.clean, abs=1e-6)
        assert other.contrast_interval.low == pytest.approx(whole.contrast_interval.low, abs=1e-6)
        assert other.accuracy == whole.accuracy


def test_the_metric_follows_the_pairs() -> None:
    plain = TokenPairs(
        name="mine",
        clean=torch.tensor([[1, 2, 3]]),
        corrupt=torch.tensor([[1, 4, 3]]),
        correct=torch.tensor([[5]]),
        wrong=torch.tensor([[6]]),
        index=torch.tensor([0]),
        position=1,
        metric=MetricKind.PROBABILITY_DIFFERENCE,
    )
    metric = metric_for(plain)
    assert isinstance(metric, ProbabilityDifference)
    assert metric.position == 1
    assert isinstance(metric_for(induction.generate(2, range(99))), LogitDifference)

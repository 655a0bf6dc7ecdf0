"""Patterns of the bundled digits network: recall, verified radius, and honest counterexamples."""

from __future__ import annotations

import pytest
import torch

import patchclamp
from patchclamp.data.bundled import load
from patchclamp.methods.bounds.patterns import (
    CompareRegions,
    Domain,
    MinePatterns,
    Outcome,
    Pattern,
    PatternsApart,
    Prover,
    VerifyPattern,
    active_units,
)

pytestmark = pytest.mark.slow


def test_patterns_of_digits() -> None:
    net = patchclamp.open("digits-mlp")
    train, test = load("digits", split="train"), load("digits", split="test")
    assert train.labels is not None
    assert test.labels is not None
    mined = MinePatterns(delta=0.99).run(
        net, train.inputs, train.labels, (test.inputs, test.labels)
    )
    recall = sum(m.recall.hits for m in mined.values()) / len(test)
    others = sum(m.others.hits for m in mined.values()) / (9 * len(test))
    assert recall > 0.8
    assert others < 0.03
    labels = torch.randperm(len(train))
    shuffled = MinePatterns(delta=0.99).run(
        net, train.inputs, train.labels[labels], (test.inputs, test.labels)
    )
    for label, m in mined.items():  # shuffled labels leave only units that are always the same
        assert shuffled[label].pattern.size < m.pattern.size / 2

    whole = Domain.box(test.inputs[0], 0.0, 1.0)
    predicted = net.run(test.inputs)[0].argmax(1)
    verify = VerifyPattern(prover=Prover(timeout=5))
    everywhere = verify.run(net, mined[0].pattern, 0, whole, starts=test.inputs)
    assert everywhere.outcome is Outcome.REFUTED
    witness = next(d.witness for d in everywhere.decisions.values() if d.witness is not None)
    active = active_units(net, witness.float().reshape(1, 1, 8, 8), list(mined[0].pattern.states))
    assert bool(mined[0].pattern.held_by(active).all())

    pattern = MinePatterns(delta=0.9).run(net, train.inputs, train.labels)[4].pattern
    rows = pattern.followed(net, test.inputs) & (test.labels == 4) & (predicted == 4)
    made = CompareRegions(largest=0.25, tolerance=0.01, verify=verify).run(
        net, pattern, 4, test.inputs[rows][0], test.inputs[test.labels == 4], whole
    )
    assert made.ratio is not None
    assert made.ratio > 1.2
    assert made.recall_pattern.value > 10 * made.recall_ball.value
    ball = whole.ball(test.inputs[rows][0], made.with_pattern.eps)
    plain = verify.run(net, Pattern({}), 4, ball, starts=test.inputs)
    assert plain.outcome is Outcome.REFUTED  # what the pattern excludes is really there

    apart = PatternsApart().run(net, mined[0].pattern, mined[1].pattern, (0, 1), whole)
    assert apart.outcome is Outcome.PROVED

"""A network in which one unit decides the class: patterns with it imply the class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.methods.bounds.patterns import (
    Domain,
    MinePatterns,
    Outcome,
    Pattern,
    PatternsApart,
    VerifyPattern,
    relu_sites,
)
from patchclamp.methods.bounds.patterns.network import Constrained
from patchclamp.net import Net

WHOLE = Domain.box(torch.zeros(4), 0.0, 1.0)


@pytest.fixture(scope="module")
def net() -> Net:
    """Class 0 where x0 + x1 > x2 + x3 - 0.2: unit 0 reads the difference, unit 1 its negative.

    Units 2 and 3 read two of the inputs and say nothing of the class.
    """
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        module[0].weight.copy_(
            torch.tensor([[1.0, 1, -1, -1], [-1, -1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0]])
        )
        module[0].bias.copy_(torch.tensor([0.0, 0.0, -0.5, -0.5]))
        module[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        module[2].bias.copy_(torch.tensor([0.2, 0.0]))
    return patchclamp.open(module, torch.zeros(2, 4))


def states(net: Net, *values: int) -> Pattern:
    (site,) = relu_sites(net)
    return Pattern({site: torch.tensor(values, dtype=torch.int8)})


def test_the_deciding_unit_implies_the_class(net: Net) -> None:
    made = VerifyPattern().run(net, states(net, 1, 0, 0, 0), 0, WHOLE)
    assert made.outcome is Outcome.PROVED
    assert not made.empty


def test_units_that_say_nothing_imply_nothing(net: Net) -> None:
    for pattern in (states(net, 0, 0, 0, 0), states(net, 0, 0, 1, 1), states(net, 0, 1, -1, 1)):
        made = VerifyPattern().run(net, pattern, 0, WHOLE)
        (decision,) = made.decisions.values()
        assert decision.outcome is Outcome.REFUTED
        assert decision.witness is not None
        x = decision.witness[None]
        assert bool(WHOLE.holds(x).all())
        assert bool(pattern.followed(net, x.float()).all())
        assert int(net.run(x.float())[0].argmax()) == 1


def test_an_input_is_a_witness_only_where_nothing_is_left_open(net: Net) -> None:
    made = Constrained.of(net, states(net, 0, 1, -1, 0))
    row = torch.tensor([[1.0, -1.0]]).double()
    assert made.certainly(torch.tensor([0.0, 0, 0.5, 0.5]).double(), row)
    for wrong in ([1.0, 0, 0.5, 0.0], [0.6, 0, 1.0, 1.0]):  # unit 1 off; unit 2 on
        assert not made.certainly(torch.tensor(wrong).double(), row)
    assert not made.certainly(torch.tensor([0.4, 0, 0.5, 0.0]).double(), row)  # of class 0
    border = torch.tensor([0.1 + 0.2, 0, 0.3, 0.0]).double()
    assert not Constrained.of(net, states(net, 1, 0, 0, 0)).certainly(border, -row)


def test_mining_finds_the_deciding_units_and_verification_holds(net: Net) -> None:
    inputs = torch.rand(800, 4)
    difference = inputs[:, :2].sum(1) - inputs[:, 2:].sum(1)
    inputs = inputs[(difference > 0) | (difference < -0.2)]  # away from the tie
    labels = net.run(inputs)[0].argmax(1)
    mined = MinePatterns(delta=0.99).run(net, inputs, labels)
    assert [next(iter(mined[c].pattern.states.values())).tolist() for c in (0, 1)] == [
        [1, -1, 0, 0],
        [-1, 1, 0, 0],
    ]
    assert mined[0].recall.value == mined[1].recall.value == 1.0
    assert mined[0].others.hits == mined[1].others.hits == 0
    assert VerifyPattern().run(net, mined[0].pattern, 0, WHOLE).outcome is Outcome.PROVED
    assert VerifyPattern().run(net, mined[1].pattern, 1, WHOLE).outcome is Outcome.REFUTED
    clash = PatternsApart().run(net, mined[0].pattern, mined[1].pattern, (0, 1), WHOLE)
    assert clash.outcome is Outcome.PROVED


def test_apart_without_a_clash(net: Net) -> None:
    """Unit 1 active contradicts unit 0 active only through the inputs."""
    first, second = states(net, 1, 0, 1, 0), states(net, 0, 1, 0, 0)
    assert first.clashes(second) == []
    # both at 0 is on the border of the two: a pattern's closure; 0 < z excludes it
    inner = Domain(WHOLE.lower + torch.tensor([0.9, 0.9, 0, 0]).double(), WHOLE.upper)
    inner = Domain(inner.lower, torch.tensor([1.0, 1, 0.8, 0.8]).double())
    assert PatternsApart().run(net, first, second, (0, 1), inner).outcome is Outcome.PROVED
    both = PatternsApart().run(net, first, states(net, 0, 0, 0, 1), (0, 1), WHOLE)
    assert both.outcome is Outcome.REFUTED

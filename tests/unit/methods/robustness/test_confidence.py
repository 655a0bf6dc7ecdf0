"""Log-odds say what the softmax says, go on where it ends, and have the right slopes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.errors import OptionError, TargetError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.confidence import (
    checked_classes,
    limits_of,
    log_odds,
    odds_at,
    uphill,
)


def opened(within: tuple[float, float] | None = (0.0, 1.0)) -> Classifier:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    x = torch.rand(5, 6)
    return Classifier.open(patchclamp.open(module, x[:2]), x, within=within)


def test_log_odds_are_those_of_the_softmax_and_do_not_end_at_one() -> None:
    logits = torch.randn(7, 4)
    classes = torch.arange(7) % 4
    own = logits.double().softmax(1).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(torch.sigmoid(log_odds(logits, classes)), own)
    far = log_odds(torch.tensor([[100.0, 0.0], [200.0, 0.0]]), torch.zeros(2, dtype=torch.long))
    assert far.tolist() == [100.0, 200.0]


def test_uphill_is_the_slope_of_log_odds() -> None:
    classifier = opened()
    x, rows, classes = classifier.points, torch.arange(5), torch.arange(5) % 4
    leaf = x.clone().requires_grad_()
    log_odds(classifier.net.module(leaf), classes).sum().backward()
    assert leaf.grad is not None
    odds = odds_at(classifier, x, rows, classes)
    assert bool((odds < 6).all())
    torch.testing.assert_close(
        uphill(classifier, x, rows, classes, odds), leaf.grad, rtol=1e-4, atol=1e-6
    )


def test_uphill_does_not_vanish_where_the_softmax_is_saturated() -> None:
    linear = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[60.0, 0.0], [0.0, 0.0]]))
    x = torch.ones(1, 2)
    classifier = Classifier.open(patchclamp.open(linear, x), x, within=(0.0, 1.0))
    zero = torch.zeros(1, dtype=torch.long)
    odds = odds_at(classifier, x, zero, zero)
    assert float(torch.sigmoid(odds)) == 1.0
    assert uphill(classifier, x, zero, zero, odds).tolist() == [[60.0, 0.0]]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(OptionError, match="finite limits"):
        limits_of(opened(within=None), "a walk")
    with pytest.raises(OptionError, match="limits that are apart"):
        limits_of(_flat(), "a walk")
    with pytest.raises(TargetError, match="not classes"):
        checked_classes(opened(), torch.tensor([4]))
    with pytest.raises(TargetError, match="whole numbers"):
        checked_classes(opened(), torch.tensor([0.5]))


def _flat() -> Classifier:
    classifier = opened()
    assert classifier.within is not None
    classifier.within = (classifier.within[0], classifier.within[0])
    return classifier

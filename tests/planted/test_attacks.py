"""Masked gradients: planted ones are found and said, and an honest network shows no sign.

All networks here are one and the same classifier of digits behind something that hides its
gradients. Plain PGD leaves most rows right; attacks that do not need those gradients do not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.ensemble import Ensemble
from patchclamp.methods.robustness.attacks.masking import MaskingCheck, Verdict
from patchclamp.methods.robustness.attacks.pgd import PGD

RADIUS = 0.15
NUM_ROWS = 60


class Behind(nn.Module):
    """The classifier with something before it and something behind it."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.module = patchclamp.open("digits-mlp").module
        self.before, self.scale = before, scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x if self.before is None else self.before(x))
        return y * self.scale


def rounded(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


def thermometer(x: Tensor) -> Tensor:
    levels = (torch.arange(8) + 0.5) / 8
    return (x[..., None] > levels).to(x).mean(-1) + 0 * x


def opened(module: nn.Module) -> tuple[Classifier, Tensor, Tensor]:
    data = load_data("digits")
    assert data.labels is not None
    x, y = data.inputs[:NUM_ROWS], data.labels[:NUM_ROWS]
    net = patchclamp.open(module.eval(), x[:2])
    return Classifier.open(net, x, within=(0.0, 1.0)), x, y


MASKED = {
    "scaled": (lambda: Behind(scale=1e4), {"logit scale", "zero gradients"}),
    "rounded": (lambda: Behind(rounded), {"zero gradients", "staircase"}),
    "thermometer": (lambda: Behind(thermometer), {"zero gradients", "staircase"}),
}


@pytest.mark.parametrize("kind", MASKED)
def test_masked_networks_look_robust_to_pgd_and_are_not(kind: str) -> None:
    build, expected = MASKED[kind]
    classifier, x, y = opened(build())
    plain = PGD(num_steps=10).run(classifier, x, y, RADIUS)
    ensemble = Ensemble.standard(Norm.LINF, 10, num_steps=10, num_queries=300)
    truth = ensemble.run(classifier, x, y, RADIUS)
    assert plain.accuracy >= 0.85
    assert truth.accuracy <= 0.12
    masking = MaskingCheck(num_steps=10, num_queries=300).run(classifier, x, y, RADIUS)
    assert masking.verdict is Verdict.MASKED
    assert expected | {"scores beat gradients"} <= {sign.name for sign in masking.found}
    assert masking.gradient_accuracy is not None
    assert masking.gradient_accuracy >= 0.85
    assert masking.lowest_accuracy <= 0.15
    assert "upper bound only, not robust accuracy" in masking.statement


def test_an_honest_network_shows_no_sign() -> None:
    classifier, x, y = opened(Behind())
    for radius in (0.03, RADIUS):
        masking = MaskingCheck(num_queries=100).run(classifier, x, y, radius)
        assert masking.found == ()
        assert masking.verdict is Verdict.NO_SIGN
        assert "no sign" in masking.statement
    for norm, size in ((Norm.L2, 0.4), (Norm.L0, 1.0)):
        assert MaskingCheck(num_queries=50).run(classifier, x, y, size, norm=norm).found == ()


def test_noise_is_said_and_its_lucky_rows_are_not_counted() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)

    classifier, x, y = opened(Behind(noisy))
    masking = MaskingCheck(num_queries=100).run(classifier, x, y, 0.05)
    assert masking.verdict is Verdict.MASKED
    assert "nondeterminism" in {sign.name for sign in masking.found}
    assert PGD(num_steps=20).run(classifier, x, y, 0.05).num_unconfirmed > 0


def test_too_few_rows_give_no_verdict() -> None:
    classifier, x, y = opened(Behind())
    masking = MaskingCheck(num_queries=20).run(classifier, x[:5], y[:5], RADIUS)
    assert masking.verdict is Verdict.UNKNOWN
    nothing = MaskingCheck(num_queries=20).run(classifier, x, (y + 1) % 10, RADIUS)
    assert nothing.verdict is Verdict.UNKNOWN

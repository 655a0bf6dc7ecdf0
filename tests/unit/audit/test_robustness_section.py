"""The section of attacks: what is claimed, against what, and what it says of masked gradients."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.audit.sections import robustness as page
from patchclamp.core.document import Curve, Section, Table
from patchclamp.core.findings import Evidence, Verdict
from patchclamp.data import load_data
from patchclamp.net import Net
from tests.audits import context

NUM = 24


def section_of(net: Net) -> Section:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_RADII", (0.0, 0.15))
        patch.setattr(page, "_MAX_ROWS", NUM)
        patch.setattr(page, "_PLANS", ((8, 60, 100),))
        section = page.robustness(context(net, load_data("digits").subset(NUM), 3600))
    assert section is not None
    return section


@cache
def honest() -> Section:
    return section_of(patchclamp.open("digits-mlp"))


class Scaled(nn.Module):
    """Logits so far apart that the cross-entropy has no gradient left."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * 1e4
        return y


def test_attacks_break_what_noise_does_not() -> None:
    none, much = (f for f in honest().findings if f.id.startswith("robustness/attacked/"))
    assert none.verdict is Verdict.UNKNOWN  # radius 0 changes nothing
    assert much.verdict is Verdict.HOLDS
    assert much.evidence is Evidence.OBSERVED
    assert none.effect is not None
    assert much.effect is not None
    assert much.null is not None
    assert none.effect > 0.8
    assert much.effect < 0.3 < 0.6 < much.null.mean
    assert any("upper bound" in c for c in much.caveats)


def test_the_curve_starts_at_accuracy_and_the_table_has_every_row() -> None:
    curve = next(b for b in honest().blocks if isinstance(b, Curve))
    table = next(b for b in honest().blocks if isinstance(b, Table))
    assert curve.x[0] == 0
    assert curve.y[0] == curve.y[1]  # the first radius is 0 here
    assert len(table.rows) == NUM


def test_an_honest_network_shows_no_sign_and_a_masked_one_does() -> None:
    plain = next(f for f in honest().findings if f.id == "robustness/gradients")
    assert plain.verdict is Verdict.HOLDS
    inner = patchclamp.open("digits-mlp")
    net = patchclamp.open(Scaled(inner.module).eval(), inner.example.tensors()[0])
    masked = next(f for f in section_of(net).findings if f.id == "robustness/gradients")
    assert masked.verdict is Verdict.DOES_NOT_HOLD
    assert any("upper bound" in c for c in masked.caveats)


def test_tokens_and_short_times_are_left_out_by_name() -> None:
    ctx = context(patchclamp.open("tiny-lm"), None, 60)
    assert page.robustness(ctx) is None
    assert "tokens" in ctx.budget.left_out[0].why
    short = context(patchclamp.open("digits-mlp"), load_data("digits").subset(NUM), 5.0)
    short.budget.started -= 4.999
    assert page.robustness(short) is None
    assert short.budget.left_out[0].what == "attacks"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

"""The scorer: rows apart, passes counted, memory asked for, the pace of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, SiteError, TargetError
from patchclamp.methods import scoring
from patchclamp.methods.scoring import Pace, Scorer
from tests.networks import opened
from tests.snapshots import snapshot


def linear() -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 3).eval()
    with torch.no_grad():
        module.weight.copy_(torch.randn(3, 5, generator=generator))
    return module, torch.randn(4, 5, generator=generator)


def test_gradients_of_a_linear_network_are_its_weights() -> None:
    module, x = linear()
    classes = torch.tensor([0, 2, 1, 2])
    scorer = Scorer.of(patchclamp.open(module, x), x, classes)
    torch.testing.assert_close(scorer.gradient(), module.weight[classes].detach())
    assert (scorer.passes.forwards, scorer.passes.backwards) == (4, 4)
    torch.testing.assert_close(scorer.plain, module(x).gather(1, classes[:, None])[:, 0].detach())


def test_rows_say_whose_target_counts() -> None:
    module, x = linear()
    scorer = Scorer.of(patchclamp.open(module, x), x, torch.tensor([0, 2, 1, 2]))
    rows = torch.tensor([3, 0, 0, 1, 2])
    values = torch.zeros(5, 5)
    expected = module.bias[torch.tensor([2, 0, 0, 2, 1])].detach()
    torch.testing.assert_close(scorer.scores(values, rows), expected)


def test_a_hidden_site_moves_only_what_lies_behind_it() -> None:
    net, x = opened("digits_mlp")
    before = snapshot(net.module)
    site = "layers.0.act"
    scorer = Scorer.of(net, x, 3, at=site)
    assert scorer.value.shape[0] == len(x)
    rows = torch.arange(len(x))
    torch.testing.assert_close(scorer.scores(scorer.value, rows), scorer.plain)
    moved = scorer.scores(torch.zeros_like(scorer.value), rows)
    edited = net.run(x, edits={"kind": "zero", "site": site}).output[:, 3]
    torch.testing.assert_close(moved, edited)
    assert snapshot(net.module) == before


def test_one_site_and_real_numbers() -> None:
    net, x = opened("tiny_lm")
    with pytest.raises(TargetError, match="tokens"):
        Scorer.of(net, x, 3, at="input")
    with pytest.raises(SiteError):
        Scorer.of(net, x, 3, at="resid_post.*")


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


def test_no_way_back_is_an_error_and_leaves_nothing() -> None:
    x = torch.rand(2, 4)
    scorer = Scorer.of(patchclamp.open(Detached().eval(), x), x, 1)
    with pytest.raises(TargetError, match="no gradient"):
        scorer.gradient()
    assert torch.is_grad_enabled()


def test_a_row_that_needs_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_cnn")
    monkeypatch.setattr(scoring, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="memory") as caught:
        Scorer.of(net, x, 3).gradient()
    assert "tiles" in str(caught.value)
    assert scoring.available_memory() == 1000


def test_memory_is_known() -> None:
    assert 1 << 24 < scoring.available_memory() < 1 << 50


def test_the_pace_doubles_while_it_pays_and_one_slow_pass_does_not_settle_it() -> None:
    pace = Pace(most=64)
    for size in (1, 2, 4, 8):
        assert pace.size == size
        for seconds in (9.0, 1.0, 1.2):  # an interruption, then what it takes
            pace.took(size, seconds)
    assert pace.size == 16
    for _ in range(3):
        pace.took(16, 2.0)  # no cheaper than 8 in one second
    assert pace.size == 8
    pace.took(8, 0.001)
    assert pace.size == 8


def test_memory_bounds_the_pace() -> None:
    net, x = opened("digits_cnn")
    one = Scorer.of(net, x, 3, memory=1)
    list(one.gradients(one.value, torch.arange(len(x))))
    assert one._paces[True].most == 1
    assert Scorer.of(net, x, 3)._most_rows > 8

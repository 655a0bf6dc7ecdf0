"""LIME on linear and far from linear functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import OptionError
from patchclamp.methods import scoring
from patchclamp.methods.attribution.perturbation.lime import Lime
from tests.networks import TwoLinear, opened


class Parity(nn.Module):
    """-1 to the number of columns that are 0: no column counts on its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x - 1).prod(1, keepdim=True)


class Weighted(nn.Module):
    """Score: a fixed ramp of weights times an image."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.arange(36.0).reshape(1, 6, 6) - 10)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weights).flatten(1).sum(1, keepdim=True)


def test_a_linear_network_is_found_and_explained() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    module = TwoLinear().double().eval()
    net = patchclamp.open(module, x)
    found = Lime(num_samples=200, ridge=1e-9, baseline=0.5).run(net, x, 1)
    weight = (module.b.weight @ module.a.weight)[1].detach()
    torch.testing.assert_close(found.values, weight * (x - 0.5), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.fit, torch.ones(3, dtype=torch.float64))
    base = module(torch.full((1, 3), 0.5, dtype=torch.float64))[0, 1].detach()
    torch.testing.assert_close(found.intercept, base.expand(3), rtol=1e-6, atol=1e-7)


def test_the_ridge_shrinks_by_what_it_says() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    net = patchclamp.open(nn.Linear(1, 1).double().eval(), x.repeat(2, 1))
    free = Lime(num_samples=400, ridge=1e-12, width=1e6).run(net, x, 0).values
    held = Lime(num_samples=400, ridge=0.25, width=1e6).run(net, x, 0).values
    # One column that is there half of the time has variance 1/4: the penalty halves its effect.
    torch.testing.assert_close(held, free / 2, rtol=0.02, atol=0)


def test_the_fit_says_where_the_map_means_nothing() -> None:
    x = torch.ones(1, 6, dtype=torch.float64)
    net = patchclamp.open(Parity().eval(), x.repeat(2, 1))
    assert float(Lime(width=1e6).run(net, x, 0).fit) < 0.05


def test_a_narrow_kernel_looks_at_the_example_itself() -> None:
    x = torch.ones(1, 12, dtype=torch.float64)
    net = patchclamp.open(Parity().eval(), x.repeat(2, 1))
    for wide, near in ((0.02, True), (1e6, False)):
        found = Lime(num_samples=60, width=wide).run(net, x, 0)
        there = float(found.intercept + found.effects[0].sum())
        assert (abs(there - float(found.scores)) < 0.01) == near


def test_segments_of_every_form() -> None:
    x = torch.rand(2, 1, 6, 6) + 0.5
    module = Weighted().eval()
    net = patchclamp.open(module, x)
    parts = (x * module.weights).detach()
    tiles = Lime(patch=3, num_samples=64, ridge=1e-9).run(net, x, 0)
    want = parts.unfold(2, 3, 3).unfold(3, 3, 3).sum((1, 4, 5)).flatten(1)
    torch.testing.assert_close(torch.stack(tiles.effects).float(), want, rtol=1e-3, atol=1e-3)
    columns = torch.arange(6).expand(6, 6) // 2 * 7  # any labels
    for segments in (columns, columns[None], columns.expand(2, 1, 6, 6)):
        found = Lime(segments=segments, num_samples=64, ridge=1e-9).run(net, x, 0)
        want = parts.sum((1, 2)).reshape(2, 3, 2).sum(2)
        torch.testing.assert_close(torch.stack(found.effects).float(), want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            found.values.sum((1, 2)).reshape(2, 3, 2).sum(2), want, rtol=1e-3, atol=1e-3
        )
    own = torch.stack([columns[None], torch.zeros(1, 6, 6, dtype=torch.long)])
    sizes = [len(e) for e in Lime(segments=own, num_samples=64).run(net, x, 0).effects]
    assert sizes == [3, 1]


def test_tokens_are_segments_of_a_language_model() -> None:
    net, tokens = opened("tiny_lm")
    found = Lime(num_samples=40).run(net, tokens, 2)
    assert [len(e) for e in found.effects] == [tokens.shape[1]] * len(tokens)
    assert found.passes.forwards <= 40 * len(tokens)


def test_the_same_map_in_any_batch_order_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_mlp")
    method = Lime(num_samples=60, seed=2)
    found = method.run(net, x, 1).values
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)
    again = method.run(net, x[[2, 1]], 1).values
    torch.testing.assert_close(again, found[[2, 1]], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(Lime(num_samples=60, seed=3).run(net, x, 1).values, found)


def test_bad_options_by_name() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(OptionError, match="width and ridge"):
        Lime(ridge=0.0)
    with pytest.raises(OptionError, match=r"too many for 20 samples.*num_samples of 32"):
        Lime(num_samples=20).run(net, x, 0)
    with pytest.raises(OptionError, match="segments do not fit"):
        Lime(segments=torch.zeros(3, 3, dtype=torch.long)).run(net, x, 0)
    with pytest.raises(OptionError, match="patch does not fit"):
        Lime(patch=(2, 2, 2)).run(net, x, 0)

"""Occlusion by hand: windows, strides, edges, axes, signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import OptionError
from patchclamp.methods import scoring
from patchclamp.methods.attribution.perturbation.occlusion import Occlusion
from patchclamp.methods.attribution.perturbation.parts import Fill
from tests.networks import TwoLinear, opened


class Weighted(nn.Module):
    """Score: weights times an image."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weights).flatten(1).sum(1, keepdim=True)


class Features(nn.Module):
    """An image, three channels of it, and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.read = nn.Linear(3 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.conv(x).flatten(1))


def test_single_units_of_a_linear_network() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    module = TwoLinear().double().eval()
    net = patchclamp.open(module, x)
    weight = (module.b.weight @ module.a.weight)[0].detach()
    torch.testing.assert_close(Occlusion(baseline=0.3).run(net, x, 0).values, weight * (x - 0.3))
    at_a = Occlusion(baseline=1.0).run(net, x, 1, at="a")
    want = module.b.weight[1] * (module.a(x) - 1.0)
    torch.testing.assert_close(at_a.values, want.detach())
    assert at_a.passes.forwards == 16


def test_overlapping_windows_are_averaged_up_to_the_edge() -> None:
    weights = torch.tensor([[[1.0, -2.0, 4.0, 8.0, 16.0]]], dtype=torch.float64)
    x = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    net = patchclamp.open(Weighted(weights).eval(), x.repeat(2, 1, 1, 1))
    found = Occlusion(window=(1, 2), stride=(1, 2)).run(net, x, 0).values
    # Windows at 0, 2, and 3 (moved back to the edge): falls -1, 12, 24.
    want = torch.tensor([-1.0, -1.0, 12.0, 18.0, 24.0], dtype=torch.float64)
    torch.testing.assert_close(found[0, 0, 0], want)


def test_axes_not_slid_along_share_the_fall() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn(3, 4, 4, dtype=torch.float64)
    net = patchclamp.open(Weighted(weights).eval(), x)
    found = Occlusion(window=2, stride=2).run(net, x, 0)
    fall = (x * weights).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4))
    torch.testing.assert_close(
        found.heat(signed=True), fall.repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    channels = Occlusion(along=("channel",)).run(net, x, 0)
    assert channels.passes.forwards == 2 * 3
    torch.testing.assert_close(channels.values.sum((2, 3)), (x * weights).sum((2, 3)))
    units = Occlusion(along=("channel", "row", "column"), window=1).run(net, x, 0)
    torch.testing.assert_close(units.values, x * weights)


def test_windows_in_several_parts_stay_with_their_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("patchclamp.methods.attribution.perturbation.occlusion._TOGETHER", 7)
    x = torch.rand(3, 3, 2, 2, dtype=torch.float64)
    weights = torch.randn(3, 2, 2, dtype=torch.float64)
    net = patchclamp.open(Weighted(weights).eval(), x)
    units = Occlusion(along=("channel", "row", "column")).run(net, x, 0)
    torch.testing.assert_close(units.values, x * weights)


def test_channels_of_a_layer_and_heads_of_a_transformer() -> None:
    x = torch.rand(2, 1, 6, 6)
    module = Features().eval()
    net = patchclamp.open(module, x)
    found = Occlusion(along=("channel",)).run(net, x, 0, at="conv")
    parts = (module.conv(x).flatten(1) * module.read.weight[0]).reshape(2, 3, 16).sum(2)
    torch.testing.assert_close(found.values.sum((2, 3)), parts.detach(), rtol=1e-4, atol=1e-5)
    lm, tokens = opened("tiny_lm")
    heads = Occlusion(along=("head",)).run(lm, tokens, 4, at="attn.0.z")
    at = heads.axes.index("head")
    edits = [{"kind": "zero", "site": "attn.0.z", "where": {"head": 1}}]
    without = lm.run(tokens, edits=edits).output[:, -1, 4]
    rest = [i for i in range(1, heads.values.ndim) if i != at]
    torch.testing.assert_close(
        heads.values.sum(rest)[:, 1], heads.scores - without, rtol=1e-3, atol=1e-5
    )


def test_tokens_one_by_one() -> None:
    net, tokens = opened("tiny_lm")
    found = Occlusion().run(net, tokens, 4)
    assert found.site == "embed"
    assert found.passes.forwards == tokens.numel()


def test_the_mean_as_the_baseline() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn(3, 4, 4, dtype=torch.float64)
    net = patchclamp.open(Weighted(weights).eval(), x)
    found = Occlusion(window=1, baseline=Fill.MEAN).run(net, x, 0)
    want = (weights * (x - x.mean((2, 3), keepdim=True))).sum(1)
    torch.testing.assert_close(found.heat(signed=True), want)


def test_the_same_map_at_any_number_of_rows_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_cnn")
    found = Occlusion().run(net, x, 1).values
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)
    torch.testing.assert_close(Occlusion().run(net, x, 1).values, found, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        Occlusion().run(net, x[1:2], 1).values[0], found[1], rtol=1e-3, atol=1e-5
    )


def test_bad_windows_by_name() -> None:
    net, x = opened("digits_cnn")
    with pytest.raises(OptionError, match=r"window does not fit.*row \(8\), column \(8\)"):
        Occlusion(window=9).run(net, x, 1)
    with pytest.raises(OptionError, match="leaves gaps"):
        Occlusion(window=2, stride=3).run(net, x, 1)
    with pytest.raises(OptionError, match="stride does not fit"):
        Occlusion(window=2, stride=0).run(net, x, 1)
    with pytest.raises(OptionError, match=r"no axis 'colunm'.*nearest 'column'"):
        Occlusion(along=("colunm",)).run(net, x, 1)

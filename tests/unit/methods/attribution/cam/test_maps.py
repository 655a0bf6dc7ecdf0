"""Class activation maps against closed forms, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError, SiteError, TargetError
from patchclamp.methods.attribution.cam.cf_cam import CFCAM
from patchclamp.methods.attribution.cam.grad_cam import (
    ActivationMap,
    GradCAM,
    GradCAMPlusPlus,
    SmoothGradCAMPlusPlus,
)
from patchclamp.methods.attribution.cam.layers import default_layer
from patchclamp.methods.attribution.cam.score_cam import ScoreCAM
from patchclamp.net import Net
from tests.networks import opened

METHODS = [GradCAM(), GradCAMPlusPlus(), SmoothGradCAMPlusPlus(num_samples=3), CFCAM(), ScoreCAM()]


class PooledCNN(nn.Module):
    """Convolution, ReLU, mean over all places, linear head."""

    def __init__(self, num_channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, num_channels, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(num_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.act(self.conv(x)).mean((2, 3)))
        return made


class SignalCNN(nn.Module):
    """A signal of one channel, two convolutions of which the first halves its length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.conv2(self.conv1(x).relu()).relu().mean(2))
        return made


@pytest.fixture
def pooled() -> tuple[PooledCNN, Net, Tensor]:
    torch.manual_seed(3)
    module, x = PooledCNN().eval(), torch.rand(4, 1, 8, 8)
    return module, patchclamp.open(module, x), x


def _maps_of(module: PooledCNN, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.act(module.conv(x))


def test_grad_cam_of_a_mean_pooled_head_is_the_class_activation_map(pooled) -> None:
    module, net, x = pooled
    made = GradCAM(relu=False, coarse=True).run(net, x, 1)
    expected = torch.einsum("ncij,c->nij", _maps_of(module, x), module.head.weight[1]) / 64
    torch.testing.assert_close(made.values, expected.detach())
    # So that it adds up to the score, but for the head's bias.
    total = made.values.sum((1, 2)) + module.head.bias[1].detach()
    torch.testing.assert_close(total, made.scores)
    assert (made.passes.forwards, made.passes.backwards) == (4, 4)
    assert made.axes == ("batch", "row", "column")
    assert made.site == "act"


def test_plus_plus_weights_follow_the_paper(pooled) -> None:
    module, net, x = pooled
    made = GradCAMPlusPlus(coarse=True).run(net, x, torch.tensor([0, 1, 2, 0]))
    maps = _maps_of(module, x).double()
    for n, k in enumerate([0, 1, 2, 0]):
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for c in range(6):
            g = float(module.head.weight.detach()[k, c]) / 64
            alpha = g**2 / (2 * g**2 + maps[n, c].sum() * g**3) if g else 0.0
            expected += 64 * alpha * max(g, 0.0) * maps[n, c]
        torch.testing.assert_close(made.values[n].double(), expected, rtol=1e-5, atol=1e-7)


def test_smooth_without_noise_is_plus_plus(pooled) -> None:
    _, net, x = pooled
    plain = GradCAMPlusPlus().run(net, x, 1)
    smooth = SmoothGradCAMPlusPlus(noise=0.0, num_samples=2).run(net, x, 1)
    torch.testing.assert_close(smooth.values, plain.values, rtol=1e-5, atol=1e-7)


def test_feature_maps_and_neurons_are_subsets(pooled) -> None:
    module, net, x = pooled
    only = SmoothGradCAMPlusPlus(feature_maps=(2,), coarse=True, num_samples=2)
    made = only.run(net, x, 1).values
    # The map of one channel is a multiple of that channel.
    channel, rest = _maps_of(module, x)[:, 2].flatten(1), made.flatten(1)
    assert bool((F.cosine_similarity(channel, rest).sub(1).abs() < 1e-5).all()) or not rest.any()
    some = SmoothGradCAMPlusPlus(neurons=((0, 1), (3, 4)), coarse=True, num_samples=2)
    made = some.run(net, x, 1).values
    assert {tuple(p) for p in made.nonzero()[:, 1:].tolist()} <= {(0, 1), (3, 4)}
    assert bool(made.any())


def test_score_cam_by_hand(pooled) -> None:
    module, net, x = pooled
    made = ScoreCAM(coarse=True, relu=False).run(net, x[:1], 2).values[0]
    maps = _maps_of(module, x[:1])[0]
    scores = torch.full((6,), -torch.inf)
    for c, seen in enumerate(maps):
        if seen.max() > seen.min():
            mask = (seen - seen.min()) / (seen.max() - seen.min())
            with torch.no_grad():
                scores[c] = module(x[:1] * mask)[0, 2]
    torch.testing.assert_close(made, torch.einsum("cij,c->ij", maps, scores.softmax(0)))


def test_cf_cam_with_all_channels_dominant_is_gradient_times_value(pooled) -> None:
    _, net, x = pooled
    made = CFCAM(dominant=1.0, relu=False).run(net, x, 1)
    plain = GradCAM(relu=False).run(net, x, 1)  # the same where the gradient is flat
    torch.testing.assert_close(made.values, plain.values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_batch_size_changes_nothing(method: ActivationMap) -> None:
    net, _ = opened("resnet")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = method.options() | {"relu": False}
    one, all_ = (type(method)(**{**options, "batch_size": n}).run(net, x, 3) for n in (1, 64))
    torch.testing.assert_close(one.values, all_.values, rtol=1e-4, atol=1e-6)
    first = type(method)(**options).run(net, x[:2], 3)
    torch.testing.assert_close(first.values, all_.values[:2], rtol=1e-4, atol=1e-6)
    assert all_.values.shape == (5, 8, 8)
    assert bool(all_.values.any())


def test_default_layers() -> None:
    assert default_layer(opened("digits_cnn")[0]).label == "blocks.2.act"
    assert default_layer(opened("resnet")[0]).label == "stages"
    with pytest.raises(SiteError, match=r"no convolution.* at= one of"):
        default_layer(opened("tiny_lm")[0])
    with pytest.raises(SiteError, match="no convolution where"):
        default_layer(opened("vit")[0])


def test_a_signal_has_a_map_over_positions() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 20)
    net = patchclamp.open(SignalCNN().eval(), x, axes=[("batch", 1, 20)])
    made = GradCAM(relu=False).run(net, x, 1)
    assert made.axes == ("batch", "position")
    assert made.values.shape == (3, 20)
    assert GradCAM(coarse=True).run(net, x, 1).values.shape == (3, 10)


def test_tokens_have_a_map_over_positions() -> None:
    net, x = opened("tiny_lm")
    made = GradCAM(relu=False).run(net, x, 5, at="blocks.1")
    assert made.values.shape == (3, 7)
    with pytest.raises(TargetError, match="tokens"):
        SmoothGradCAMPlusPlus().run(net, x, 5, at="blocks.1")


def test_sites_without_space_are_refused() -> None:
    net, x = opened("resnet")
    with pytest.raises(SiteError, match=r"'head'.*no spatial axes.*stages"):
        GradCAM().run(net, x, 1, at="head")
    with pytest.raises(SiteError, match="no spatial axes"):
        GradCAM().run(net, x, 1, at="pool")  # one row and one column are no space
    with pytest.raises(SiteError, match="not at the input"):
        GradCAM().run(net, x, 1, at="input")
    with pytest.raises(SiteError, match="expected one"):
        GradCAM().run(net, x, 1, at="stages.*")
    vit, images = opened("vit")
    with pytest.raises(SiteError, match="coarse=True"):
        GradCAM().run(vit, images, 1, at="blocks.0")
    assert GradCAM(coarse=True).run(vit, images, 1, at="blocks.0").values.ndim == 2


def test_bad_targets_and_options(pooled) -> None:
    _, net, x = pooled
    with pytest.raises(TargetError, match="not an output"):
        GradCAM().run(net, x, 3)
    with pytest.raises(TargetError, match="one scalar per row"):
        GradCAM().run(net, x, lambda out: out)
    with pytest.raises(TargetError, match="does not depend"):
        GradCAM().run(net, x, lambda out: torch.zeros(len(out)))
    with pytest.raises(InputError, match="NaN"):
        GradCAM().run(net, x / 0 * 0, 1)
    with pytest.raises(OptionError, match="batch_size"):
        GradCAM(batch_size=0).run(net, x, 1)
    for wrong in ({"num_samples": 0}, {"noise": -1.0}):
        with pytest.raises(OptionError):
            SmoothGradCAMPlusPlus(**wrong)
    with pytest.raises(OptionError, match="the layer lacks"):
        SmoothGradCAMPlusPlus(feature_maps=(6,)).run(net, x, 1)
    with pytest.raises(OptionError, match="2 numbers"):
        SmoothGradCAMPlusPlus(neurons=((1,),)).run(net, x, 1)
    with pytest.raises(OptionError, match="is left"):
        SmoothGradCAMPlusPlus(neurons=()).run(net, x, 1)
    for wrong in ({"dominant": 2.0}, {"min_channels": 0}, {"radius": 0.0}, {"sigma": -1.0}):
        with pytest.raises(OptionError):
            CFCAM(**wrong)
    with pytest.raises(OptionError):
        ScoreCAM(num_maps=0)


def test_flat_maps_have_no_score_cam() -> None:
    module = PooledCNN().eval()
    nn.init.constant_(module.conv.bias, -100.0)  # every map is 0
    net = patchclamp.open(module, torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError, match="example 0"):
        ScoreCAM().run(net, torch.rand(2, 1, 8, 8), 1)
    assert not GradCAM().run(net, torch.rand(2, 1, 8, 8), 1).values.any()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_left_as_found_after_an_error(method: ActivationMap, pooled) -> None:
    module, net, x = pooled

    def broken(output: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        method.run(net, x, broken)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.is_grad_enabled()


def test_training_mode_warns(pooled) -> None:
    module, net, x = pooled
    module.train()
    with pytest.warns(UserWarning, match="training mode"):
        GradCAM().run(net, x, 1)

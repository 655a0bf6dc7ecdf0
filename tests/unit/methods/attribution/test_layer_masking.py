"""Layer masking: only what is kept is seen; the network's own output where all is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError, InputError
from patchclamp.data.bundled import load
from patchclamp.methods.attribution.layer_masking import (
    BORDER,
    KNOWN,
    MASKED,
    LayerMasking,
    Masks,
    neighbour_padded,
)
from tests.networks import opened


class Everything(nn.Module):
    """Padding apart, strided, dilated and depthwise convolutions, pools, residual, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.first(F.pad(x, (0, 1, 0, 1))))
        y = y + self.second(y)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = F.avg_pool2d(F.max_pool2d(y, 3, 1, 1), 2)
        made: Tensor = self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return made


def _boxed(num: int = 3, size: int = 8) -> Tensor:
    kept = torch.ones(num, size, size, dtype=torch.bool)
    kept[1, 2:5, 3:7] = False
    kept[2, :, :4] = False
    return kept


@pytest.fixture(scope="module")
def everything() -> tuple[patchclamp.net.Net, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    return patchclamp.open(Everything().eval(), x), x


def test_rings_of_neighbours_by_hand() -> None:
    x = torch.tensor([[[[1.0, 9, 9, 9], [3, 9, 9, 9]]]])
    state = torch.tensor([[[[1, 0, 0, 0], [1, 0, 0, 0]]]], dtype=torch.uint8)
    made = neighbour_padded(x, state, 2)[0, 0]
    assert made.tolist() == [[1, 2, 2, 0], [3, 2, 2, 0]]
    bordered = state.clone()
    bordered[0, 0, 0, 0] = BORDER  # stays as it is and tells its neighbours nothing
    made = neighbour_padded(x, bordered, 1)[0, 0]
    assert made.tolist() == [[1, 3, 0, 0], [3, 3, 0, 0]]
    assert (MASKED, KNOWN) == (0, 1)


def test_a_signal_has_neighbours_too() -> None:
    x, state = torch.tensor([[[4.0, 7, 7, 2]]]), torch.tensor([[[1, 0, 0, 1]]], dtype=torch.uint8)
    assert neighbour_padded(x, state, 1).tolist() == [[[4, 4, 2, 2]]]


def test_all_kept_is_the_network_itself(everything) -> None:
    for net, x in (everything, opened("resnet"), opened("digits_cnn")):
        made = LayerMasking().run(net, x, torch.ones(3, 8, 8, dtype=torch.bool))
        assert torch.equal(made, net.run(x).output)


def test_what_is_masked_is_not_seen(everything) -> None:
    for net, x in (everything, opened("resnet"), opened("digits_cnn")):
        kept = _boxed()
        made = LayerMasking().run(net, x, kept)
        loud = torch.where(kept[:, None], x, 1e3 * torch.randn(x.shape))
        torch.testing.assert_close(LayerMasking().run(net, loud, kept), made, rtol=0, atol=0)
        assert bool((made[1:] != net.run(x).output[1:]).any(1).all())
        torch.testing.assert_close(made[0], net.run(x).output[0])
        alone = LayerMasking().run(net, x[1:2], kept[1:2])
        torch.testing.assert_close(alone, made[1:2], rtol=1e-5, atol=1e-6)


def test_an_even_image_stays_even_whatever_is_masked() -> None:
    """A convolution without zero padding of a constant is constant: no edge is to be seen."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
    module.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(4, 2))
    x = torch.full((3, 1, 8, 8), 0.7)
    net = patchclamp.open(module.eval(), x)
    made = LayerMasking().run(net, x, _boxed())
    torch.testing.assert_close(made, net.run(x).output)
    grey = net.run(torch.where(_boxed()[:, None], x, 0.0)).output
    assert float((grey[1] - made[1]).abs().max()) > 1e-3  # which a colour shows


def test_gradients_pass(everything) -> None:
    net, x = everything
    kept, leaf = _boxed(), x.clone().requires_grad_()
    with Masks() as masks:
        masks.give(leaf, kept)
        net.module(leaf).sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[~kept[:, None]].any()
    assert bool(leaf.grad[kept[:, None]].any())


@pytest.mark.parametrize(
    ("last", "name"),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 2), "conv_transpose2d"),
        (lambda: nn.GroupNorm(2, 4), "group_norm"),
        (lambda: nn.Upsample(scale_factor=2), "interpolate"),
        (lambda: nn.Softmax2d(), "softmax"),
    ],
)
def test_operators_without_a_rule_are_named(last: Callable[[], nn.Module], name: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), last(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(3, 1, 8, 8)
    net = patchclamp.open(module.eval(), x)
    with pytest.raises(EngineError, match=name):
        LayerMasking().run(net, x, _boxed())
    LayerMasking().run(net, x, torch.ones(3, 8, 8, dtype=torch.bool))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_masks_of_another_shape_are_refused() -> None:
    net, x = opened("resnet")
    with pytest.raises(InputError, match=r"\(3, 8, 8\)"):
        LayerMasking().run(net, x, torch.ones(3, 4, 4, dtype=torch.bool))


def test_less_missingness_bias_than_colours_on_digits() -> None:
    """Random places are masked: the network keeps its answer more often than with a colour."""
    net, images = patchclamp.open("digits-cnn"), load("digits", "test").inputs[:100]
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(100, 4, 4, generator=generator) >= 0.25
    kept = kept.repeat_interleave(2, 1).repeat_interleave(2, 2)
    plain = net.run(images).output.softmax(1)

    def moved(output: Tensor) -> tuple[float, float]:
        same = (output.argmax(1) == plain.argmax(1)).float().mean()
        away = (output.softmax(1) - plain).abs().sum(1).mean()
        return float(same), float(away)

    same, away = moved(LayerMasking().run(net, images, kept))
    for colour in (0.5, 1.0):
        other, far = moved(net.run(torch.where(kept[:, None], images, colour)).output)
        assert same > other + 0.1
        assert away < far - 0.1

"""The attribute bench: names, nulls, determinism, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import DataError, OptionError, TargetError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attributes import (
    AttributeBench,
    BackgroundEdit,
    Behind,
    ObjectEdit,
    standard_edits,
)
from patchclamp.methods.robustness.scenes import Scenes, Warp

SIDE = 10


class Corner(nn.Module):
    """Says 1 where one corner's pixel is bright: it looks at the background alone."""

    def forward(self, x: Tensor) -> Tensor:
        score = 20 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], 1)


def setting(num: int = 24) -> tuple[Classifier, Scenes, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    plates = 0.3 + 0.4 * labels[:, None, None, None] * torch.ones(num, 1, SIDE, SIDE)
    masks = torch.zeros(num, 1, SIDE, SIDE)
    masks[:, :, 4:7, 4:7] = 1
    paint = torch.rand((num, 1, SIDE, SIDE), generator=generator)
    scenes = Scenes.of(plates * (1 - masks) + masks * paint, masks, plates)
    net = patchclamp.open(Corner().eval(), scenes.images[:1])
    return Classifier.open(net, scenes.images, within=(0.0, 1.0)), scenes, labels


def test_a_network_of_the_background_alone_in_closed_form() -> None:
    table = AttributeBench(edits=standard_edits()).run(*setting())
    assert table.plain.share == 1.0
    other = table.of("background other class")
    assert (other.null.share, other.edited.share, other.drop) == (1.0, 0.0, 1.0)
    assert other.is_found
    assert other.null.interval.low > 0.8
    noise = table.of("background noise")
    assert 0.2 < noise.edited.share < 0.8
    adversarial = table.of("background adversarial")
    assert adversarial.edited.share == 0.0
    assert adversarial.null.share == noise.edited.share  # its null is that noise
    for name in (
        "size 0.75",
        "size 1.25",
        "rotation +30",
        "direction",
        "background blur",
        "background flat",
    ):
        drop = table.of(name)
        assert (drop.null.share, drop.edited.share, drop.is_found) == (1.0, 1.0, False)


def test_a_seed_gives_the_same_whatever_else_is_asked_for() -> None:
    noise = BackgroundEdit(behind=Behind.NOISE)
    alone = AttributeBench(edits=(noise,)).run(*setting())
    among = AttributeBench(edits=standard_edits()).run(*setting())
    assert alone.of(noise.name) == among.of(noise.name)


def test_bad_input_is_said() -> None:
    classifier, scenes, labels = setting()
    bench = AttributeBench(edits=(BackgroundEdit(behind=Behind.OTHER),))
    few = scenes.pick(torch.arange(5))
    with pytest.raises(DataError, match="no interval"):
        bench.run(classifier, few, labels[:5])
    with pytest.raises(DataError, match="no other class"):
        bench.run(classifier, scenes, 0 * labels)
    single = torch.zeros_like(labels)
    single[0] = 1
    with pytest.raises(DataError, match="one image of its class"):
        bench.run(classifier, scenes, single)
    with pytest.raises(TargetError, match="labels"):
        bench.run(classifier, scenes, labels + 1)
    with pytest.raises(OptionError, match="finite limits"):
        bench.run(Classifier.open(classifier.net, scenes.images), scenes, labels)
    with pytest.raises(OptionError, match="different names"):
        AttributeBench(edits=(ObjectEdit(warp=Warp()), ObjectEdit(warp=Warp())))
    with pytest.raises(OptionError, match="no attribute"):
        bench.run(classifier, scenes, labels).of("colour")

"""The bars of fooling images, level sets, transfer and attributes, at full size.

Level sets of digits end at about .12 from their targets, where attacks from the targets end too
(see `benchmarks/robustness.py`): on these networks .05 is not to be had, and the bar is held on
EfficientNet-Lite0.
"""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.robustness.attacks.balls import Ball, Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attributes import AttributeBench, ObjectEdit, standard_edits
from patchclamp.methods.robustness.confidence import odds_at
from patchclamp.methods.robustness.feature_transfer import FeatureAttack, Maker, TransferBench
from patchclamp.methods.robustness.fooling import FoolByEvolution, FoolByGradient
from patchclamp.methods.robustness.level_sets import LevelSetTraversal
from patchclamp.methods.robustness.scenes import Warp
from patchclamp.model.preprocessing import prepared
from patchclamp.specimens import build
from patchclamp.truth.attributes import planted_scenes, trained
from patchclamp.truth.attribution.fitting import Recipe, fitted

pytestmark = pytest.mark.slow


def digits(split: str) -> tuple[Tensor, Tensor]:
    data = load_data("digits", split=split)
    assert data.labels is not None
    return data.inputs, data.labels


def opened(module: nn.Module, x: Tensor) -> Classifier:
    return Classifier.open(patchclamp.open(module, x[:2]), x, within=(0.0, 1.0))


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp"])
def test_fooling_images_are_surer_than_any_real_one(name: str) -> None:
    x, labels = digits("test")
    network = Classifier.open(patchclamp.open(name), x, within=(0.0, 1.0))
    own = network.answers(x, torch.arange(len(x))).double().softmax(1)
    real = own.gather(1, labels[:, None])[:, 0]
    classes = torch.arange(10)
    noise = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    climbed = FoolByGradient().run(network, classes, starts=noise)
    evolved = FoolByEvolution().run(network, classes)
    for found in (climbed, evolved):
        assert float(found.confidences.median()) >= 0.999
        for number in range(10):  # surer than the surest real image of each class
            assert float(found.confidences[number]) > float(real[labels == number].max())


def test_walks_end_where_attacks_from_the_target_end() -> None:
    """No walk can end nearer to its target than the nearest place that is sure enough."""
    x, labels = digits("test")
    network = Classifier.open(patchclamp.open("digits-mlp"), x, within=(0.0, 1.0))
    likely, answers = network.answers(x, torch.arange(len(x))).softmax(1).max(1)
    sure = ((likely > 0.9) & (answers == labels)).nonzero().flatten()[:80]
    first, second = sure[:40], sure[40:]
    apart = labels[first] != labels[second]
    sources = Classifier.open(network.net, x[first[apart]], within=(0.0, 1.0))
    targets, classes = x[second[apart]], labels[first[apart]]
    found = LevelSetTraversal().run(sources, sources.points, targets)
    assert float(found.falls.max()) <= 0.2
    rows = torch.arange(len(targets))
    for share, most in ((0.9, 0.3), (1.1, 1.0)):
        ball = Ball.of(Norm.L2, targets, share * found.rmse * 8, sources.within)
        point = ball.drawn(torch.Generator().manual_seed(0))
        for number in range(100):
            slopes = sources.slopes(point, rows, Loss.MARGIN, classes, classes).slopes
            size = torch.full((len(rows),), 0.3 * (1 - number / 100), dtype=torch.float64)
            point = ball.step(point, slopes, size)
        odds = odds_at(sources, point, rows, classes)
        is_sure = torch.sigmoid(odds) >= found.source_confidences - 0.2
        reached = float(is_sure.double().mean())
        assert reached <= most
        if share > 1:
            assert reached >= 0.7


def test_level_sets_meet_the_bar_on_photographs() -> None:
    photographs = load_sample_images().images
    how = patchclamp.open("efficientnet-lite0").loaded.preprocessing
    assert how is not None
    made = []
    for photograph in photographs:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 255
        side = min(image.shape[2:])
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        made.append(prepared(image[:, :, top : top + side, left : left + side], how))
    x = torch.cat(made)
    net = patchclamp.open("efficientnet-lite0")
    sources = Classifier.open(net, x, within=(-127 / 128, 1.0))
    found = LevelSetTraversal().run(sources, x, x.flip(0))
    assert bool(found.is_reached.all())
    assert float(found.rmse.max()) <= 0.05
    assert float(found.falls.max()) <= 0.2
    assert int(found.num_steps.max()) <= 200


def test_features_carry_over_and_noise_and_strangers_do_not() -> None:
    x, labels = digits("train")
    pairs = zip(digits("test"), digits("validation"), strict=True)
    test, test_labels = (torch.cat(pair) for pair in pairs)
    low, high = labels < 5, test_labels >= 5

    def vit(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        return build("vit", num_classes=num_classes)

    pretrained = fitted(vit, x[low], labels[low], 5, Recipe(epochs=30, rows=64), seed=0)

    def tuned(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        module = copy.deepcopy(pretrained).requires_grad_(True)
        module.head = nn.Linear(32, num_classes)
        return module

    short = Recipe(epochs=10, rate=1e-3, rows=64)
    downstream = fitted(tuned, x[~low], labels[~low] - 5, 5, short, seed=1)
    long = Recipe(epochs=30, rows=64)
    stranger = fitted(vit, x[~low], labels[~low] - 5, 5, long, seed=7)
    points = test[high]
    bench = TransferBench(attack=FeatureAttack(sites=("blocks.0", "blocks.1"), token=0))
    found = bench.run(
        opened(pretrained, points),
        opened(downstream, points),
        points,
        test_labels[high] - 5,
        0.15,
        stranger=opened(stranger, points),
    )
    assert found.is_shown
    assert found.over_noise[0] >= 0.2
    assert found.over_logits[1].low > 0  # at this radius; at half of it there is no difference
    assert found.over_stranger is not None
    assert found.over_stranger[0] >= 0.2
    assert found.of(Maker.FEATURES, "stranger").success <= 0.2


def test_every_attribute_of_the_two_worlds() -> None:
    turn = ObjectEdit(warp=Warp(degrees=90))  # whole pixels: the null is the image itself
    for seed in range(3):
        scenes, labels = planted_scenes(200, shortcut=True, seed=100 + seed)
        network = opened(trained(shortcut=True, seed=seed), scenes.images)
        table = AttributeBench(edits=(*standard_edits(), turn)).run(network, scenes, labels)
        assert table.of("background other class").drop >= 0.8
        scenes, labels = planted_scenes(200, shortcut=False, seed=100 + seed)
        network = opened(trained(shortcut=False, seed=seed), scenes.images)
        table = AttributeBench(edits=(*standard_edits(), turn)).run(network, scenes, labels)
        assert not table.of("background other class").is_found
        assert not table.of("direction").is_found
        assert table.of(turn.name).drop == pytest.approx(0.5, abs=0.1)  # bar and post

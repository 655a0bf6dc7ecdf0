"""Digits: images that fool without showing anything, and level sets that reach other classes.

Both with their controls: real images are recognised, and a walk on the level set of a network
ends no farther than where the confidence says it must.
"""

from __future__ import annotations

import torch

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.fooling import FoolByEvolution, FoolByGradient
from patchclamp.methods.robustness.level_sets import LevelSetTraversal
from patchclamp.methods.robustness.recognition import Recognition, RecognitionCheck


def opened(name: str) -> Classifier:
    data = load_data("digits", split="train")
    return Classifier.open(patchclamp.open(name), data.inputs[:10], within=(0.0, 1.0))


def looked(points: torch.Tensor, classes: torch.Tensor, witness: Classifier) -> Recognition:
    train, test = load_data("digits", split="train"), load_data("digits")
    assert train.labels is not None
    assert test.labels is not None
    return RecognitionCheck().run(
        witness,
        points,
        classes,
        examples=train.inputs,
        labels=train.labels,
        real=test.inputs,
        real_labels=test.labels,
    )


def test_noise_climbs_to_certainty_and_still_shows_nothing() -> None:
    cnn, mlp, classes = opened("digits-cnn"), opened("digits-mlp"), torch.arange(10)
    noise = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = FoolByGradient(num_steps=100).run(cnn, classes, starts=noise)
    assert float(found.start_confidences.median()) < 0.5
    assert float(found.confidences.median()) >= 0.9998
    assert float(found.confidences.min()) >= 0.995  # above what a real image of digits gets
    seen = looked(found.points, classes, mlp)
    assert seen.reason is None
    assert seen.real.recognised >= 0.95
    assert max(seen.wrong.recognised, seen.noise.recognised) <= 0.1
    assert seen.unrecognisable is not None
    assert seen.unrecognisable >= 0.7
    assert int(seen.images.is_alike.sum()) == 0


def test_evolution_fools_without_a_gradient() -> None:
    mlp, classes = opened("digits-mlp"), torch.arange(10)
    found = FoolByEvolution(num_rounds=250).run(mlp, classes)
    assert found.passes.backwards == 0
    assert float(found.confidences.median()) >= 0.9999
    seen = looked(found.points, classes, opened("digits-cnn"))
    assert int(seen.images.is_alike.sum()) <= 1


def test_real_digits_are_recognised() -> None:
    data = load_data("digits", split="validation")
    assert data.labels is not None
    seen = looked(data.inputs[:100], data.labels[:100], opened("digits-mlp"))
    assert seen.unrecognisable is not None
    assert seen.unrecognisable <= 0.05


def test_level_sets_of_digits_reach_far_into_other_classes() -> None:
    data = load_data("digits")
    assert data.labels is not None
    net = patchclamp.open("digits-mlp")
    with torch.no_grad():
        sure = net.module(data.inputs).softmax(1).amax(1) > 0.9
    x, labels = data.inputs[sure][:40], data.labels[sure][:40]
    apart = labels[:20] != labels[20:]
    sources, targets = x[:20][apart], x[20:][apart]
    classifier = Classifier.open(net, sources, within=(0.0, 1.0))
    found = LevelSetTraversal(num_steps=100).run(classifier, sources, targets)
    assert float(found.falls.max()) <= 0.2
    assert float(found.target_confidences.max()) < 0.5
    assert float((found.rmse / found.start_rmse).median()) <= 0.4

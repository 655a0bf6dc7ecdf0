"""A background shortcut that was planted is found, and not where there is none."""

from __future__ import annotations

import pytest
import torch

import patchclamp
from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attributes import (
    AttributeBench,
    AttributeTable,
    BackgroundEdit,
    Behind,
    ObjectEdit,
)
from patchclamp.methods.robustness.scenes import Warp
from patchclamp.truth.attributes import planted_scenes, trained

EDITS = (
    BackgroundEdit(behind=Behind.OTHER),
    BackgroundEdit(behind=Behind.BLUR),
    ObjectEdit(warp=Warp(mirrored=True)),
    ObjectEdit(warp=Warp(degrees=90)),
)


def measured(*, shortcut: bool) -> AttributeTable:
    # the shortcut is learnt at once, the forms are not
    module = trained(shortcut=shortcut, seed=0, epochs=2 if shortcut else 8)
    scenes, labels = planted_scenes(60, shortcut=shortcut, seed=9)
    net = patchclamp.open(module, scenes.images[:1])
    classifier = Classifier.open(net, scenes.images, within=(0.0, 1.0))
    return AttributeBench(edits=EDITS).run(classifier, scenes, labels)


def test_the_shortcut_is_found_as_a_drop_by_the_background() -> None:
    table = measured(shortcut=True)
    assert table.plain.share >= 0.95
    other = table.of("background other class")
    assert other.null.share >= 0.95  # another background of the same class
    assert other.drop >= 0.8
    assert other.is_found
    assert not table.of("background blur").is_found
    assert not table.of("rotation +90").is_found  # it does not look at the object


def test_without_the_shortcut_backgrounds_cost_nothing_and_the_form_does() -> None:
    table = measured(shortcut=False)
    assert table.plain.share >= 0.95
    assert abs(table.of("background other class").drop) <= 0.05
    for name in ("background other class", "background blur", "direction"):
        assert not table.of(name).is_found  # forms are their own mirror images
    turned = table.of("rotation +90")  # bar and post are each other's, cross and frame their own
    assert turned.drop == pytest.approx(0.5, abs=0.1)
    assert turned.is_found


def test_planted_scenes_are_what_they_say() -> None:
    scenes, labels = planted_scenes(40, shortcut=True, seed=0)
    torch.testing.assert_close(scenes.composed, scenes.images)
    level = scenes.plates.flatten(1).amin(1)
    torch.testing.assert_close(level, 0.2 * labels, rtol=0, atol=0.02)
    free, labels = planted_scenes(400, shortcut=False, seed=0)
    level = free.plates.flatten(1).amin(1)
    both = torch.corrcoef(torch.stack([level, labels.float()]))
    assert abs(float(both[0, 1])) < 0.15
    with pytest.raises(OptionError):
        planted_scenes(3, shortcut=True, seed=0)

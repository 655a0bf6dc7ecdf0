"""Benches for attribution: the gate holds, a gradient finds what is planted, controls do not.

Small versions; the bars at full size are in tests/slow/test_attribution_benches.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.methods.attribution.base import Explainer
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.truth.attribution import (
    Blocks,
    BrightRegion,
    DiffRoar,
    Edges,
    GivenMaps,
    Glyphs,
    PlantedMaps,
    RandomMap,
    Recipe,
    Slabs,
    Variant,
    controls_of,
)
from patchclamp.truth.attribution.blocks import images


def _filters(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(shape[0], 12, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


GLYPHS = Glyphs(
    size=14,
    num=100,
    num_train=1000,
    build=_filters,
    recipe=Recipe(epochs=10, rows=64, rate=1e-2, decay=0.01),
)


GRADIENT = Gradient()


def _mass(planted: PlantedMaps, method: Explainer = GRADIENT) -> float:
    maps = method.run(planted.net, planted.inputs, planted.labels)
    return planted.scores(maps).signal_mass.mean


def test_glyphs_pass_the_gate_and_edges_are_at_chance() -> None:
    planted = GLYPHS.run()
    assert planted.gate.holds, planted.gate.failures
    assert planted.moving
    assert planted.distractor is not None
    method = _mass(planted)
    assert method > 0.54
    for control in controls_of(Gradient()):
        assert abs(_mass(planted, control) - 0.5) < 0.05, control.name
    assert _mass(planted, Edges()) == pytest.approx(0.5, abs=0.01)
    assert _mass(planted, GivenMaps(maps=planted.signal)) == 1.0
    assert _mass(planted, GivenMaps(maps=planted.distractor)) == 0.0
    short = dataclasses.replace(GLYPHS, num=20, num_train=100)
    again, same = short.run(), short.run()
    assert torch.equal(again.inputs, same.inputs)
    weights = [next(p.net.module.parameters()) for p in (again, same)]
    assert torch.equal(*weights)


def test_glyphs_with_shuffled_labels_fail_the_gate() -> None:
    planted = dataclasses.replace(GLYPHS, shuffled=True, recipe=Recipe(epochs=3)).run()
    assert not planted.gate.holds
    assert planted.gate.accuracy.value < 0.4


def test_blocks_show_the_digit_where_it_is_always_on_top() -> None:
    short = Recipe(epochs=12)
    standard, top = (Blocks(variant=v, recipe=short).run() for v in (Variant.STANDARD, Variant.TOP))
    assert _mass(top) - _mass(standard) >= 0.30
    for control in controls_of(Gradient()):
        assert abs(_mass(standard, control) - 0.5) < 0.05, control.name
    assert standard.moving
    assert not top.moving
    assert standard.gate.without_target.value <= standard.gate.chance + 0.05
    assert standard.gate.accuracy.value > 0.9


def test_blocks_with_shuffled_labels_show_nothing() -> None:
    planted = Blocks(variant=Variant.TOP, shuffled=True, recipe=Recipe(epochs=3)).run()
    assert planted.gate.accuracy.value < 0.2
    assert not planted.gate.holds


def test_slabs_are_not_read_where_a_line_does() -> None:
    planted = Slabs(num_train=2000, recipe=Recipe(epochs=8)).run()
    assert planted.gate.holds, planted.gate.failures
    assert planted.area_simple == pytest.approx(0.5, abs=0.05)
    assert planted.area_complex > 0.99
    assert _mass(planted) > 0.85
    assert abs(_mass(planted, RandomMap()) - 0.5) < 0.05
    # negative control: where the line says nothing the slabs are read, and the areas turn round
    turned = Slabs(simple=False, num=500, num_train=3000).run()
    assert turned.gate.holds, turned.gate.failures
    assert turned.area_complex == pytest.approx(0.5, abs=0.05)
    assert turned.area_simple > 0.99
    assert not bool((turned.signal & planted.signal[:1]).any())


def test_a_bright_region_of_real_images() -> None:
    planted = BrightRegion().run()
    assert planted.gate.holds, planted.gate.failures
    assert _mass(planted) > 0.7
    for control in controls_of(Gradient(), moving=False):
        assert abs(_mass(planted, control) - 0.5) < 0.06, control.name
    short = Recipe(epochs=5)
    assert not BrightRegion(shuffled=True, recipe=short).run().gate.holds


def test_masks_of_gradients_tell_the_digit() -> None:
    """The mask alone, of gradients of a network with random weights."""
    generator = torch.Generator().manual_seed(0)
    (x, labels), test = images("digits", 8, generator)
    train = x[:800], labels[:800]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    net = patchclamp.open(module, train[0][:2])
    bench = DiffRoar(rounds=1, recipe=Recipe(epochs=6))
    found = bench.of_method(Gradient(), net, train, test)
    assert found.mask_leaks
    assert found.mask_top.mean > 4 * found.mask_top.chance
    chance = bench.of_method(RandomMap(), net, train, test)
    assert not chance.mask_leaks
    assert abs(chance.difference.mean) < 0.1

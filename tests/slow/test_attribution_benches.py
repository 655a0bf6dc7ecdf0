"""The bars of the benches for attribution, at full size and over seeds."""

from __future__ import annotations

import pytest

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.attribution.base import Explainer
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.truth.attribution import (
    Blocks,
    BrightRegion,
    Build,
    DiffRoar,
    Edges,
    Glyphs,
    Lesions,
    PlantedMaps,
    RandomMap,
    RandomWeights,
    Recipe,
    Slabs,
    Variant,
    controls_of,
    convolutional,
    perceptron,
)

pytestmark = pytest.mark.slow

GRADIENT = Gradient()


def _mass(planted: PlantedMaps, method: Explainer = GRADIENT) -> float:
    maps = method.run(planted.net, planted.inputs, planted.labels)
    return planted.scores(maps).signal_mass.mean


@pytest.mark.parametrize(
    ("build", "recipe", "top", "robust", "seeds"),
    [
        (perceptron, Recipe(radius=1.0), 0.30, 0.25, (0, 1, 2)),
        (convolutional, Recipe(epochs=15, radius=1.0), 0.10, 0.15, (0,)),
    ],
)
def test_blocks(
    build: Build, recipe: Recipe, top: float, robust: float, seeds: tuple[int, ...]
) -> None:
    for seed in seeds:
        made = {v: Blocks(variant=v, build=build, recipe=recipe, seed=seed).run() for v in Variant}
        base = _mass(made[Variant.STANDARD])
        assert _mass(made[Variant.TOP]) - base >= top
        assert _mass(made[Variant.ROBUST]) - base >= robust
        for variant in (Variant.STANDARD, Variant.ROBUST):
            for control in controls_of(GRADIENT):
                assert abs(_mass(made[variant], control) - 0.5) <= 0.05, (variant, control.name)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_glyphs(seed: int) -> None:
    planted = Glyphs(seed=seed).run()
    assert planted.gate.holds, planted.gate.failures
    assert abs(_mass(planted, Edges()) - 0.5) <= 0.05
    assert _mass(planted) > 0.55


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slabs(seed: int) -> None:
    planted = Slabs(seed=seed).run()
    assert planted.gate.holds, planted.gate.failures
    assert abs(planted.area_simple - 0.5) <= 0.05
    assert planted.area_complex >= 0.99
    turned = Slabs(simple=False, seed=seed).run()
    assert abs(turned.area_complex - 0.5) <= 0.05
    assert turned.area_simple >= 0.99


@pytest.mark.parametrize("bench", [BrightRegion(), Lesions()])
def test_signal_in_images_as_they_are(bench: BrightRegion | Lesions) -> None:
    planted = bench.run()
    assert planted.gate.holds, planted.gate.failures
    assert abs(_mass(planted, Edges()) - 0.5) <= 0.05
    assert _mass(planted) > 0.53


def test_masks_leak_the_label() -> None:
    train, test = (load_data("digits", split=s) for s in ("train", "test"))
    assert train.labels is not None
    assert test.labels is not None
    net = patchclamp.open("digits-mlp")
    rows = {
        m.name: DiffRoar().of_method(
            m, net, (train.inputs, train.labels), (test.inputs, test.labels)
        )
        for m in (GRADIENT, RandomWeights(method=GRADIENT), RandomMap())
    }
    assert rows["random_weights"].mask_top.mean > 0.84
    assert rows["gradient"].mask_leaks
    assert not rows["random"].mask_leaks
    assert abs(rows["random"].difference.mean) < 0.05

"""Validation: a method that looks where the network does holds, and blind ones never do."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import patchclamp
from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.findings import Verdict
from patchclamp.core.progress import SILENT, Progress
from patchclamp.data import load_data
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution import Attribution, Explainer, method
from patchclamp.methods.attribution.faithfulness.curves import PixelFlipping
from patchclamp.net import Net
from patchclamp.truth.attribution import (
    Edges,
    GivenMaps,
    Glyphs,
    PlantedMaps,
    RandomMap,
    Recipe,
)
from patchclamp.truth.attribution.validation import Question, Validate, Validation
from tests.networks import opened

RECIPE = Recipe(epochs=4, rate=1e-2, decay=0.01)
ASK = Validate(num_planted=100, flipping=PixelFlipping(num_steps=4))


@cache
def glyphs(*, shuffled: bool = False) -> PlantedMaps:
    return Glyphs(num=100, num_train=2000, recipe=RECIPE, shuffled=shuffled).run()


@cache
def digits() -> tuple[Net, Tensor, Tensor]:
    net, data = patchclamp.open("digits-cnn"), load_data("digits").subset(8)
    assert data.labels is not None
    return net, torch.as_tensor(data.inputs[:8]), data.labels[:8]


def asked(how: Explainer, **benches: PlantedMaps) -> Validation:
    return ASK.run(how, *digits(), planted=benches or {"glyphs": glyphs()})


def test_grad_cam_shows_what_is_planted_and_what_was_learnt() -> None:
    found = asked(method("grad_cam")())
    assert found.answer(Question.PLANTED) is Verdict.HOLDS
    assert found.answer(Question.LEARNT) is Verdict.HOLDS
    (planted,) = found.of(Question.PLANTED)
    assert planted.method.interval.low > max(r.score.interval.high for r in planted.rivals)
    assert found.maps.num == 8


@pytest.mark.parametrize("blind", [RandomMap(seed=7), Edges()])
def test_maps_that_know_nothing_never_hold(blind: Explainer) -> None:
    found = asked(blind)
    assert found.verdict is not Verdict.HOLDS
    for question in (Question.PLANTED, Question.LEARNT):
        assert found.answer(question) is not Verdict.HOLDS


def test_maps_of_the_truth_are_best_but_not_of_the_network() -> None:
    bench = glyphs()
    assert bench.distractor is not None
    truth = ASK.on_planted(GivenMaps(maps=bench.signal.float()), "glyphs", bench)
    assert truth.method.mean == 1
    assert truth.verdict is Verdict.UNKNOWN  # shuffled weights give the same map
    assert truth.nearest.name == "random_weights"
    wrong = ASK.on_planted(GivenMaps(maps=bench.distractor.float()), "glyphs", bench)
    assert wrong.method.mean == 0
    assert wrong.verdict is Verdict.DOES_NOT_HOLD


def test_a_network_that_does_not_use_the_glyph_tells_nothing() -> None:
    trial = ASK.on_planted(method("gradient")(), "glyphs", glyphs(shuffled=True))
    assert trial.verdict is Verdict.UNKNOWN
    assert "accuracy" in trial.reason


class Lucky(Explainer):
    """The image itself: it is right wherever brightness is."""

    name: ClassVar[str] = "lucky"
    source: ClassVar[str] = "none 2026"

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        from patchclamp.truth.attribution import AbsoluteValue

        return AbsoluteValue().run(net, inputs, target, at=at)


def test_no_verdict_where_a_control_does_as_well() -> None:
    found = asked(Lucky())
    flips = found.of(Question.FAITHFUL)
    assert flips
    assert all(t.verdict is not Verdict.HOLDS for t in flips)
    black = next(t for t in flips if "black" in t.bench)
    assert black.beats_chance
    assert black.verdict is Verdict.UNKNOWN
    assert not next(r for r in black.rivals if r.name == "absolute_value").is_beaten
    assert "reaches it" in black.reason


def test_a_bench_that_the_method_cannot_look_at_is_named() -> None:
    net, x = opened("vit")
    found = ASK.run(
        method("attention_rollout")(), net, x.repeat(3, 1, 1, 1), 2, planted={"glyphs": glyphs()}
    )
    assert "attention" in found.refused["glyphs"]
    assert found.verdict is not Verdict.HOLDS


def test_few_examples_are_too_few() -> None:
    net, x, y = digits()
    found = ASK.run(method("gradient")(), net, x[:3], y[:3], planted={})
    assert {t.verdict for t in found.trials} == {Verdict.UNKNOWN}
    with pytest.raises(DataError):
        ASK.run(method("gradient")(), net, x[:1], y[:1], planted={})
    with pytest.raises(OptionError):
        Validate(num_planted=1)


def test_without_flipping_the_question_is_not_asked() -> None:
    net, x, y = digits()
    asked_two = Validate(num_planted=100, flipping=None)
    found = asked_two.run(method("grad_cam")(), net, x, y, planted={"glyphs": glyphs()})
    assert not found.of(Question.FAITHFUL)
    assert found.verdict is Verdict.HOLDS  # for what was asked


def test_shuffled_weights_leave_the_embedding_that_is_looked_at() -> None:
    net, x = opened("tiny_lm")
    found = Validate(flipping=None).run(method("gradient")(), net, x.repeat(3, 1), 5, planted={})
    (learnt,) = found.of(Question.LEARNT)
    size = next(r for r in learnt.rivals if r.name == "absolute_value")
    assert size.score.mean == pytest.approx(0, abs=1e-6)  # a map of the value alone stays

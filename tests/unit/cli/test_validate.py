"""`patchclamp validate`: its table, its JSON, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from functools import cache

import pytest

from patchclamp.cli import run
from patchclamp.cli import validate as command
from patchclamp.truth.attribution import Glyphs, Recipe
from patchclamp.truth.attribution.base import PlantedMaps


@cache
def planted() -> dict[str, PlantedMaps]:
    recipe = Recipe(epochs=4, rate=1e-2, decay=0.01)
    return {"glyphs": Glyphs(num=100, num_train=2000, recipe=recipe).run()}


def call(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_planted", lambda net, names, seed: planted())
        return run(["validate", *words])


def test_a_table_with_controls_and_one_line_for_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = call("gradient", "--model", "digits-cnn", "--num", "6")
    printed = capsys.readouterr().out
    assert "nearest control" in printed
    assert "random weights" in printed
    assert "pixel flipping" in printed
    verdict = printed.strip().splitlines()[-1]
    assert verdict.startswith("gradient on digits-cnn: ")
    assert (code == 0) is verdict.endswith(": holds")


def test_json_has_every_control_of_every_trial(capsys: pytest.CaptureFixture[str]) -> None:
    call("gradient", "--model", "digits-cnn", "--num", "6", "--json")
    (found,) = json.loads(capsys.readouterr().out)["validations"]
    glyphs = next(t for t in found["trials"] if t["bench"] == "glyphs")
    assert {"random", "sobel", "random_weights", "another_image"} <= set(glyphs["controls"])
    assert glyphs["verdict"] == "holds"
    assert glyphs["controls"]["sobel"]["score"] == pytest.approx(0.5, abs=0.05)


def test_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("gradcam", "--model", "digits-cnn") == 2
    assert "grad_cam" in capsys.readouterr().err
    assert call("gradient", "--model", "digits-cnn", "--num", "1") == 2
    assert run(["validate", "gradient", "--model", "digits-cnn", "--bench", "glyph"]) == 2
    assert "glyphs" in capsys.readouterr().err

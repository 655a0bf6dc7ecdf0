"""The section of maps: what is said beside each, what is left out, and that blind maps fail."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.audit.context import Context
from patchclamp.audit.sections import attribution as page
from patchclamp.core.document import Examples, Section, Table
from patchclamp.core.findings import Evidence, Verdict
from patchclamp.data import Dataset, Kind, load_data
from tests.audits import context
from tests.networks import opened

PLANTED = page._planted
"""Before it is made small for all audits of tests."""


@cache
def found() -> tuple[Section, Context]:
    ctx = context(patchclamp.open("digits-cnn"), load_data("digits").subset(6), 3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_IMAGES", ("gradient", "grad_cam", "attention_rollout"))
        patch.setattr(page, "_ROWS", 6)
        patch.setattr(page, "_PLANS", ((6, 4),))
        patch.setattr(page, "_planted", PLANTED)
        section = page.attribution(ctx)
    assert section is not None
    return section, ctx


def test_every_method_has_its_validation_beside_it() -> None:
    section, _ = found()
    table = next(b for b in section.blocks if isinstance(b, Table))
    maps = next(b for b in section.blocks if isinstance(b, Examples))
    assert (
        {row[0] for row in table.rows} == {u.unit for u in maps.units} == {"gradient", "grad_cam"}
    )
    for unit in maps.units:
        assert "planted: " in unit.summary
        assert len(unit.pictures) == 6
    asked = [row[1] for row in table.rows if row[0] == "gradient"]
    assert asked[:2] == ["glyphs", "random weights"]
    assert sum(str(name).startswith("pixel flipping") for name in asked) >= 2


def test_what_planted_truth_shows_is_validated_and_says_against_what() -> None:
    section, _ = found()
    planted = [f for f in section.findings if f.id.endswith("/planted")]
    assert {f.subject for f in planted} == {"gradient", "grad_cam"}
    for f in planted:
        assert f.evidence is Evidence.VALIDATED
        assert f.null is not None
        assert "glyphs" in f.validation
    gradient = next(f for f in planted if f.subject == "gradient")
    assert gradient.verdict is Verdict.HOLDS
    assert gradient.effect is not None
    assert 0.5 < gradient.effect < 1


def test_a_method_with_nothing_to_look_at_is_left_out_by_name() -> None:
    _, ctx = found()
    assert any("attention_rollout" in left.what for left in ctx.budget.left_out)


def test_no_time_leaves_maps_out_and_says_so() -> None:
    net = patchclamp.open("digits-cnn")
    ctx = context(net, load_data("digits").subset(6), 5.0)
    ctx.budget.started -= 4.999
    assert page.attribution(ctx) is None
    assert {f"maps by {name}" for name in page._IMAGES} <= {x.what for x in ctx.budget.left_out}


def test_tokens_are_shown_as_passages() -> None:
    net, _ = opened("tiny_lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_OTHERS", ("gradient_times_value",))
        patch.setattr(page, "_ROWS", 3)
        patch.setattr(page, "_PLANS", ((3, 2),))
        section = page.attribution(context(net, load_data("prose").subset(4), 3600))
    assert section is not None
    maps = next(b for b in section.blocks if isinstance(b, Examples))
    assert len(maps.units[0].passages) == 3
    assert len(maps.units[0].passages[0].tokens) == 8
    assert not any(f.evidence is Evidence.VALIDATED for f in section.findings)
    assert "glyph" not in section.summary  # it was not asked


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x)
        return y


def test_a_network_without_classes_has_no_section() -> None:
    data = Dataset(
        name="made",
        inputs=torch.rand(8, 4),
        labels=None,
        class_names=(),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=Kind.ARRAYS,
    )
    ctx = context(patchclamp.open(Regression().eval(), torch.rand(2, 4)), data, 60)
    assert page.attribution(ctx) is None
    assert ctx.budget.left_out[0].what == "attribution"


def test_overlay_is_grey_without_heat_and_red_or_blue_with() -> None:
    image, heat = torch.rand(1, 4, 4), torch.zeros(4, 4)
    heat[0, 0], heat[3, 3] = 2.0, -2.0
    made = page.overlay(image, heat)
    assert made.shape == (3, 4, 4)
    assert torch.equal(made[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(made[:, 3, 3], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(made[0, 1, 1], made[2, 1, 1])

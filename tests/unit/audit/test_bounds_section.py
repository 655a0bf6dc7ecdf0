"""The section of what is proved: what it claims, what it leaves open, and when it stays out."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.audit.budget import Budget
from patchclamp.audit.context import Context
from patchclamp.audit.intake import intake
from patchclamp.audit.provable import plan, reserved
from patchclamp.audit.sections.bounds import bounds
from patchclamp.core.document import Curve, Document, Facts, Histogram, Section, Table
from patchclamp.core.errors import EngineError
from patchclamp.core.findings import Evidence, Finding, Interval, Null, Verdict
from patchclamp.core.progress import SILENT
from patchclamp.data import Dataset, Kind, load_data
from patchclamp.methods.bounds import radius
from patchclamp.methods.material import score_for
from patchclamp.methods.neurons.ablation import AblationResult, Group, Importance
from patchclamp.net import Net
from patchclamp.report.json_form import SCHEMA_PATH, plain_document
from tests.networks import opened

SITE = "layers.0.act"


class Unruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cumprod(self.lin(x), 1)
        return y


def context(net: Net, data: Dataset | None, seconds: float = 10.0) -> Context:
    material = intake(net, data, length=8)
    return Context(
        net=net,
        material=material,
        score=score_for(net, material),
        budget=Budget(seconds),
        progress=SILENT,
        seed=0,
        command="made by a test",
        model_hash=net.hash,
        ablated=ablated() if "digits" in net.name else None,
    )


def ablated() -> AblationResult:
    def importance(units: tuple[int, ...], effect: float) -> Importance:
        members = {SITE: units}
        return Importance(
            group=Group(name=str(units), kind="unit group", members=members, pool=members),
            effect=effect,
            interval=Interval(low=effect, high=effect, method="none"),
            null=Null(kind="none", mean=0.0),
            edits=({"kind": "mean", "site": SITE},),
        )

    return AblationResult(done=[importance((0, 1, 2), 0.4), importance((7,), -0.01)])


def digits(num: int = 5) -> Dataset:
    return load_data("digits").subset(num)


@cache
def found() -> tuple[Section, Context]:
    ctx = context(patchclamp.open("digits-mlp"), digits())
    section = bounds(ctx)
    assert section is not None
    return section, ctx


def finding(section: Section, name: str) -> Finding:
    return next(f for f in section.findings if f.id == f"bounds/{name}")


def block(section: Section, title: str) -> object:
    return next(b for b in section.blocks if b.title == title)


def test_proved_radii_are_certified_and_say_of_what() -> None:
    section, ctx = found()
    proved = finding(section, "certified")
    assert (proved.evidence, proved.verdict) == (Evidence.CERTIFIED, Verdict.HOLDS)
    for words in ("the reals", "[0, 1]", "float64", "digits-mlp", ctx.model_hash):
        assert words in proved.certificate
    assert proved.over.startswith("5 rows of digits")
    level = finding(section, "grey-level")
    assert level.interval is not None
    assert level.interval.low == level.effect
    assert level.effect <= level.interval.high
    assert finding(section, "attacked").evidence is Evidence.OBSERVED
    assert ctx.budget.left_out == []


def test_the_table_has_both_radii_of_every_row() -> None:
    section, _ = found()
    table = block(section, "All rows")
    assert isinstance(table, Table)
    assert len(table.rows) == 5
    for _, label, given, certified, attacked, by, known in table.rows:
        if label != given:
            assert (certified, attacked, by) == (None, 0.0, None)
            assert known == "wrong as it is"
            continue
        assert isinstance(certified, float)
        assert isinstance(attacked, float)
        assert 0 < certified < attacked
        assert known == "unknown between"


def test_the_curve_encloses_the_truth_and_falls() -> None:
    section, _ = found()
    curve = block(section, "Accuracy when every input within a radius counts")
    assert isinstance(curve, Curve)
    assert curve.y == curve.low
    assert all(a <= b for a, b in zip(curve.low, curve.high, strict=True))
    for line in (curve.low, curve.high):
        assert list(line) == sorted(line, reverse=True)
    assert curve.low[0] == curve.high[0], "at radius 0 nothing is unknown"
    for name in ("Certified", "Attacked"):
        histogram = block(section, f"{name} radii")
        assert isinstance(histogram, Histogram)
        assert sum(histogram.counts) == sum(
            r[3] is not None for r in block(section, "All rows").rows
        )  # type: ignore[attr-defined]  # a table


def test_the_least_important_units_are_clamped_and_certified() -> None:
    section, _ = found()
    edit = finding(section, "edit")
    assert edit.subject == "(7,)"
    assert (edit.evidence, edit.verdict) == (Evidence.CERTIFIED, Verdict.HOLDS)
    assert edit.effect == 1.0
    assert edit.record.edits
    table = block(section, "The edit on every row's box")
    assert isinstance(table, Table)
    for _, size, plain, edited, low, high, verdict in table.rows:
        assert min(float(size or 0), float(plain or 0), float(edited or 0)) > 0
        assert float(low or 0) <= float(high or 0)
        assert verdict == "holds"


def test_the_section_can_be_written_down() -> None:
    section, _ = found()
    document = Document(
        title="t",
        subtitle="s",
        created="2020-01-01T00:00:00+00:00",
        command="c",
        header=Facts(title="h", items=()),
        sections=(section,),
    )
    data = json.loads(json.dumps(plain_document(document), allow_nan=False))
    schema = json.loads(SCHEMA_PATH.read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(data)


def test_where_every_row_is_wrong_nothing_is_claimed_to_be_proved() -> None:
    """Negative control: labels that the network never gives."""
    net = patchclamp.open("digits-mlp")
    data = digits()
    assert data.labels is not None
    given = net.run(data.inputs).output.argmax(1)
    wrong = dataclasses.replace(data, labels=(given + 1) % 10)
    ctx = context(net, wrong)
    section = bounds(ctx)
    assert section is not None
    for name in ("certified", "grey-level", "attacked"):
        assert finding(section, name).verdict is Verdict.UNKNOWN, name
        assert finding(section, name).effect in (None, 0.0)
        assert finding(section, name).evidence is Evidence.OBSERVED
    assert not any(f.id == "bounds/edit" for f in section.findings)
    assert ctx.budget.left_out[0].what == "a certified edit"


def test_language_models_and_operators_without_a_rule_are_left_out_with_the_reason() -> None:
    net, _ = opened("tiny_lm")
    ctx = context(net, dataclasses.replace(digits(), kind=Kind.TOKENS, inputs=_tokens()))
    assert bounds(ctx) is None
    assert reserved(ctx) == 0.0
    (left,) = ctx.budget.left_out
    assert "tokens" in left.why
    x = torch.rand(6, 4)
    arrays = dataclasses.replace(digits(), kind=Kind.ARRAYS, inputs=x, labels=torch.arange(6) % 3)
    ctx = context(patchclamp.open(Unruled().eval(), x), arrays)
    assert bounds(ctx) is None
    (left,) = ctx.budget.left_out
    assert "cumprod" in left.why


def _tokens() -> Tensor:
    return torch.randint(0, 256, (5, 8))


def test_arrays_have_no_range_and_no_grey_level() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    net = patchclamp.open(module, x)
    labels = net.run(x).output.argmax(1)
    labels[0] = 2
    arrays = dataclasses.replace(digits(), kind=Kind.ARRAYS, inputs=x, labels=labels)
    ctx = context(net, arrays)
    planned = plan(ctx)
    assert planned is not None
    assert planned.within is None
    section = bounds(ctx)
    assert section is not None
    assert {f.id for f in section.findings} == {"bounds/certified", "bounds/attacked"}
    assert finding(section, "certified").verdict is Verdict.HOLDS


def test_more_time_means_tighter_methods_or_more_rows() -> None:
    net = patchclamp.open("digits-cnn")
    few, many = (plan(context(net, digits(30), seconds=s)) for s in (6.0, 120.0))
    assert few is not None
    assert many is not None
    assert "crown" not in few.methods
    assert "crown" in many.methods
    assert many.material.num >= 4


def test_a_contradiction_stops_the_audit_of_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong bound must not be printed beside the attack that refutes it."""

    def refuted(*_: object, **__: object) -> None:
        raise EngineError("a bound is wrong")

    monkeypatch.setattr(radius._Work, "_check", refuted)
    ctx = context(patchclamp.open("digits-mlp"), digits(2))
    with pytest.raises(EngineError, match="a bound is wrong"):
        bounds(ctx)

"""The audit as a whole: its document, its seed, what it leaves as found, and its budget."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from functools import cache

import jsonschema
import numpy as np
import pytest
import torch

import patchclamp
from patchclamp.audit import audit, problems, provable
from patchclamp.audit.budget import Budget
from patchclamp.audit.intake import intake
from patchclamp.bounding.ways import Method
from patchclamp.core.document import Document
from patchclamp.core.edit_kinds import edit_from_dict
from patchclamp.core.errors import EngineError, InputError, OptionError
from patchclamp.core.findings import Evidence, Finding, Interval, Verdict
from patchclamp.data import Dataset, Kind, load_data
from patchclamp.methods.material import score_for, scores
from patchclamp.methods.neurons.ablation import ablations, unit_means
from patchclamp.report.json_form import SCHEMA_PATH, plain_document
from tests.networks import Counting, DataDependent, fresh
from tests.snapshots import snapshot

SECTIONS = ["performance", "anatomy", "units", "ablation", "engines", "instruments"]
"""Those of every audit; others stand among them where time and data allow."""

TIMED = ("circuit", "attribution", "robustness", "bounds")


@pytest.fixture(autouse=True)
def _few_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap bounds of two rows: test_bounds_section.py has what is said of them."""
    monkeypatch.setattr(provable, "_MAX_ROWS", 2)
    monkeypatch.setattr(provable, "_EVALUATIONS", {Method.INTERVAL: 16, Method.FORWARD_CROWN: 4})


def sections(found: Document) -> list[str]:
    """Without those for which time or data may be lacking."""
    return [s.id for s in found.sections if s.id not in TIMED]


@cache
def digits() -> Dataset:
    return load_data("digits").subset(160)


@cache
def document() -> Document:
    """An audit with time enough for everything."""
    return audit("digits-cnn", digits(), budget_seconds=90, seed=1, command="made by a test")


def arrays(num: int = 40, *, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        name="arrays",
        inputs=torch.randn(num, 4, generator=generator),
        labels=torch.arange(num) % classes,
        class_names=tuple(map(str, range(classes))),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=Kind.ARRAYS,
    )


def made(kind: Kind, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> Dataset:
    names = () if labels is None else tuple(map(str, range(int(labels.max()) + 1)))
    return Dataset(
        name="made",
        inputs=inputs,
        labels=labels,
        class_names=names,
        split="test",
        licence="none needed (generated)",
        description="",
        kind=kind,
    )


# ---- the document -------------------------------------------------------------


def test_the_document_is_valid_under_the_schema() -> None:
    schema = json.loads(SCHEMA_PATH.read_text("utf-8"))
    data = json.loads(json.dumps(plain_document(document()), allow_nan=False))
    jsonschema.Draft202012Validator(schema).validate(data)


def test_every_section_and_its_findings_are_there() -> None:
    found = document()
    assert sections(found) == SECTIONS
    assert found.sections[2].id == "circuit"
    assert [s.id for s in found.sections[5:8]] == ["attribution", "robustness", "bounds"]
    ids = [f.id for f in found.findings]
    assert len(ids) == len(set(ids))
    for start in (
        "performance/",
        "calibration/",
        "circuit/",
        "units/dead",
        "ablation/",
        "engine/",
        "bounds/",
    ):
        assert any(i.startswith(start) for i in ids), start
    assert found.left_out == ()


def test_every_finding_says_how_it_was_made() -> None:
    for finding in document().findings:
        record = finding.record
        assert record.method, finding.id
        assert record.command == "made by a test"
        assert len(record.model_hash) == len(record.data_hash) == 64
        assert record.seed is not None
        assert record.versions["torch"] == torch.__version__
        validated = finding.id.startswith("instrument/")
        assert (finding.evidence is Evidence.VALIDATED) is validated
        assert (finding.evidence is Evidence.CERTIFIED) is bool(finding.certificate)
        assert not finding.certificate or finding.id.startswith("bounds/")
        starts = ("160 rows", "4 rows")
        if validated:
            starts = ("one planted network", "3 planted networks")
        elif finding.id.startswith("circuit/"):
            starts = ("8 held-out pairs of telling",)
        elif finding.id.startswith("bounds/"):
            starts = ("2 rows of digits", "the boxes of 2 of 2 rows of digits")
        elif finding.id.startswith("attribution/"):
            starts = ("6 rows of digits",)
        assert finding.over.startswith(starts)


def test_the_same_seed_gives_the_same_findings() -> None:
    first, second = document(), audit("digits-cnn", digits(), budget_seconds=90, seed=1)
    assert [f.id for f in first.findings] == [f.id for f in second.findings]
    for a, b in zip(first.findings, second.findings, strict=True):
        assert a.verdict is b.verdict
        if a.effect is not None:
            assert a.effect == pytest.approx(b.effect, abs=1e-6)
        if a.null is not None:
            assert b.null is not None
            assert a.null.mean == pytest.approx(b.null.mean, abs=1e-6)
            assert a.null.p == b.null.p
        if a.interval is not None:
            assert b.interval is not None
            assert a.interval.low == pytest.approx(b.interval.low, abs=1e-6)


def test_intervened_findings_can_be_made_again_from_their_edits() -> None:
    net = patchclamp.open("digits-cnn")
    material = intake(net, digits(), length=32)
    score = score_for(net, material)
    plain = scores(net, material, score)
    found = [f for f in document().findings if f.id.startswith("ablation/")]
    assert len(found) >= 4
    for finding in found:
        assert finding.null is not None
        assert finding.null.num == finding.record.options["num_nulls"]
        edits = []
        for data in finding.record.edits:
            site, where = str(data["site"]), data["where"]
            units = next(iter(where.values()))
            means = unit_means(net, material, [site], 64)
            members = {site: tuple(units)}
            (whole,) = ablations(net, members, means)
            edits.append(edit_from_dict({**data, "values": whole.values}))
        effect = float((scores(net, material, score, edits=edits) - plain).mean())
        assert effect == pytest.approx(finding.effect, abs=1e-6), finding.id


def test_problems_counts_expectations_that_do_not_hold_and_nothing_else() -> None:
    found = document()
    assert problems(found) == sum(
        f.verdict is Verdict.DOES_NOT_HOLD
        and not f.id.startswith(("ablation/", "circuit/", "units/sel", "bounds/"))
        for f in found.findings
        if f.id != "units/redundant"
    )

    def with_verdict(f: Finding, verdict: Verdict) -> Finding:
        return dataclasses.replace(f, verdict=verdict, effect=0.0, interval=_none())

    every = [with_verdict(f, Verdict.DOES_NOT_HOLD) for f in found.findings]
    section = dataclasses.replace(found.sections[0], findings=tuple(every))
    worst = dataclasses.replace(found, sections=(section,))
    starts = ("ablation/", "circuit/", "units/", "attribution/", "robustness/", "bounds/")
    descriptive = [f for f in every if f.id.startswith(starts)]
    assert problems(worst) == len(every) - len(descriptive) + 1, "units/dead is an expectation"
    fine = [with_verdict(f, Verdict.HOLDS) for f in found.findings]
    section = dataclasses.replace(found.sections[0], findings=tuple(fine))
    assert problems(dataclasses.replace(found, sections=(section,))) == 0


def _none() -> Interval | None:
    return None


# ---- left as found --------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_mlp", "resnet"])
def test_an_audit_leaves_everything_as_found(name: str) -> None:
    module, example = fresh(name)
    data = digits().subset(40)
    inputs = data.inputs.clone()
    before, threads = snapshot(module), torch.get_num_threads()
    states = random.getstate(), np.random.get_state()[1].copy()
    torch.set_num_threads(2)
    try:
        audit(module, data, example_inputs=example, budget_seconds=6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert snapshot(module) == before
    assert torch.equal(data.inputs, inputs)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()


def test_an_audit_that_fails_leaves_everything_as_found() -> None:
    module, example = fresh("digits_mlp")
    data = made(Kind.IMAGES, torch.rand(20, 1, 8, 8), torch.arange(20) % 12)
    before, threads = snapshot(module), torch.get_num_threads()
    with pytest.raises(patchclamp.PatchclampError, match="lacks"):
        audit(module, data, example_inputs=example)
    assert snapshot(module) == before
    assert torch.get_num_threads() == threads


def test_a_network_in_training_mode_is_refused_before_it_runs() -> None:
    module, example = fresh("resnet")
    norm = next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))
    for part in (module, norm):
        module.eval()
        part.training = True
        before = snapshot(module)
        with pytest.raises(InputError, match="training mode") as caught:
            audit(module, digits(), example_inputs=example)
        assert "eval()" in (caught.value.hint or "")
        assert snapshot(module) == before, "a batch norm in training mode would have counted it"


def test_a_network_that_is_open_already_can_be_audited() -> None:
    net = patchclamp.open("digits-mlp")
    found = audit(net, digits().subset(30), budget_seconds=6)
    assert found.title == f"Audit of {net.name}"
    net.module.train()
    with pytest.raises(InputError, match="training mode"):
        audit(net, digits().subset(30))


# ---- the budget -------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 4.9, -1.0, math.nan])
def test_a_budget_too_short_is_refused(seconds: float) -> None:
    with pytest.raises(OptionError, match="too short") as caught:
        audit("digits-mlp", digits(), budget_seconds=seconds)
    assert caught.value.hint


def test_a_short_budget_ends_in_time_and_says_what_it_left_out() -> None:
    started = time.monotonic()
    found = audit("tiny-lm", budget_seconds=6)
    assert time.monotonic() - started <= 1.5 * 6 + 1
    assert sections(found) == SECTIONS
    said = " ".join(part.what for part in found.left_out)
    assert "rows of prose" in said or "groups" in said
    assert all(part.why and part.how_to_get_it for part in found.left_out)


@pytest.mark.slow
def test_a_budget_of_ten_seconds_ends_within_fifteen() -> None:
    started = time.monotonic()
    found = audit("tiny-lm", budget_seconds=10)
    assert time.monotonic() - started <= 15
    assert any("of 278 rows" in part.what for part in found.left_out)


def test_a_budget_counts_down_and_never_below_zero() -> None:
    budget = Budget(5.0, started=time.monotonic() - 3.0)
    assert 1.5 < budget.left <= 2.0
    assert budget.share(0.5) == pytest.approx(budget.left / 2, abs=0.01)
    assert Budget(5.0, started=time.monotonic() - 9.0).left == 0.0


# ---- networks that engines cannot agree on -------------------------------------------


def test_a_network_that_cannot_be_captured_is_audited_on_hooks() -> None:
    found = audit(Counting().eval(), arrays(), example_inputs=torch.randn(3, 4), budget_seconds=6)
    verdicts = {f.id: f for f in found.findings}
    for name in ("output", "sites", "gradients"):
        check = verdicts[f"engine/{name}"]
        assert check.verdict is Verdict.UNKNOWN
        assert check.effect is None
        assert check.caveats[0].startswith("not measured: ")
    assert any(f.id.startswith("ablation/") for f in found.findings)
    plain_document(found)


def test_a_network_with_state_is_a_problem() -> None:
    """Its outputs change from call to call: an edit of nothing seems to change something."""
    found = audit(Counting().eval(), arrays(), example_inputs=torch.randn(3, 4), budget_seconds=6)
    verdicts = {f.id: f.verdict for f in found.findings}
    assert verdicts["engine/identity"] is Verdict.DOES_NOT_HOLD
    assert problems(found) >= 1


def test_a_module_that_some_rows_never_reach_is_named() -> None:
    """Its units have no value on those rows, so that nothing can be said of them."""
    module = DataDependent().eval()
    data = arrays()
    with torch.no_grad():
        module.lin.bias.fill_(-9.0)  # `up` is skipped on the data ...
    example = torch.linalg.lstsq(module.lin.weight, torch.full((3, 1), 20.0)).solution.T
    assert module.lin(example).sum() > 0  # ... and taken on the example
    with pytest.raises(EngineError, match="'up' was not reached") as caught:
        audit(module, data, example_inputs=example.repeat(3, 1), budget_seconds=6)
    assert caught.value.hint

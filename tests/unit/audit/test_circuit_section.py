"""The circuit section: what it shows, what it claims, and when it refuses to."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import jsonschema
import pytest
import torch

import patchclamp
from patchclamp.audit import planted_edges
from patchclamp.audit.budget import Budget
from patchclamp.audit.circuit_claims import Claims
from patchclamp.audit.circuit_parts import Weighed, weigh
from patchclamp.audit.class_circuit import ClassPairs, class_pairs, explain
from patchclamp.audit.context import Context
from patchclamp.audit.intake import intake
from patchclamp.audit.planted_edges import Kind, recovered
from patchclamp.audit.sections import circuits as flow
from patchclamp.audit.sections.circuit import circuit_section
from patchclamp.audit.sections.circuits import LAYER_PLANS, PLANS, circuits
from patchclamp.core.circuit import Edge
from patchclamp.core.document import Bars, Diagram, Document, Facts, Section, Table
from patchclamp.core.errors import DataError
from patchclamp.core.findings import Evidence, Finding, Interval, Verdict
from patchclamp.core.progress import SILENT
from patchclamp.data import Dataset, load_data
from patchclamp.data import Kind as DataKind
from patchclamp.methods.circuits.checking.behaviour import performs
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges
from patchclamp.methods.circuits.finding.search import (
    CircuitSearch,
    Found,
    contrasts_of,
    shipped_task,
)
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import wire
from patchclamp.methods.material import plain_output, score_for
from patchclamp.net import Net
from patchclamp.report.json_form import SCHEMA_PATH, plain_document
from tests.networks import fresh

SEARCH = CircuitSearch(fractions=(0.03, 0.075, 0.3), num_random=2, verify=8, max_parts=0)


@cache
def reader() -> tuple[Found, Weighed]:
    """The bundled language model and its induction circuit, found with little work."""
    net = patchclamp.open("tiny-lm")
    task = shipped_task(net, "induction", num=8, num_held_out=12, variant="continuation replaced")
    found = SEARCH.run(net, task)
    weighed = weigh(
        found.wiring, found.circuit, contrasts_of(net, task.held_out), num_edges=3, num_random=3
    )
    assert weighed is not None
    return found, weighed


@cache
def digits() -> tuple[Net, ClassPairs, Found]:
    net = patchclamp.open("digits-mlp")
    material = intake(net, load_data("digits").subset(200), length=32)
    logits = plain_output(net, material, batch_size=64)
    pairs = class_pairs(net, material, logits, num=8, seed=0)
    search = dataclasses.replace(SEARCH, fractions=(0.1, 0.3, 0.6))
    return net, pairs, explain(wire(net), pairs, search, progress=SILENT)


def section(**options: object) -> Section:
    found, weighed = reader()
    return circuit_section(found, found.wiring.net, search=SEARCH, weighed=weighed, **options)


def claims(found: Found, weighed: Weighed | None) -> list[Finding]:
    return Claims(found=found, search=SEARCH, weighed=weighed, validation="").findings()


def context(net: Net, data: Dataset, seconds: float = 60.0) -> Context:
    material = intake(net, data, length=32)
    return Context(
        net=net,
        material=material,
        score=score_for(net, material),
        budget=Budget(seconds),
        progress=SILENT,
        seed=0,
        command="made by a test",
        model_hash=net.hash,
    )


# ---- what it shows ------------------------------------------------------------------


def test_the_section_is_valid_under_the_schema() -> None:
    found, _ = reader()
    made = section(tried=[found.performance], validation="checked")
    document = Document(
        title="t",
        subtitle="",
        created="2026-01-01T00:00:00+00:00",
        command="",
        header=Facts(title="", items=()),
        sections=(made,),
    )
    schema = json.loads(SCHEMA_PATH.read_text("utf-8"))
    data = json.loads(json.dumps(plain_document(document), allow_nan=False))
    jsonschema.Draft202012Validator(schema).validate(data)


def test_every_kind_of_block_is_there_and_says_what_was_measured() -> None:
    found, weighed = reader()
    made = section(tried=[found.performance])
    blocks = {block.title: block for block in made.blocks}
    diagram = blocks["Diagram"]
    assert isinstance(diagram, Diagram)
    assert len(diagram.edges) == found.circuit.num_edges
    sizes = blocks["Faithfulness over size, on held-out pairs"]
    assert isinstance(sizes, Bars)
    assert sizes.values == pytest.approx([p.faithfulness for p in found.held_out.points], abs=1e-6)
    assert sizes.null_high == pytest.approx(
        [p.random_high for p in found.held_out.points], abs=1e-6
    )
    table = blocks["The edges with the largest scores"]
    assert isinstance(table, Table)
    first = dict(zip([c.name for c in table.columns], table.rows[0], strict=True))
    effects = found.effects
    assert first["noising"] == pytest.approx(float(effects.noising[0].mean()), abs=1e-6)
    assert first["denoising"] == pytest.approx(float(effects.denoising[0].mean()), abs=1e-6)
    assert first["loss"] == pytest.approx(weighed.losses[effects.edges[0]].value, abs=1e-6)
    facts = blocks["The circuit in numbers"]
    assert isinstance(facts, Facts)
    said = dict(facts.items)
    assert said["pairs"] == "8 to find it, 12 held out"
    assert "Behaviours" in blocks


def test_warnings_of_the_search_are_on_the_page_and_in_the_findings() -> None:
    found, weighed = reader()
    warned = dataclasses.replace(found, warnings=("the sky fell",))
    made = circuit_section(warned, found.wiring.net, search=SEARCH, weighed=weighed)
    first = next(b for b in made.blocks if b.title == "Read this first")
    assert isinstance(first, Facts)
    assert first.items[0][1] == "the sky fell"
    assert all("the sky fell" in f.caveats for f in made.findings)
    assert all(b.title != "Read this first" for b in section().blocks)


def test_a_large_circuit_is_drawn_by_the_edges_that_connect() -> None:
    net, _, found = digits()
    made = circuit_section(found, net, search=SEARCH)
    diagram = next(b for b in made.blocks if isinstance(b, Diagram))
    assert 0 < len(diagram.edges) <= 60 < found.circuit.num_edges
    targets = {e.target for e in diagram.edges}
    inner = {e.source for e in diagram.edges if not e.source.startswith(":input")}
    assert inner <= targets, "a unit is drawn only if something drawn feeds it"
    assert f"{found.circuit.num_edges - len(diagram.edges):,} more" in diagram.note


# ---- what it claims -----------------------------------------------------------------


def test_the_induction_circuit_is_faithful_complete_and_needs_its_parts() -> None:
    made = section(validation="checked on planted truth").findings
    assert [f.id.split("/")[1] for f in made] == ["faithful", "complete", *["needed"] * 3]
    assert all(f.verdict is Verdict.HOLDS for f in made)
    assert all(f.evidence is Evidence.INTERVENED for f in made)
    assert made[0].validation == "checked on planted truth"
    (cut,) = made[0].record.edits
    found, _ = reader()
    assert cut["num_cut"] == found.circuit.num_possible - found.circuit.num_edges
    assert {Edge.parse(str(e)) for e in cut["kept"]} == set(found.circuit.edges())


def test_losses_agree_with_cutting_the_edge_oneself() -> None:
    found, weighed = reader()
    task = shipped_task(
        found.wiring.net, "induction", num=8, num_held_out=12, variant="continuation replaced"
    )
    edge, weight = next(iter(weighed.losses.items()))
    mask = found.circuit.kept.copy()
    read = [(r.node, r.slot) for r in found.circuit.readers].index((edge.reader, edge.slot))
    mask[read, found.circuit.writers.index(edge.writer)] = False
    possible = found.circuit.possible
    rows = metric_rows(
        found.wiring,
        contrasts_of(found.wiring.net, task.held_out),
        [possible & False, possible, found.circuit.kept, mask],
        References(kind=Ablation.RESAMPLE),
    ).double()
    nothing, whole, kept, without = rows.mean(1).tolist()
    assert weight.value == pytest.approx((kept - without) / (whole - nothing), abs=1e-5)
    assert weight.interval.low < weight.value < weight.interval.high


def test_without_weights_only_faithfulness_is_claimed() -> None:
    found, _ = reader()
    assert [f.id for f in claims(found, None)] == ["circuit/faithful"]


@pytest.mark.parametrize(
    ("low", "high", "random", "verdict"),
    [
        (0.92, 0.99, 0.1, Verdict.HOLDS),
        (0.75, 0.99, 0.1, Verdict.UNKNOWN),
        (0.92, 0.99, 0.95, Verdict.UNKNOWN),
        (0.5, 0.79, 0.1, Verdict.DOES_NOT_HOLD),
    ],
)
def test_faithful_only_above_the_level_and_chance(
    low: float, high: float, random: float, verdict: Verdict
) -> None:
    found, _ = reader()
    interval = Interval(low=low, high=high, method="made by a test")
    points = tuple(
        dataclasses.replace(p, interval=interval, random_high=random) for p in found.held_out.points
    )
    held = dataclasses.replace(found.held_out, points=points)
    assert claims(dataclasses.replace(found, held_out=held), None)[0].verdict is verdict


def test_a_circuit_that_is_the_whole_network_is_no_circuit() -> None:
    found, weighed = reader()
    low = tuple(dataclasses.replace(p, faithfulness=0.1) for p in found.train.points)
    whole = dataclasses.replace(
        found,
        train=dataclasses.replace(found.train, points=low),
        circuit=found.circuit.with_kept(found.circuit.possible),
    )
    held = tuple(
        dataclasses.replace(p, interval=Interval(low=0.1, high=0.2, method="made by a test"))
        for p in found.held_out.points
    )
    whole = dataclasses.replace(whole, held_out=dataclasses.replace(found.held_out, points=held))
    (only,) = claims(whole, weighed)
    assert only.verdict is Verdict.DOES_NOT_HOLD
    made = circuit_section(whole, found.wiring.net, search=SEARCH)
    assert "there is no small circuit" in made.summary
    task = shipped_task(found.wiring.net, "induction", num=8, num_held_out=8)
    assert weigh(whole.wiring, whole.circuit, contrasts_of(found.wiring.net, task.held_out)) is None


def test_an_edge_that_does_nothing_is_not_needed() -> None:
    found, weighed = reader()
    nothing = dataclasses.replace(
        next(iter(weighed.losses.values())),
        value=0.0,
        interval=Interval(low=-1e-9, high=1e-9, method="made by a test"),
    )
    idle = dataclasses.replace(
        weighed, losses=dict.fromkeys(weighed.losses, nothing), random_additions=(1e-8, 0.0)
    )
    assert all(
        f.verdict is Verdict.DOES_NOT_HOLD
        for f in claims(found, idle)
        if f.id.startswith("circuit/needed")
    )


# ---- classes ------------------------------------------------------------------------


def test_classes_are_paired_from_correct_rows_that_are_not_shared() -> None:
    _, pairs, found = digits()
    assert pairs.train.num_rows == pairs.held_out.num_rows == 8
    seen = torch.cat(
        [
            x.flatten(1)
            for p in (pairs.train, pairs.held_out)
            for c in (p.clean, p.corrupt)
            for x in c.tensors()
        ]
    )
    assert seen.unique(dim=0).shape[0] == seen.shape[0]
    assert pairs.performance.clean > 0 > pairs.performance.corrupt
    assert found.circuit.record.task.startswith("telling ")
    assert found.train.points[-1].faithfulness > 0.8


def test_too_few_correct_rows_are_refused() -> None:
    net = patchclamp.open("digits-mlp")
    material = intake(net, load_data("digits").subset(30), length=32)
    with pytest.raises(DataError, match="too few rows"):
        class_pairs(net, material, plain_output(net, material, batch_size=64), num=8, seed=0)


# ---- what the time allows -------------------------------------------------------------


def test_plans_shrink_in_cost() -> None:
    for plans in (PLANS, LAYER_PLANS):
        costs = [plan.seconds(0.01, 0.05) for plan in plans]
        assert costs == sorted(costs, reverse=True)


def test_what_does_not_fit_the_time_is_left_out_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The behaviours are still measured and shown; none is explained."""
    monkeypatch.setattr(flow.Plan, "seconds", lambda *_: 1e6)
    found, _ = reader()
    ctx = context(found.wiring.net, load_data("prose"))
    made = circuits(ctx)
    assert made is not None
    assert [b.title for b in made.blocks] == ["Behaviours"]
    assert not made.findings
    how = [part.how_to_get_it for part in ctx.budget.left_out]
    assert "patchclamp circuit tiny-lm --task 'induction'" in how


def test_a_network_that_performs_nothing_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = reader()
    net = found.wiring.net

    def reversed_pairs(net: Net, pairs: object, seed: int) -> object:
        swapped = [dataclasses.replace(p, correct=p.wrong, wrong=p.correct) for p in pairs]
        return performs(net, swapped, seed=seed)

    monkeypatch.setattr(flow, "performs", reversed_pairs)
    made = circuits(context(net, load_data("prose")))
    assert made is not None
    assert "performs none" in made.summary
    (table,) = made.blocks
    assert isinstance(table, Table)
    assert "does not perform" in table.rows[0]


def made(inputs: torch.Tensor, labels: torch.Tensor | None) -> Dataset:
    kind = DataKind.IMAGES if inputs.is_floating_point() else DataKind.TOKENS
    return Dataset(
        name="made",
        inputs=inputs,
        labels=labels,
        class_names=() if labels is None else tuple(map(str, range(int(labels.max()) + 1))),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=kind,
    )


class LastToken(torch.nn.Module):
    """A recurrent network as a classifier of rows."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(row, class)"""
        logits: torch.Tensor = self.network(tokens)[:, -1]
        return logits


def left_out(ctx: Context) -> str:
    return next(x.why for x in ctx.budget.left_out if x.what == "the circuit section")


def test_a_network_that_neither_reads_nor_classifies_is_left_out() -> None:
    module, example = fresh("spiking")
    ctx = context(patchclamp.open(module, example), made(torch.cat([example] * 8), None))
    assert circuits(ctx) is None
    assert "neither reads text nor classifies" in left_out(ctx)


def test_a_network_that_cannot_be_taken_apart_is_left_out() -> None:
    module, example = fresh("lstm")
    net = patchclamp.open(LastToken(module).eval(), example)
    ctx = context(net, made(torch.cat([example] * 8), torch.arange(8 * len(example)) % 2))
    assert circuits(ctx) is None
    assert "fewer than two layers" in left_out(ctx)


@pytest.mark.parametrize("name", ["spiking", "resnet", "vit"])
def test_classifiers_of_other_kinds_get_a_circuit(name: str) -> None:
    """Random weights, and labels that say what the network says."""
    module, example = fresh(name)
    generator = torch.Generator().manual_seed(0)
    inputs = 3 * torch.rand(200, *example.shape[1:], generator=generator)
    with torch.no_grad():
        if name != "spiking":
            last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
            last.bias -= module(inputs).mean(0)  # else nearly all rows are of one class
        labels = module(inputs).argmax(1)
    found = circuits(context(patchclamp.open(module, example), made(inputs, labels)))
    assert found is not None
    assert found.title.startswith("The circuit of telling")
    assert found.findings[0].id == "circuit/faithful"


# ---- the method's own validation --------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_edge_attribution_passes_on_planted_truth(kind: Kind) -> None:
    trials = recovered(kind)
    assert planted_edges.passed(trials)
    finding = planted_edges.finding(trials)
    assert finding.verdict is Verdict.HOLDS
    assert finding.evidence is Evidence.VALIDATED
    assert "passed on" in planted_edges.validation(trials)


def test_a_method_that_misses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients at the clean point alone are blind to OR."""

    def blind() -> EdgeAttribution:
        return EdgeAttribution(direction="noising", path="none")

    monkeypatch.setattr(planted_edges, "EdgeAttribution", blind)
    with pytest.warns(UserWarning, match="edge attribution"):
        trials = recovered.__wrapped__(Kind.STREAM)
    assert not planted_edges.passed(trials)
    assert planted_edges.finding(trials).verdict is Verdict.DOES_NOT_HOLD
    assert "FAILED" in planted_edges.validation(trials)


def test_controls_that_are_found_fail_the_method() -> None:
    trials = tuple(dataclasses.replace(t, control=0.99) for t in recovered(Kind.LAYERS))
    assert not planted_edges.passed(trials)


def test_exact_effects_of_the_last_layer_are_those_of_cutting_it() -> None:
    """The table's columns: an edge into the answer changes the metric by its own part."""
    _, pairs, found = digits()
    edge = next(e for e in found.circuit.edges() if e.reader.site == "head")
    effects = ExactEdges().run(found.wiring, [pairs.train], [edge])
    row = [(r.node, r.slot) for r in found.circuit.readers].index((edge.reader, edge.slot))
    mask = found.circuit.possible.copy()
    mask[row, found.circuit.writers.index(edge.writer)] = False
    whole, without = metric_rows(
        found.wiring,
        [pairs.train],
        [found.circuit.possible, mask],
        References(kind=Ablation.RESAMPLE),
    )
    torch.testing.assert_close(effects.noising[0], without - whole, atol=1e-4, rtol=1e-4)

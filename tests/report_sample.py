"""A realistic document for the tests of the page: every kind of block, every level of evidence.

The numbers are made by a fixed arithmetic rule, so that the document is the same
on every machine. Run as a script to look at it: `python tests/report_sample.py page.html`.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import sys
from itertools import pairwise

import numpy as np

from patchclamp.core.circuit import Circuit, Node, Provenance, Reader
from patchclamp.core.document import (
    Architecture,
    Bars,
    Box,
    Column,
    Curve,
    Diagram,
    DiagramEdge,
    DiagramNode,
    Document,
    Examples,
    Facts,
    Frame,
    Histogram,
    LeftOut,
    Passage,
    Picture,
    Section,
    Table,
    UnitExamples,
    Wire,
)
from patchclamp.core.findings import Evidence, Finding, Interval, Null, Record, Verdict
from patchclamp.report.circuit_drawing import diagram_of
from patchclamp.report.png import encode_png

VERSIONS = {"patchclamp": "0.1.0", "python": "3.11.2", "torch": "2.13.0"}
COMMAND = "patchclamp audit digits-cnn --data digits --budget 2m --seed 0"


def wobble(*place: float) -> float:
    """A number in 0..1 that looks random and is fixed by its place."""
    x = math.sin(sum((i + 1.7) * 12.9898 * p for i, p in enumerate(place)) + 4.1) * 43758.5453
    return x - math.floor(x)


def record(method: str, **more: object) -> Record:
    return Record(
        method=method,
        options={"num_draws": 200, "level": 0.95},
        model="digits-cnn",
        model_hash="sha256:3f1c9a77d2be",
        data="digits, held-out split",
        data_hash="sha256:90be11c0a4d5",
        metric="accuracy",
        engine="graph",
        seed=0,
        versions=VERSIONS,
        command=COMMAND,
        **more,
    )


def picture(digit: int, n: int) -> str:
    """An 8 x 8 blob in grey, or a coloured one for n = 0, as PNG in base64."""
    channels = 3 if n == 0 else 1
    pixels = bytearray()
    for y in range(8):
        for x in range(8):
            ring = abs(
                math.hypot(x - 3.5 + wobble(digit) * 2 - 1, y - 3.5) - 1.6 - wobble(n, digit)
            )
            shade = int(255 * max(0.0, 1 - ring / 1.5))
            pixels += bytes([shade, shade // 2 + 40, 90])[:channels]
    return base64.b64encode(encode_png(8, 8, bytes(pixels), channels)).decode()


def anatomy() -> Section:
    rows: list[tuple[object, ...]] = [(0, "digits-cnn", "DigitsCnn", 71_434, 1.0, None)]
    for stage in range(4):
        width = 16 * 2 ** min(stage, 2)
        rows.append((1, f"stages.{stage}", "Stage", width * 300, 0.24, f"batch, {width}, row, col"))
        for block in range(2):
            path = f"stages.{stage}.{block}"
            rows.append((2, path, "Residual", width * 150, 0.12, f"batch, {width}, row, col"))
            for leaf, kind in (("conv", "Conv2d"), ("norm", "BatchNorm2d"), ("act", "ReLU")):
                own = {"conv": width * 140, "norm": width * 2, "act": 0}[leaf]
                cost = {"conv": 0.11, "norm": 0.008, "act": 0.0004}[leaf] * (1 + stage / 9)
                rows.append((3, f"{path}.{leaf}", kind, own, cost, f"batch, {width}, row, col"))
    rows += [
        (1, "pool", "AdaptiveAvgPool2d", 0, 0.0004, "batch, 64"),
        (1, "head", "Linear", 650, 0.002, "batch, 10"),
    ]
    columns = (
        Column(name="depth", title="Depth", role="depth"),
        Column(name="site", title="Site", role="address"),
        Column(name="kind", title="Kind"),
        Column(name="params", title="Parameters", role="bar", help="Own and children's weights."),
        Column(name="compute", title="Compute", role="share", help="Share of multiply-adds."),
        Column(name="shape", title="Output"),
    )
    return Section(
        id="anatomy",
        title="Anatomy",
        summary="What the network is made of, and where its weights and its compute are.",
        blocks=(
            Table(title="Modules", columns=columns, rows=tuple(rows)),
            Histogram(
                title="How large the weights are",
                edges=tuple(i / 10 - 1.2 for i in range(25)),
                counts=tuple(int(9000 * math.exp(-(((i - 12) / 3.4) ** 2))) for i in range(24)),
                unit="weight",
                note="All 71,434 trainable weights, biases left aside.",
            ),
        ),
        findings=(
            Finding(
                id="anatomy/engines-agree",
                claim="The captured graph computes what the live module computes.",
                subject="digits-cnn",
                effect=2.4e-7,
                unit="largest absolute difference of logits",
                evidence=Evidence.OBSERVED,
                verdict=Verdict.HOLDS,
                over="360 held-out digits, two batch sizes",
                record=record("engine cross-check"),
            ),
        ),
        cpu_seconds=1.84,
    )


def performance() -> Section:
    x = tuple((i + 0.5) / 10 for i in range(10))
    y = tuple(min(0.99, max(0.01, p + 0.09 * math.sin(5 * p) - 0.03)) for p in x)
    spread = tuple(0.03 + 0.07 * (1 - abs(2 * p - 1)) for p in x)
    return Section(
        id="performance",
        title="How well it works",
        summary="Accuracy on the held-out split, and whether its stated confidence can be taken "
        "at its word.",
        blocks=(
            Facts(
                title="On the held-out split",
                items=(("Accuracy", "97.2%"), ("Loss", "0.094 nats"), ("Examples", "360")),
            ),
            Curve(
                title="Calibration",
                x=x,
                y=y,
                x_title="stated confidence",
                y_title="share correct",
                low=tuple(max(0.0, v - s) for v, s in zip(y, spread, strict=True)),
                high=tuple(min(1.0, v + s) for v, s in zip(y, spread, strict=True)),
                weight=(4, 5, 7, 9, 11, 14, 19, 31, 62, 198),
                diagonal=True,
                note="Below the line the network is more confident than it is right.",
            ),
        ),
        findings=(
            Finding(
                id="performance/accuracy",
                claim="The network is right on more than 95% of digits that it has not seen.",
                subject="digits-cnn",
                effect=0.9722,
                unit="accuracy",
                evidence=Evidence.OBSERVED,
                verdict=Verdict.HOLDS,
                over="360 held-out digits",
                record=record("accuracy"),
                interval=Interval(low=0.9496, high=0.9848, method="Wilson"),
                null=Null(kind="the most frequent class", mean=0.1028),
            ),
            Finding(
                id="performance/calibration",
                claim="Its confidence equals its accuracy to within 2 points.",
                subject="digits-cnn",
                effect=0.0413,
                unit="expected calibration error",
                evidence=Evidence.OBSERVED,
                verdict=Verdict.DOES_NOT_HOLD,
                over="360 held-out digits in 10 bins of confidence",
                record=record("calibration"),
                interval=Interval(low=0.029, high=0.058, method="bootstrap"),
                null=Null(
                    kind="labels drawn from the stated confidence",
                    mean=0.018,
                    low=0.009,
                    high=0.031,
                    num=1000,
                    p=0.002,
                ),
                caveats=("The bins below 0.5 hold fewer than 12 digits each.",),
            ),
        ),
        cpu_seconds=0.92,
    )


def activity() -> Section:
    columns = (
        Column(name="unit", title="Unit", role="address"),
        Column(name="mean", title="Mean", role="bar", unit="activation"),
        Column(name="variance", title="Variance", role="number"),
        Column(name="active", title="Active", role="share", help="Share of inputs above zero."),
        Column(name="dead", title="Dead", role="flag", help="Never above zero on this data."),
        Column(name="selective", title="Most selective for"),
        Column(name="auc", title="Selectivity", role="number", unit="AUC"),
        Column(name="null", title="Null", role="number", unit="AUC, 97.5%"),
    )
    rows: list[tuple[object, ...]] = []
    for i in range(300):
        site, unit = f"stages.{i // 75}.1.act[{i % 75}]", wobble(i)
        if unit < 0.05:
            rows.append((site, 0.0, 0.0, 0.0, True, None, None, None))
            continue
        mean = 1.6 * unit**2 - 0.15
        row = (site, mean, unit**3, unit, False, f"digit {int(unit * 10)}", 0.5 + unit / 2.1, 0.58)
        rows.append(row)
    pictures = tuple(
        UnitExamples(
            unit=f"stages.3.1.act[{u}]",
            summary=f"Fires most on digit {u}: 8 of its top 8 inputs.",
            pictures=tuple(
                Picture(png_base64=picture(u, n), label=f"digit {u}", value=3.9 - 0.17 * n)
                for n in range(8)
            ),
        )
        for u in (0, 3, 7)
    )
    tokens = (
        "The",
        " patch",
        " clamp",
        " holds",
        " the",
        " cell",
        ",",
        "\n",
        "and",
        " the",
        " cell",
    )
    passages = UnitExamples(
        unit="layers.1.mlp:act[412]",
        summary="Rises on a word that has already been read.",
        passages=(
            Passage(
                tokens=(*tokens, " answers", "."),
                strengths=(0, 0.1, 0.4, 0.2, 0.1, 0.3, 0, -0.2, 0.1, 1.2, 3.1, -0.9, -1.8),
                focus=10,
                value=3.1,
                label="train/18",
            ),
            Passage(
                tokens=("שלום", " ", "עולם", ",", " שלום"),
                strengths=(0.2, 0.0, 0.1, 0.0, 2.2),
                focus=4,
                value=2.2,
                label="train/207",
            ),
        ),
    )
    return Section(
        id="activity",
        title="What the units do",
        summary="Every unit's activity over the held-out digits, and what drives it most.",
        blocks=(
            Table(title="Units", columns=columns, rows=tuple(rows)),
            Examples(
                title="What drives a unit most",
                units=(*pictures, passages),
                note="The eight inputs, or the passages, with the highest activation.",
            ),
        ),
        findings=(
            Finding(
                id="activity/dead",
                claim="No unit of the last stage is dead.",
                subject="stages.3.1.act",
                effect=3,
                unit="dead units of 75",
                evidence=Evidence.OBSERVED,
                verdict=Verdict.DOES_NOT_HOLD,
                over="360 held-out digits",
                record=record("unit activity"),
                caveats=("A unit that is silent on digits may answer to other inputs.",),
            ),
            Finding(
                id="activity/planted",
                claim="Unit 7 of the last stage detects the digit seven.",
                subject="stages.3.1.act[7]",
                effect=0.961,
                unit="AUC",
                evidence=Evidence.VALIDATED,
                verdict=Verdict.HOLDS,
                over="360 held-out digits",
                record=record("class selectivity"),
                interval=Interval(low=0.931, high=0.984, method="DeLong"),
                null=Null(kind="shuffled labels", mean=0.5, low=0.42, high=0.58, num=200, p=0.005),
                validation="40 planted detectors: 39 found; 40 untrained networks: 1 false alarm",
            ),
        ),
        cpu_seconds=4.3,
    )


def ablation() -> Section:
    sites = [
        f"stages.{s}.{b}.{leaf}" for s in range(4) for b in range(2) for leaf in ["conv", "act"]
    ]
    values = tuple(0.34 * wobble(i, 2) ** 3 - 0.012 for i in range(len(sites)))
    spread = tuple(0.008 + 0.03 * wobble(i, 5) for i in range(len(sites)))
    centre = tuple(0.02 * wobble(i, 3) for i in range(len(sites)))

    def importance(i: int) -> Finding:
        holds = values[i] - spread[i] > centre[i] + 0.018
        return Finding(
            id=f"ablation/{sites[i]}",
            claim=f"Losing {sites[i]} costs more than losing a random group of its size.",
            subject=sites[i],
            effect=values[i],
            unit="accuracy lost",
            evidence=Evidence.INTERVENED,
            verdict=Verdict.HOLDS if holds else Verdict.UNKNOWN,
            over="360 held-out digits",
            record=record(
                "ablation", edits=({"kind": "mean", "site": sites[i], "units": [0, 1, 2]},)
            ),
            interval=Interval(
                low=values[i] - spread[i], high=values[i] + spread[i], method="paired"
            ),
            null=Null(
                kind="random groups of the same size",
                mean=centre[i],
                low=centre[i] - 0.018,
                high=centre[i] + 0.018,
                num=200,
                p=0.005 if holds else 0.21,
            ),
        )

    return Section(
        id="ablation",
        title="What the network needs",
        summary="Each group of channels held at its mean, against random groups of the same size.",
        blocks=(
            Bars(
                title="Accuracy lost without each group",
                labels=tuple(sites),
                values=values,
                unit="accuracy lost",
                low=tuple(v - s for v, s in zip(values, spread, strict=True)),
                high=tuple(v + s for v, s in zip(values, spread, strict=True)),
                null_low=tuple(c - 0.018 for c in centre),
                null_high=tuple(c + 0.018 for c in centre),
                note="A group matters where its interval clears the shaded range.",
            ),
        ),
        findings=tuple(importance(i) for i in range(len(sites))),
        cpu_seconds=12.6,
    )


def robustness() -> Section:
    return Section(
        id="robustness",
        title="What is proved",
        summary="Statements that hold for every input in a stated set.",
        findings=(
            Finding(
                id="robustness/radius",
                claim="No change of up to one grey level in any pixel changes the answer.",
                subject="digits-cnn",
                effect=0.883,
                unit="share of digits certified",
                evidence=Evidence.CERTIFIED,
                verdict=Verdict.HOLDS,
                over="every image within 1/16 of 360 held-out digits",
                record=record("linear relaxation"),
                interval=Interval(low=0.846, high=0.913, method="Wilson"),
                certificate="max-norm ball of radius 1/16; over the reals",
            ),
            Finding(
                id="robustness/float",
                claim="The same holds in float32 arithmetic.",
                subject="digits-cnn",
                effect=None,
                unit="share of digits certified",
                evidence=Evidence.OBSERVED,
                verdict=Verdict.UNKNOWN,
                over="360 held-out digits",
                record=record("linear relaxation"),
                caveats=("The bound engine did not finish within the budget.",),
            ),
        ),
    )


def transformer_circuit(
    num_layers: int = 4, num_heads: int = 4, num_kv_heads: int | None = None, num_kept: int = 40
) -> Circuit:
    """A made-up circuit with the nodes of a transformer; shared key heads where asked for."""
    writers, readers = [(-1, Node("embed"))], []
    for n in range(num_layers):
        heads = [Node(f"attn.{n}.z", h) for h in range(num_heads)]
        readers += [(2 * n, Reader(head, "q")) for head in heads]
        for slot in "kv":
            own = [Node(f"attn.{n}.{slot}", h) for h in range(num_kv_heads or 0)] or heads
            readers += [(2 * n, Reader(node, slot)) for node in own]
        readers.append((2 * n + 1, Reader(Node(f"mlp.{n}.out"))))
        writers += [*((2 * n, head) for head in heads), (2 * n + 1, Node(f"mlp.{n}.out"))]
    readers.append((2 * num_layers, Reader(Node("logits"))))
    possible = np.array([[w < r for w, _ in writers] for r, _ in readers])
    sizes = np.array(
        [[wobble(r, w, 3) ** 9 * (1 - 2 * (wobble(r, w) < 0.3)) for w in range(len(writers))]
         for r in range(len(readers))]
    )  # fmt: skip
    circuit = Circuit(
        writers=tuple(node for _, node in writers),
        readers=tuple(reader for _, reader in readers),
        possible=possible,
        kept=possible,
        scores=np.where(possible, sizes, 0.0),
        record=Provenance(metric="logit difference", method="edge attribution", task="induction"),
    )
    return circuit.top(num_kept)


def convolution_circuit() -> Circuit:
    """A made-up circuit with the nodes of a network of layers."""
    layers = [(":input", 3), ("conv1", 8), ("conv2", 8), ("fc", 5)]
    nodes = [[Node(site, i) for i in range(num)] for site, num in layers]
    writers = [node for layer in nodes[:-1] for node in layer]
    readers = [Reader(node) for layer in nodes[1:] for node in layer]
    below = {site: layers[i - 1][0] for i, (site, _) in enumerate(layers)}
    possible = np.array([[w.site == below[r.node.site] for w in writers] for r in readers])
    scores = np.array(
        [[wobble(r, w, 7) ** 5 for w in range(len(writers))] for r in range(len(readers))]
    )
    return Circuit(
        writers=tuple(writers),
        readers=tuple(readers),
        possible=possible,
        kept=possible,
        scores=np.where(possible, scores, 0.0),
    ).top(28)


def architecture() -> Architecture:
    """Two parallel branches, a skip connection, a broadcast and a repeated part."""
    value = {"axes": ("batch", "position", "unit"), "sizes": ("batch", "length", "64")}

    def wire(source: str, target: str, **more: tuple[str, ...]) -> Wire:
        return Wire(source=source, target=target, value=f"{source}:out", **{**value, **more})

    def box(name: str, kind: str = "operator", **more: object) -> Box:
        operations = (f"{name}:run",) if kind not in ("input", "output") else ()
        return Box(id=name, label=name, kind=kind, **{"operations": operations, **more})

    part = {"frame": "f", "over": ("batch", "position")}
    return Architecture(
        title="The network",
        boxes=(
            box("input", "input"),
            box("table", num_weights=4096),
            box("add", over=("batch", "position", "unit"), linear=True),
            box("norm", num_weights=128, operations=tuple(f"norm.{i}" for i in range(12)), **part),
            box("left", linear=True, num_weights=4096, **part),
            box("right", linear=True, num_weights=4096, **part),
            box(
                "mix",
                "module",
                frame="f",
                operations=("mix:softmax", "mix:matmul"),
                over=("batch",),
            ),
            box("sum", over=("batch", "position", "unit"), linear=True, frame="f"),
            box("layers.0 \u2026 layers.5", "module", times=6, operations=("a", "b"), over=()),
            box("view", "rearrange", over=("batch",)),
            box("output", "output"),
        ),
        wires=(
            wire("input", "add"),
            wire(
                "table",
                "add",
                axes=("position", "unit"),
                sizes=("length", "64"),
                broadcast=("batch",),
            ),
            wire("add", "norm"),
            wire("norm", "left"),
            wire("norm", "right"),
            wire("left", "mix"),
            wire("right", "mix"),
            wire("mix", "sum"),
            wire("add", "sum"),
            wire("sum", "layers.0 \u2026 layers.5"),
            wire("layers.0 \u2026 layers.5", "view"),
            wire("view", "output", axes=("batch", "unit"), sizes=("batch", "64*length")),
        ),
        frames=(Frame(id="f", label="blocks.0 \u2026 blocks.11", times=12),),
        note="Boxes in one row can run at the same time.",
    )


def drawings() -> Section:
    circuit = transformer_circuit()
    heads = [node for node in circuit.nodes() if node.site.endswith(".z")]
    kinds = ("induction", "previous token", "")
    return Section(
        id="drawings",
        title="The circuit, drawn",
        summary="Which parts feed which, and how strongly.",
        blocks=(
            diagram_of(
                circuit,
                title="Circuit of the induction task",
                note="Scores are effects on the logit difference.",
                groups={head: kinds[i % 3] for i, head in enumerate(heads) if kinds[i % 3]},
                node_scores={head: 0.1 * i for i, head in enumerate(heads)},
            ),
            diagram_of(
                transformer_circuit(num_layers=3, num_heads=9, num_kv_heads=3, num_kept=300),
                title="Shared key heads, thinned",
                max_edges=60,
            ),
            diagram_of(convolution_circuit(), title="Channels of a convolutional network"),
            architecture(),
        ),
    )


def sample_document() -> Document:
    """The whole audit."""
    return Document(
        title="Audit of digits-cnn",
        subtitle="A convolutional network that reads handwritten digits, measured on the 360 "
        "digits that it was not trained on.",
        created="2026-03-02 14:05 UTC",
        command=COMMAND,
        header=Facts(
            title="Model",
            items=(
                ("Model", "digits-cnn (bundled)"),
                ("Parameters", "71,434"),
                ("Data", "scikit-learn digits, held out"),
                ("Engines", "hooks, graph"),
                ("Model hash", "3f1c9a77d2be"),
                ("Time", "19.7 CPU seconds"),
            ),
        ),
        sections=(anatomy(), performance(), activity(), ablation(), drawings(), robustness()),
        left_out=(
            LeftOut(
                what="Ablation of single channels",
                why="The budget of 2 minutes was spent on groups.",
                how_to_get_it="patchclamp audit digits-cnn --budget 10m",
            ),
        ),
        versions=VERSIONS,
    )


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"><svg onload=alert(3)>' onclick='alert(4)",
    "\u202egnp.exe\u202c \u2067שלום\u2069",
    "null \x00 and \x1b[31mred\x1b[0m \x07 \x85",
    "🧪👩\u200d🔬 \u200b\ufeff\u00ad",
    "{{ 7 * 7 }} ${7*7} <!-- ]]> --> &amp; &#60;",
    "w" * 400,
    "line\u2028paragraph\u2029",
    "torn \udc80 \uffff",
    "javascript:alert(5)",
)


def hostile_document() -> Document:
    """Hostile strings wherever a document holds text."""
    every = " ".join(HOSTILE)
    sample = sample_document()
    finding = dataclasses.replace(
        sample.sections[3].findings[0],
        **dict.fromkeys(("id", "claim", "subject", "unit", "over", "validation"), every),
        certificate=every,
        caveats=HOSTILE,
        interval=Interval(low=0.1, high=0.4, method=every),
        null=Null(kind=every, mean=0.0, low=-0.1, high=0.1, num=5, p=0.2),
        record=Record(
            method=every,
            options={every: [every, {"deep": every}]},
            model=every,
            model_hash=every,
            data=every,
            data_hash=every,
            metric=every,
            edits=({"kind": every},),
            engine=every,
            versions={every: every},
            command=every,
        ),
    )
    column = Column(name="a", title=every, role="address", unit=every, help=every)
    text = Column(name="b", title=every)
    rows = tuple((f"{h} {i}", h) for i in range(30) for h in HOSTILE)
    one = Picture(png_base64=picture(0, 0), label=every, value=1.0)
    passage = Passage(
        tokens=HOSTILE,
        strengths=tuple(map(float, range(len(HOSTILE)))),
        focus=1,
        value=1.0,
        label=every,
    )
    three = {"title": every, "note": every}
    blocks = (
        Table(columns=(column, text), rows=rows, **three),
        Bars(labels=HOSTILE, values=tuple(map(float, range(len(HOSTILE)))), unit=every, **three),
        Histogram(edges=(0.0, 1.0), counts=(1,), unit=every, **three),
        Curve(x=(0.0, 1.0), y=(0.0, 1.0), x_title=every, y_title=every, diagonal=True, **three),
        Examples(
            units=(
                UnitExamples(unit=every, summary=every, pictures=(one,)),
                UnitExamples(unit=every, summary=every, passages=(passage,)),
            ),
            **three,
        ),
        Facts(items=tuple((h, h) for h in HOSTILE), **three),
        Diagram(
            nodes=tuple(
                DiagramNode(id=h, label=h, row=i % 3, column=i // 3, kind="unit", group=h)
                for i, h in enumerate(HOSTILE)
            ),
            edges=tuple(
                DiagramEdge(source=a, target=b, slot=b, score=1.0) for a, b in pairwise(HOSTILE)
            ),
            rows=(every, HOSTILE[0], HOSTILE[1]),
            unit=every,
            **three,
        ),
        Architecture(
            boxes=tuple(
                Box(id=h, label=h, kind="operator", operations=(h,), over=(h,), frame=every)
                for h in HOSTILE
            ),
            wires=tuple(
                Wire(source=a, target=b, value=h, axes=(h,), sizes=(h,), broadcast=(h,))
                for a, b, h in zip(HOSTILE, HOSTILE[1:], HOSTILE, strict=False)
            ),
            frames=(Frame(id=every, label=every, times=2),),
            **three,
        ),
    )
    return Document(
        title=every,
        subtitle=every,
        created=every,
        command=every,
        header=Facts(title=every, items=((every, every),)),
        sections=(
            Section(id=every, title=every, summary=every, blocks=blocks, findings=(finding,)),
        ),
        left_out=(LeftOut(what=every, why=every, how_to_get_it=every),),
        versions={every: every},
    )


def large_document(num: int = 5000) -> Document:
    """A table with a row for each of many units, ten columns wide."""
    columns = (
        Column(name="unit", title="Unit", role="address"),
        Column(name="kind", title="Kind"),
        *(Column(name=f"v{i}", title=f"Value {i}", role="number") for i in range(4)),
        *(Column(name=f"b{i}", title=f"Bar {i}", role="bar") for i in range(2)),
        Column(name="share", title="Share", role="share"),
        Column(name="flag", title="Flag", role="flag"),
    )
    rows = tuple(
        (
            f"blocks.{i}.unit",
            "neuron",
            *(wobble(i, j) * 10 ** (j - 3) for j in range(4)),
            wobble(i, 5) - 0.5,
            wobble(i, 6),
            wobble(i, 7),
            wobble(i, 8) < 0.5,
        )
        for i in range(num)
    )
    section = Section(
        id="units",
        title="Units",
        summary="",
        blocks=(Table(title="All units", columns=columns, rows=rows),),
    )
    return dataclasses.replace(sample_document(), sections=(section,))


if __name__ == "__main__":
    from patchclamp.report.page import write_page

    write_page(sample_document(), sys.argv[1])

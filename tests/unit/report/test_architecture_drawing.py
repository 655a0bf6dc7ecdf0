"""Architectures as drawings: every axis a strand, parallel boxes abreast, names as text."""

from __future__ import annotations

import dataclasses
import itertools
import re
from xml.etree import ElementTree

import pytest

from patchclamp.core.document import Architecture, Box, Frame, Section, Wire
from patchclamp.core.errors import DataError
from patchclamp.engine.diagram import diagram
from patchclamp.report import render
from patchclamp.report.architecture_drawing import architecture_svg
from tests.networks import opened
from tests.report_sample import architecture, sample_document

SVG = "{http://www.w3.org/2000/svg}"


def groups(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [g for g in root.iter(f"{SVG}g") if g.get("class", "").split()[:1] == [kind]]


def title(element: ElementTree.Element) -> str:
    found = element.find(f"{SVG}title")
    assert found is not None
    return found.text or ""


def frame_of(element: ElementTree.Element) -> tuple[float, float, float, float]:
    rect = next(r for r in element.iter(f"{SVG}rect") if r.get("class") != "behind")
    x, y, w, h = (float(rect.get(k, "")) for k in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


def places(made: Architecture) -> dict[str, tuple[float, float, float, float]]:
    root = ElementTree.fromstring(architecture_svg(made))
    ids = [box.id for box in made.boxes]
    return {ids[int(g.get("data-node", ""))]: frame_of(g) for g in groups(root, "node")}


def network(name: str, depth: int) -> Architecture:
    net = opened(name)[0]
    assert net.graph is not None
    axes = {address: site.axes for address, site in net.graph.sites().items()}
    return diagram(net.graph.capture.graph, depth=depth, axes=axes)


REAL = [
    *(("tiny_lm", d) for d in (1, 2, 3)),
    *(("resnet", 2), ("resnet", 4), ("lstm", 2), ("digits_cnn", 2), ("spiking", 1), ("vit", 2)),
]


@pytest.mark.parametrize(("name", "depth"), REAL)
def test_real_networks_are_drawn_whole_and_nothing_overlaps(name: str, depth: int) -> None:
    made = network(name, depth)
    at = places(made)
    assert at.keys() == {box.id for box in made.boxes}
    for a, b in itertools.combinations(at.values(), 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    for wire in made.wires:  # up, from what makes a value to what reads it
        assert at[wire.target][3] < at[wire.source][1]
    root = ElementTree.fromstring(architecture_svg(made))
    for strand in root.iter(f"{SVG}path"):
        x = y = 0.0
        for command, numbers in re.findall(r"([MCV])([^MCV]*)", strand.get("d", "")):
            values = [float(v) for v in numbers.split()]
            if command == "V":
                low, high = y, values[0]
                hit = [
                    b
                    for b in at.values()
                    if b[0] < x < b[2] and b[1] < low - 0.1 and high < b[3] - 0.1
                ]
                assert not hit
                y = high
            else:
                x, y = values[-2:]


def test_a_wire_has_a_strand_for_each_axis_and_its_names() -> None:
    made = architecture()
    root = ElementTree.fromstring(architecture_svg(made))
    edges = groups(root, "edge")
    for wire, edge in zip(made.wires, edges, strict=True):
        strands = list(edge.iter(f"{SVG}path"))
        assert len(strands) == len(wire.axes) + len(wire.broadcast)
        dashed = [s for s in strands if "repeated" in s.get("class", "")]
        assert len(dashed) == len(wire.broadcast)
    assert sum(len(w.broadcast) for w in made.wires) == 1
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert texts.count("unit 64*length") == 1
    assert texts.count("position length") == len({w.value for w in made.wires}) - 1
    # An axis has one colour wherever it is drawn.
    batch = [edge.find(f"{SVG}path") for e, edge in enumerate(edges) if e != 1]
    assert len({b.get("class") for b in batch if b is not None}) == 1


def test_boxes_say_what_they_are() -> None:
    root = ElementTree.fromstring(architecture_svg(architecture()))
    boxes = {title(g).split(" ·")[0]: g for g in groups(root, "node")}
    assert "linear map" in title(boxes["left"])
    assert len(list(boxes["left"].iter(f"{SVG}rect"))) == 2  # the double edge
    assert len(list(boxes["norm"].iter(f"{SVG}rect"))) == 1
    assert len(list(boxes["left"].iter(f"{SVG}line"))) == 2  # over batch and position
    assert "for each batch, position" in title(boxes["left"])
    assert "not known" in title(boxes["table"])
    assert "not known" not in title(boxes["layers.0 … layers.5"])
    assert "× 6 identical" in title(boxes["layers.0 … layers.5"])
    assert "norm.5 and 6 more" in title(boxes["norm"])


def test_what_can_run_at_the_same_time_stands_abreast() -> None:
    at = places(architecture())
    assert at["left"][1] == at["right"][1]
    # What needs nothing stands right below what needs it.
    late = Architecture(
        title="late",
        boxes=tuple(Box(id=n, label=n, kind="operator") for n in "abcd"),
        wires=tuple(
            Wire(source=a, target=b, value=a, axes=(), sizes=()) for a, b in ("ab", "bc", "dc")
        ),
    )
    assert places(late)["d"][1] == places(late)["b"][1]


def test_a_frame_holds_its_boxes_and_no_others() -> None:
    for made in (architecture(), network("tiny_lm", 3)):
        root = ElementTree.fromstring(architecture_svg(made))
        (frame,) = groups(root, "frame")
        left, top, right, foot = frame_of(frame)
        assert f"{made.frames[0].times} identical" in title(frame)
        at = places(made)
        for box in made.boxes:
            a = at[box.id]
            inside = left < a[0] and a[2] < right and top < a[1] and a[3] < foot
            assert inside == (box.frame == made.frames[0].id)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "\"><svg onload='x'>", "a\x00\u202eb"]
)
def test_names_are_text(name: str) -> None:
    made = Architecture(
        title=name,
        boxes=(
            Box(id=name, label=name, kind="operator", operations=(name,), over=(name,), frame=name),
            Box(id="b", label=name, kind="output"),
        ),
        wires=(
            Wire(
                source=name, target="b", value=name, axes=(name,), sizes=(name,), broadcast=(name,)
            ),
        ),
        frames=(Frame(id=name, label=name, times=2),),
    )
    root = ElementTree.fromstring(architecture_svg(made))
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        *("svg", "style", "rect", "text", "g", "line", "path", "title")
    }
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on")]


def test_the_same_architecture_gives_the_same_bytes() -> None:
    assert architecture_svg(architecture()) == architecture_svg(architecture())
    assert architecture_svg(network("vit", 2)) == architecture_svg(network("vit", 2))


def test_an_architecture_that_contradicts_itself_is_refused() -> None:
    good = architecture()
    for wrong, words in (
        (dataclasses.replace(good, boxes=good.boxes * 2), "occurs twice"),
        (dataclasses.replace(good, frames=()), "frame"),
        (dataclasses.replace(good, boxes=good.boxes[1:]), "not there"),
        (
            dataclasses.replace(good, wires=(dataclasses.replace(good.wires[0], sizes=()),)),
            "wrong length",
        ),
        (
            dataclasses.replace(good, frames=(Frame(id="f", label="", times=2, inside="f"),)),
            "inside",
        ),
    ):
        section = Section(id="s", title="S", summary="", blocks=(wrong,))
        with pytest.raises(DataError, match=words):
            render(dataclasses.replace(sample_document(), sections=(section,)))

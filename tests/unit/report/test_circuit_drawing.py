"""Circuits as drawings: rows, order, thinning, and names that stay text."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from patchclamp.core.circuit import Circuit, Edge, Node, Provenance, Reader, circuit_of
from patchclamp.core.document import Diagram, DiagramEdge, DiagramNode, Section
from patchclamp.core.errors import DataError, OptionError
from patchclamp.report import render
from patchclamp.report.circuit_drawing import circuit_svg, diagram_of
from patchclamp.report.diagram_drawing import diagram_drawing, diagram_summary
from patchclamp.report.layered import Gaps, crossings, depths, ordered, spread
from patchclamp.report.text import number
from tests.report_sample import convolution_circuit, sample_document, transformer_circuit

SVG = "{http://www.w3.org/2000/svg}"


def circuit(*texts: str, scores: tuple[float, ...] = (), metric: str = "") -> Circuit:
    """The circuit of these edges, in a network that has no others."""
    edges = [Edge.parse(text) for text in texts]
    writers = list(dict.fromkeys(e.writer for e in edges))
    readers = list(dict.fromkeys(Reader(e.reader, e.slot) for e in edges))
    possible = np.zeros((len(readers), len(writers)), dtype=bool)
    values = np.zeros(possible.shape)
    for edge, score in itertools.zip_longest(edges, scores, fillvalue=1.0):
        at = readers.index(Reader(edge.reader, edge.slot)), writers.index(edge.writer)
        possible[at], values[at] = True, score
    made = circuit_of(edges, writers, readers, possible, Provenance(metric=metric))
    return dataclasses.replace(made, scores=values)


def tree(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def groups(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [g for g in root.iter(f"{SVG}g") if g.get("class", "").split()[:1] == [kind]]


def title(element: ElementTree.Element) -> str:
    found = element.find(f"{SVG}title")
    assert found is not None
    return found.text or ""


def row_of(diagram: Diagram) -> dict[str, int]:
    return {node.id: node.row for node in diagram.nodes}


def test_rows_lead_from_the_input_up_to_the_output() -> None:
    diagram = diagram_of(transformer_circuit(num_layers=2, num_kept=200))
    assert diagram.rows == ("embed", "heads 0", "mlp 0", "heads 1", "mlp 1", "logits")
    assert {n.kind for n in diagram.nodes} == {"embed", "head", "mlp", "output"}
    row = row_of(diagram)
    assert all(row[e.source] < row[e.target] for e in diagram.edges)
    root = tree(circuit_svg(transformer_circuit(num_layers=2, num_kept=200)))
    tops = {
        title(g).split(" ")[0]: float(rect.get("y", ""))
        for g in groups(root, "node")
        if (rect := g.find(f"{SVG}rect")) is not None
    }
    assert tops["embed"] == max(tops.values())
    assert tops["logits"] == min(tops.values())


def test_heads_stand_in_their_own_order() -> None:
    diagram = diagram_of(transformer_circuit(num_layers=2, num_heads=12, num_kept=80))
    for row in (1, 3):
        heads = sorted((n for n in diagram.nodes if n.row == row), key=lambda n: n.column)
        numbers = [Node.parse(n.id).unit for n in heads]
        assert numbers == sorted(numbers)
        assert len(numbers) > 4


def test_layers_without_transformer_names_are_drawn_by_what_feeds_what() -> None:
    diagram = diagram_of(convolution_circuit())
    assert diagram.rows == (":input", "conv1", "conv2", "fc")
    assert {n.kind for n in diagram.nodes} == {"embed", "unit", "output"}
    assert {n.label for n in diagram.nodes if n.row == 1} <= {f"[{i}]" for i in range(8)}

    steps = diagram_of(circuit(":input[0]->fc@0[1]", "fc@0[1]->fc@1[1]", "fc@1[1]->fc@2[1]"))
    assert row_of(steps) == {":input[0]": 0, "fc@0[1]": 1, "fc@1[1]": 2, "fc@2[1]": 3}


def test_nodes_at_positions_keep_their_positions() -> None:
    diagram = diagram_of(circuit("embed@@3->attn.0.z[1]@@4<q>", "attn.0.z[1]@@4->logits@@4"))
    assert [n.label for n in diagram.nodes] == ["embed @3", "0.1 @4", "logits @4"]


def test_a_circle_is_drawn_too() -> None:
    around = circuit("a[0]->b[0]", "b[0]->a[0]", "a[0]->a[1]")
    assert len(diagram_of(around).edges) == 3
    assert len(groups(tree(circuit_svg(around)), "edge")) == 3


def test_shared_key_heads_are_linked_to_the_heads_they_serve() -> None:
    shared = transformer_circuit(num_layers=1, num_heads=6, num_kv_heads=2, num_kept=1000)
    diagram = diagram_of(shared)
    fixed = {(e.source, e.target) for e in diagram.edges if e.score is None}
    heads = range(6)
    assert fixed == {(f"attn.0.{s}[{h // 3}]", f"attn.0.z[{h}]") for s in "kv" for h in heads}
    row = row_of(diagram)
    assert row["attn.0.k[0]"] == row["attn.0.v[1]"] == row["attn.0.z[0]"] - 1
    # Where the numbers do not come out even, nothing is made up.
    uneven = transformer_circuit(num_layers=1, num_heads=5, num_kv_heads=2, num_kept=1000)
    assert all(e.score is not None for e in diagram_of(uneven).edges)
    assert all(e.score is not None for e in diagram_of(transformer_circuit()).edges)


def test_only_what_is_kept_is_drawn() -> None:
    whole = transformer_circuit(num_kept=17)
    diagram = diagram_of(whole)
    drawn = {(e.source, e.target, e.slot): e.score for e in diagram.edges}
    assert drawn.keys() == {(str(e.writer), str(e.reader), e.slot) for e in whole.edges()}
    for edge in whole.edges():
        r = whole.readers.index(Reader(edge.reader, edge.slot))
        score = whole.scores[r, whole.writers.index(edge.writer)]
        assert drawn[str(edge.writer), str(edge.reader), edge.slot] == score
    assert {n.id for n in diagram.nodes} == {str(n) for n in whole.nodes()}
    assert diagram.num_edges_left_out == diagram.num_nodes_left_out == 0
    assert "Not drawn" not in " ".join(diagram_summary(diagram))


def test_a_large_circuit_is_thinned_and_says_so() -> None:
    large = transformer_circuit(num_layers=6, num_heads=8, num_kept=3000)
    assert large.num_edges == 3000
    diagram = diagram_of(large, max_edges=50)
    assert len(diagram.edges) == 50
    assert diagram.num_edges_left_out == 2950
    assert len(diagram.nodes) + diagram.num_nodes_left_out == len(large.nodes())
    sizes = np.sort(np.abs(large.scores[large.kept]))[::-1]
    assert [abs(e.score or 0) for e in diagram.edges] == sizes[:50].tolist()
    text = " ".join(diagram_summary(diagram))
    assert f"2,950 weaker edges of {number(sizes[49])} or less" in text
    assert f"{diagram.num_nodes_left_out:,} nodes" in text
    for drawn in (circuit_svg(large, max_edges=50), page_of(diagram)):
        assert "2,950 weaker edges" in drawn
    with pytest.raises(OptionError, match="max_edges"):
        diagram_of(large, max_edges=0)


def page_of(*blocks: object) -> str:
    section = Section(id="s", title="S", summary="", blocks=blocks)  # type: ignore[arg-type]  # any
    return render(dataclasses.replace(sample_document(), sections=(section,)))


def test_an_empty_circuit_is_no_drawing() -> None:
    empty = transformer_circuit(num_kept=0)
    assert "No edges." in page_of(diagram_of(empty))
    assert groups(tree(circuit_svg(empty)), "node") == []


def test_edges_show_size_sign_and_slot() -> None:
    made = circuit(
        "embed->attn.0.z[0]<q>",
        "embed->attn.0.z[0]<k>",
        "attn.0.z[0]->logits",
        scores=(2.0, -1.0, 0.5),
        metric="logit difference",
    )
    root = tree(circuit_svg(made))
    found = {title(g): g for g in groups(root, "edge")}
    widths = {}
    for words, g in found.items():
        line = next(p for p in g.iter(f"{SVG}path") if p.get("class") == "line")
        widths[words] = float(line.get("stroke-width", ""))
    assert widths == {
        "embed → attn.0.z[0] (q): 2 logit difference": 6.0,
        "embed → attn.0.z[0] (k): −1 logit difference": 3.5,
        "attn.0.z[0] → logits: 0.5 logit difference": 2.25,
    }
    assert [g.get("class") for g in found.values()] == ["edge more", "edge less", "edge more"]
    slots = [t.text for t in root.iter(f"{SVG}text") if "slot" in t.get("class", "")]
    assert slots == ["q", "k"]


def test_groups_and_scores_are_shown() -> None:
    head, other = Node("attn.0.z", 0), Node("attn.0.z", 1)
    made = circuit("embed->attn.0.z[0]<q>", "embed->attn.0.z[1]<q>")
    svg = circuit_svg(made, groups={head: "induction"}, node_scores={other: 0.25})
    titles = [title(g) for g in groups(tree(svg), "node")]
    assert any(t.startswith("attn.0.z[0] · head · induction") for t in titles)
    assert any(t.startswith("attn.0.z[1] · head · 0.25") for t in titles)
    many = diagram_of(
        circuit(*(f"embed->attn.0.z[{i}]<q>" for i in range(9))),
        groups={Node("attn.0.z", i): f"type {i}" for i in range(9)},
    )
    legend = [words for _, words in diagram_drawing(many).legend]
    assert [w for w in legend if w.startswith("type")] == [f"type {i}" for i in range(6)]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "\"><svg onload='x'>", "a\x00\u202eb", "&amp;{{7*7}}", "]]>"],
)
def test_names_are_text(name: str) -> None:
    bad = Circuit(
        writers=(Node(name, 1),),
        readers=(Reader(Node("out")),),
        possible=np.ones((1, 1), dtype=bool),
        kept=np.ones((1, 1), dtype=bool),
        scores=np.ones((1, 1)),
        record=Provenance(metric=name),
    )
    svg = circuit_svg(bad, title=name, groups={Node(name, 1): name})
    root = tree(svg)
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        *("svg", "style", "rect", "text", "g", "line", "path", "title")
    }
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on")]
    page = page_of(diagram_of(bad, title=name, note=name))
    assert "<script>alert" not in page
    assert len(re.findall(r"<script\b", page)) == 2


def test_nothing_is_asked_for_from_outside() -> None:
    svg = circuit_svg(transformer_circuit())
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in svg


def test_the_same_circuit_gives_the_same_bytes() -> None:
    once = circuit_svg(transformer_circuit())
    assert once == circuit_svg(Circuit.from_json(transformer_circuit().to_json()))


def box(element: ElementTree.Element) -> tuple[float, float, float, float]:
    rect = element.find(f"{SVG}rect")
    assert rect is not None
    x, y, w, h = (float(rect.get(k, "")) for k in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


@pytest.mark.parametrize(
    "made",
    [
        transformer_circuit(num_layers=6, num_heads=12, num_kept=150),
        transformer_circuit(num_layers=4, num_heads=9, num_kv_heads=3, num_kept=120),
        convolution_circuit(),
    ],
)
def test_nothing_overlaps_and_edges_go_round_nodes(made: Circuit) -> None:
    root = tree(circuit_svg(made))
    boxes = [box(g) for g in groups(root, "node")]
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    uprights = 0
    for path in root.iter(f"{SVG}path"):
        x = y = 0.0
        for command, numbers in re.findall(r"([MCV])([^MCV]*)", path.get("d", "")):
            values = [float(v) for v in numbers.split()]
            if command == "V":
                uprights += 1
                assert not [b for b in boxes if b[0] < x < b[2] and b[1] < y and values[0] < b[3]]
                y = values[0]
            else:
                x, y = values[-2:]
    assert uprights > 0 or made.record.metric == ""


def naive_crossings(rows: list[list[str]], links: list[tuple[str, str]]) -> int:
    at = {name: (r, c) for r, row in enumerate(rows) for c, name in enumerate(row)}
    total = 0
    for (a, b), (c, d) in itertools.combinations(links, 2):
        if at[a][0] == at[c][0] and at[b][0] == at[d][0]:
            total += (at[a][1] - at[c][1]) * (at[b][1] - at[d][1]) < 0
    return total


def test_ordering_removes_crossings_and_never_adds_any() -> None:
    turned = [[f"a{i}" for i in range(6)], [f"b{i}" for i in range(6)]]
    links = [(f"a{i}", f"b{5 - i}") for i in range(6)]
    assert crossings(turned, links) == 15
    assert crossings(ordered(turned, links, [True, True]), links) == 0
    assert ordered(turned, links, [False, False]) == tuple(map(tuple, turned))
    draw = random.Random(0)
    fewer = 0
    for _ in range(20):
        rows = [[f"{r}.{c}" for c in range(draw.randint(1, 7))] for r in range(4)]
        pairs = [(a, b) for r in range(3) for a in rows[r] for b in rows[r + 1]]
        some = draw.sample(pairs, k=len(pairs) // 2)
        best = ordered(rows, some, [True] * 4)
        assert [sorted(row) for row in best] == [sorted(row) for row in rows]
        assert crossings(rows, some) == naive_crossings(rows, some)
        assert crossings(best, some) <= crossings(rows, some)
        fewer += crossings(best, some) < crossings(rows, some)
    assert fewer > 10


def test_places_keep_order_and_distance() -> None:
    rows = [["a", "b"], ["c"], ["d", "e", "f"]]
    widths = {"a": 10.0, "b": 30.0, "c": 10.0, "d": 50.0, "e": 10.0, "f": 10.0}
    x = spread(rows, widths, [("a", "c"), ("b", "c"), ("c", "e")], 5.0)
    for row in rows:
        for left, right in itertools.pairwise(row):
            assert x[right] - x[left] >= (widths[left] + widths[right]) / 2 + 5 - 0.02
    assert min(x[n] - widths[n] / 2 for n in x) == 0
    assert abs(x["c"] - x["e"]) < 1


def test_small_steps_of_the_layout() -> None:
    assert depths(["a", "b", "c", "d"], [("a", "b"), ("b", "d"), ("a", "d")]) == {
        **{"a": 0, "b": 1, "c": 0, "d": 2}
    }
    assert depths(["a", "b"], [("a", "b"), ("b", "a")]) == {"a": 0, "b": 1}
    gaps = Gaps.of([(0, 10), (8, 20), (30, 40)])
    assert gaps.taken == ((0, 20), (30, 40))
    assert [gaps.nearest(x) for x in (-1, 1, 19, 25, 35, 36)] == [-1, 0, 20, 25, 30, 40]


def test_a_diagram_that_contradicts_itself_is_refused() -> None:
    nodes = (DiagramNode(id="a", label="a", row=0, column=0),)
    good = Diagram(title="t", nodes=nodes, edges=(), rows=("r",))
    page_of(good)
    bad_edge = (DiagramEdge(source="a", target="b"),)
    for wrong, words in (
        (dataclasses.replace(good, nodes=nodes * 2), "occurs twice"),
        (dataclasses.replace(good, rows=()), "not one of its rows"),
        (dataclasses.replace(good, edges=bad_edge), "what is not there"),
        (dataclasses.replace(good, num_edges_left_out=-1), "negative"),
        (dataclasses.replace(good, nodes=(dataclasses.replace(nodes[0], kind="x"),)), "kind"),
    ):
        with pytest.raises(DataError, match=words):
            page_of(wrong)

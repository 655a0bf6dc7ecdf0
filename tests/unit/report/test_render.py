"""The page as text: one file, no outside request, hostile strings inert, same bytes, small."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import html.parser
import json
import re
import time
from pathlib import Path

import pytest

from patchclamp.core.document import (
    Bars,
    Column,
    Curve,
    Document,
    Examples,
    Facts,
    Histogram,
    LeftOut,
    Passage,
    Section,
    Table,
    UnitExamples,
)
from patchclamp.core.errors import OutputError
from patchclamp.core.findings import Evidence
from patchclamp.report import read_document, render, write_findings, write_page
from patchclamp.report.page import picture_size
from patchclamp.report.png import encode_png
from tests.report_sample import hostile_document, large_document, sample_document


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(sample_document()))


def only(block, **fields) -> Document:
    section = Section(id="s", title="S", summary="", blocks=(block,))
    return dataclasses.replace(sample_document(), sections=(section,), **fields)


def test_nothing_points_outside(page: Page) -> None:
    text = render(sample_document())
    assert not re.search(r"https?:|ftp:|@import|url\(|srcset|xmlns", text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "background", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not page.all("iframe")
    assert not page.all("object")


def test_the_policy_allows_this_style_and_script_only(page: Page) -> None:
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    style, _, script = page.scripts
    for kind, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_fragments_lead_somewhere_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a") + page.all("use"):
        assert attributes["href"].removeprefix("#") in ids


def test_tags_are_closed_in_order() -> None:
    void = {"meta", "link", "img", "br", "wbr", "input"}
    open_tags: list[str] = []

    class Balance(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(render(sample_document()))
    assert open_tags == []


def test_every_finding_is_there_with_its_terms(page: Page) -> None:
    for finding in sample_document().findings:
        assert page.text.count(finding.claim) == 2  # in the ledger and in its section
        assert finding.over in page.text
        for caveat in finding.caveats:
            assert caveat in page.text
    assert "random groups of the same size: mean" in page.text
    assert '"site": "stages.0.0.conv"' in page.text
    for level in Evidence:
        assert level.capitalize() in page.text


def test_verdicts_are_words_not_colours_alone(page: Page) -> None:
    for words in ("11 hold", "2 do not hold", "10 unknown"):
        assert words in page.text


def test_what_was_left_out_is_always_said(page: Page) -> None:
    assert "The budget of 2 minutes was spent on groups." in page.text
    none = Page(render(dataclasses.replace(sample_document(), left_out=())))
    assert "Nothing: all that was planned was done in full." in none.text


def test_the_document_is_in_the_page(page: Page, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(page.scripts[1])
    assert read_document(tmp_path / "f.json") == sample_document()


def test_a_page_drawn_from_json_is_the_same_page(tmp_path: Path) -> None:
    write_findings(sample_document(), tmp_path / "f.json")
    assert render(read_document(tmp_path / "f.json")) == render(sample_document())


def test_same_document_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(sample_document(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_hostile_strings_are_text() -> None:
    document = hostile_document()
    text = render(document)
    page = Page(text)
    assert len(page.all("script")) == 2
    images = page.all("img")
    assert len(images) == 1
    assert images[0]["src"].startswith("data:image/png;base64,")
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(2)>" in page.text
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text
    )
    assert "⟨U+0000⟩" in page.text
    assert "⟨U+202E⟩" in page.text
    assert "🧪" in page.text
    embedded = page.scripts[1]
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded)["title"] == document.title.replace("\udc80", r"\udc80")


def test_a_large_table_stays_small_and_quick() -> None:
    document = large_document()
    render(sample_document())  # templates are compiled once
    start = time.process_time()
    text = render(document)
    assert time.process_time() - start < 2
    assert len(text.encode()) < 5_000_000
    assert text.count("<tr>") < 400
    # Without scripts the rows beyond the first are there as lines of text.
    assert text.count("blocks.4999.unit") == 2  # in the lines and in the data


@pytest.mark.parametrize(
    "block",
    [
        Table(title="t", columns=(), rows=()),
        Table(title="t", columns=(Column(name="a", title="A", role="bar"),), rows=()),
        Table(
            title="t",
            columns=(Column(name="a", title="A", role="bar"),),
            rows=((1e308,), (-1e308,)),
        ),
        Bars(title="b", labels=(), values=(), unit=""),
        Bars(title="b", labels=("a", "b"), values=(0.0, 0.0), unit=""),
        Bars(title="b", labels=("a", "b"), values=(1e308, -1e308), unit=""),
        Histogram(title="h", edges=(0.0,), counts=(), unit=""),
        Histogram(title="h", edges=(0.0, 5e-324), counts=(0,), unit=""),
        Curve(title="c", x=(), y=(), x_title="x", y_title="y"),
        Curve(title="c", x=(1.0,), y=(1.0,), x_title="x", y_title="y", weight=(0.0,)),
        Examples(title="e", units=(UnitExamples(unit="u", summary=""),)),
        Facts(title="f", items=()),
    ],
)
def test_extreme_blocks_are_drawn(block) -> None:
    text = render(only(block))
    assert f"<h3>{block.title}</h3>" in text
    assert not re.search(r'"(nan|-?inf)%?"', text)


def test_an_empty_document_is_a_page() -> None:
    document = dataclasses.replace(sample_document(), sections=(), left_out=(), versions={})
    page = Page(render(document))
    assert "This audit made no findings." in page.text


def test_tables_show_values_by_role() -> None:
    columns = (
        Column(name="d", title="D", role="depth"),
        Column(name="site", title="Site", role="address"),
        Column(name="v", title="V", role="bar"),
        Column(name="s", title="S", role="share"),
        Column(name="f", title="F", role="flag"),
    )
    text = render(only(Table(title="t", columns=columns, rows=((2, "a.b", -0.5, 0.25, True),))))
    row = re.search("<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    assert '<td class="c-address in-2">a.b</td>' in row
    assert '<rect class="bar below" x="0.00%" y="0" width="50.00%"' in row
    assert '<rect class="bar" x="0.00%" y="0" width="25.00%"' in row
    assert "25%</td>" in row
    assert "</i> yes</span>" in row
    assert "−0.5</td>" in row
    assert "<td" not in text.split("<thead>")[1].split("</thead>")[0]


def test_bars_carry_interval_and_null() -> None:
    bars = Bars(
        title="b",
        labels=("x",),
        values=(-1.0,),
        unit="nats",
        low=(-2.0,),
        high=(2.0,),
        null_low=(-0.5,),
        null_high=(0.5,),
    )
    row = re.search('<ul class="bar-rows">(.*?)</ul>', render(only(bars)), re.DOTALL)[1]
    # The axis runs from -2.08 to 2.08: 2% to spare at both ends.
    assert '<rect class="null" x="37.98%" y="0" width="24.04%"' in row
    assert '<rect class="bar below" x="25.96%" y="5" width="24.04%"' in row
    assert '<line class="whisker" x1="1.92%" x2="98.08%"' in row
    assert "<b>−1</b> <small>[−2, 2]</small>" in row


def test_passages_show_white_space_strength_and_focus() -> None:
    passage = Passage(tokens=(" a", "\n", "b"), strengths=(2.0, 0.0, -1.0), focus=0, value=2.0)
    units = (UnitExamples(unit="u", summary="", passages=(passage,)),)
    text = render(only(Examples(title="e", units=units)))
    assert '<mark class="p8 focus" title="2"><i class="ws">·</i><wbr>a</mark>' in text
    assert '<span title="0"><i class="ws">⏎</i><br></span>' in text
    assert '<span class="m4" title="−1">b</span>' in text


def test_small_pictures_are_enlarged_by_whole_numbers(page: Page) -> None:
    assert {(img["width"], img["height"]) for img in page.all("img")} == {("72", "72")}


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [
        (8, 8, (72, 72, True)),
        (28, 10, (56, 20, True)),
        (72, 72, (72, 72, True)),
        (100, 90, (100, 90, True)),
        (640, 320, (160, 80, False)),
        (5000, 1, (160, 1, False)),
    ],
)
def test_the_size_of_a_picture(width: int, height: int, shown: tuple[int, int, bool]) -> None:
    png = encode_png(width, height, bytes(width * height), 1)
    assert picture_size(base64.b64encode(png).decode()) == shown


def test_text_is_isolated_by_direction() -> None:
    left = LeftOut(what="שלום", why="w", how_to_get_it="h")
    document = dataclasses.replace(sample_document(), title="שלום 1", left_out=(left,))
    assert "<bdi>שלום 1</bdi>" in render(document)


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(OutputError, match=r"sections\[0\]\.blocks\[0\]\.values\[0\]"):
        render(only(Bars(title="b", labels=("a",), values=(float("nan"),), unit="")))


def test_same_fragments_are_told_apart() -> None:
    document = sample_document()
    finding = document.sections[0].findings[0]
    findings = tuple(dataclasses.replace(finding, id=name) for name in ("a/b", "a b", "%", "$"))
    section = dataclasses.replace(document.sections[0], findings=findings)
    page = Page(render(dataclasses.replace(document, sections=(section,))))
    ids = {attributes["id"] for attributes in page.all("article")}
    assert ids == {"f-a-b", "f-a-b-2", "f-x", "f-x-2"}


def test_text_that_looks_escaped_is_not_unescaped() -> None:
    assert html.escape("&lt;b&gt;") in render(
        dataclasses.replace(sample_document(), title="&lt;b&gt;")
    )

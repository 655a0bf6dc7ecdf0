"""The page in a real Chromium: no request, no error, readable in both themes and on a phone.

Needs Chromium (the Debian package `chromium`) and the Python package playwright,
which drives it and downloads no browser of its own. Where there is none, these
tests fail; PATCHCLAMP_NO_BROWSER=1 skips them and says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patchclamp.core.document import Column, Document, Section, Table
from patchclamp.report import write_page
from patchclamp.report.text import visible
from tests.report_sample import HOSTILE, hostile_document, large_document, sample_document

if os.environ.get("PATCHCLAMP_NO_BROWSER") == "1":
    pytest.skip("PATCHCLAMP_NO_BROWSER=1: no browser wanted", allow_module_level=True)

from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Seen:
    """A page and what happened on it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail(
            "no Chromium on PATH: install the package chromium, or set PATCHCLAMP_NO_BROWSER=1"
        )
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    contexts = []

    def open_page(document: Document, *, width: int = 1280, **options: object) -> Seen:
        path = tmp_path / "page.html"
        write_page(document, path)
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        seen = Seen(page=context.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.on("dialog", lambda dialog: (seen.complaints.append("dialog"), dialog.dismiss()))
        seen.page.goto(path.as_uri())
        return seen

    yield open_page
    for context in contexts:
        context.close()


def check_quiet(seen: Seen) -> None:
    """Only the file itself was asked for (pictures in it are no requests), and no complaint."""
    asked = [url for url in seen.requests if not url.startswith("data:")]
    assert asked == [seen.page.url.partition("#")[0]]
    assert seen.complaints == []


def body_rows(page: Page, nth: int = 0) -> list[list[str]]:
    table = page.locator(".table-block").nth(nth)
    return table.evaluate(
        "t => Array.from(t.querySelectorAll('tbody tr'),"
        " r => Array.from(r.cells, c => c.textContent))"
    )


@pytest.mark.parametrize("make", [sample_document, hostile_document, large_document])
def test_it_loads_in_silence(show: Callable[..., Seen], make: Callable[[], Document]) -> None:
    seen = show(make())
    seen.page.wait_for_timeout(200)
    check_quiet(seen)


def test_the_policy_is_in_force(show: Callable[..., Seen]) -> None:
    seen = show(sample_document())
    answer = seen.page.evaluate(
        "async () => { const s = document.createElement('script');"
        " s.textContent = 'window.ran = 1'; document.body.append(s); let fetched = true;"
        " try { await fetch('data:text/plain,x') } catch { fetched = false }"
        " return [window.ran === undefined, fetched]; }"
    )
    assert answer == [True, False]


def ground(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(
    show: Callable[..., Seen], scheme: str
) -> None:
    seen = show(sample_document(), color_scheme=scheme)
    before = ground(seen.page)
    assert before == {"light": "rgb(246, 245, 241)", "dark": "rgb(17, 23, 26)"}[scheme]
    other = "Dark page" if scheme == "light" else "Light page"
    seen.page.get_by_role("button", name=other).click()
    assert ground(seen.page) != before
    seen.page.locator("#theme").click()
    assert ground(seen.page) == before
    check_quiet(seen)


CONTRASTS = """() => {
  const parse = (text) => {
    const n = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [n[0]*255, n[1]*255, n[2]*255, n[3] ?? 1]
      : [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => {
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const low = [];
  for (const d of document.querySelectorAll('details')) d.open = true;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility()) continue;
    if (e.closest('button:disabled')) continue;
    const chain = [];
    for (let p = e; p; p = p.parentElement) {
      chain.unshift(parse(getComputedStyle(p).backgroundColor));
    }
    const back = chain.reduce((under, c) => over(c, under), [255, 255, 255, 1]);
    const style = getComputedStyle(e);
    const fore = over(parse(e instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(fore), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    count += 1;
    if (ratio < 4.5) low.push([walk.currentNode.data, e.outerHTML.slice(0, 60), ratio]);
  }
  return [count, low];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(show: Callable[..., Seen], scheme: str) -> None:
    count, low = show(sample_document(), color_scheme=scheme).page.evaluate(CONTRASTS)
    assert count > 1000
    assert low == []


def test_tables_sort_filter_and_page(show: Callable[..., Seen]) -> None:
    seen = show(sample_document())
    page = seen.page
    units = page.locator(".table-block").nth(1)
    first = body_rows(page, 1)
    assert len(first) == 50
    units.get_by_role("button", name="Mean").click()
    means = [float(row[1].replace("−", "-")) for row in body_rows(page, 1)]
    assert means == sorted(means, reverse=True)
    assert units.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    units.get_by_role("button", name="Mean").click()
    means = [float(row[1].replace("−", "-")) for row in body_rows(page, 1)]
    assert means == sorted(means)
    units.get_by_role("button", name="Mean").click()
    assert body_rows(page, 1) == first
    assert units.locator("th[aria-sort]").count() == 0

    # Units that were not measured stand last in both orders.
    units.get_by_role("button", name="Selectivity").click()
    assert body_rows(page, 1)[0][6] != "–"

    units.get_by_role("searchbox").fill("stages.3.1.act[7")
    names = [row[0] for row in body_rows(page, 1)]
    assert set(names) == {f"stages.3.1.act[{i}]" for i in (7, 70, 71, 72, 73, 74)}
    assert units.get_by_role("status").inner_text() == "1–6 of 6 rows, 300 in all"
    units.get_by_role("searchbox").fill("no such unit")
    assert body_rows(page, 1) == [["No rows match."]]
    check_quiet(seen)


def test_every_row_of_a_large_table_can_be_reached(show: Callable[..., Seen]) -> None:
    seen = show(large_document(1001))
    table = seen.page.locator(".table-block")
    names = [row[0] for row in body_rows(seen.page)]
    for _ in range(20):
        table.get_by_role("button", name="Next rows").click()
        names += [row[0] for row in body_rows(seen.page)]
    assert names == [f"blocks.{i}.unit" for i in range(1001)]
    assert table.get_by_role("button", name="Next rows").is_disabled()


def test_a_tree_is_indented_until_it_is_sorted(show: Callable[..., Seen]) -> None:
    page = show(sample_document()).page
    tree = page.locator(".table-block").first
    assert tree.locator("td.in-3").count() > 0
    tree.get_by_role("button", name="Parameters").click()
    assert tree.locator("td.in-3").count() == 0


def numbers_document() -> Document:
    """Numbers where two ways of rounding could part, as cells of every numeric role."""
    values = [0.0, 0.5, 1.5, 1234.5, 2345.5, 999.95, 999.96, 0.00012345, 9.9996e-5, 1e-5]
    values += [123456.5, 999999.4, 999999.6, 1e6, 1234567.5, 9.996e9, 2.0**53, 5e-324, 1.7e308]
    values += [k / 7 for k in range(1, 40)] + [k * 0.03125 for k in range(1, 30)]
    values += [10.0**k * 2.675 for k in range(-9, 15)]
    shares = [x / 2000 for x in range(len(values))]
    shares[:6] = [0.0, 1.0, 0.0005, 0.9996, 0.0625, 0.99949]
    columns = (
        Column(name="n", title="Number", role="number"),
        Column(name="m", title="Minus", role="bar"),
        Column(name="s", title="Share", role="share"),
        Column(name="t", title="Text"),
        Column(name="i", title="Whole", role="number"),
    )
    rows = tuple(
        (x, -x, s, HOSTILE[i % len(HOSTILE)], 10**i if i < 30 else None)
        for i, (x, s) in enumerate(zip(values, shares, strict=True))
    )
    section = Section(
        id="n", title="N", summary="", blocks=(Table(title="N", columns=columns, rows=rows),)
    )
    sample = sample_document()
    return Document(
        title="N",
        subtitle="",
        created="",
        command="",
        header=sample.header,
        sections=(section,),
    )


@pytest.mark.parametrize("make", [numbers_document, sample_document, hostile_document])
def test_scripts_draw_the_same_cells_as_the_file(
    show: Callable[..., Seen], make: Callable[[], Document]
) -> None:
    plain = show(make(), java_script_enabled=False).page
    outer = "t => t.querySelector('tbody').innerHTML.replace(/\\n\\s*/g, '').split('</tr>')"
    for nth in range(plain.locator(".table-block").count()):
        drawn = plain.locator(".table-block").nth(nth).evaluate(outer)[:50]
        live = show(make()).page.locator(".table-block").nth(nth)
        sort = live.locator(".sort").first
        for _ in range(3):  # down, up and back: the rows are now the script's own
            sort.click()
        assert live.evaluate(outer)[:50] == drawn


def test_hostile_strings_are_seen_as_text(show: Callable[..., Seen]) -> None:
    seen = show(hostile_document())
    text = seen.page.locator("main").evaluate("m => m.textContent")
    for hostile in HOSTILE:
        assert visible(hostile.replace("\udc80", r"\udc80")) in text
    seen.page.locator("button.sort").first.click()
    seen.page.mouse.move(300, 300)
    assert seen.page.evaluate("document.querySelectorAll('script').length") == 2
    assert seen.page.evaluate("document.querySelectorAll('img').length") == 1
    check_quiet(seen)


@pytest.mark.parametrize("make", [sample_document, hostile_document, large_document])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(
    show: Callable[..., Seen], make: Callable[[], Document], width: int
) -> None:
    page = show(make(), width=width).page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_is_whole_without_scripts(show: Callable[..., Seen]) -> None:
    seen = show(large_document(), java_script_enabled=False)
    page = seen.page
    assert page.get_by_role("button").count() == 0
    page.get_by_text(re.compile("The other 4,800 of 5,000 rows")).click()
    assert "blocks.4999.unit" in page.locator("noscript pre").inner_text()
    check_quiet(seen)


def test_it_can_be_walked_with_the_keyboard(show: Callable[..., Seen]) -> None:
    page = show(sample_document()).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")
    page.locator("summary", has_text="How to measure this again").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.record").first.get_attribute("open") is not None
    page.locator(".sort").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort]").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_saved_data_is_the_document(show: Callable[..., Seen], tmp_path: Path) -> None:
    from patchclamp.report import read_document

    page = show(sample_document()).page
    with page.expect_download() as download:
        page.get_by_role("button", name="Save data").click()
    download.value.save_as(tmp_path / "saved.json")
    assert read_document(tmp_path / "saved.json") == sample_document()


def test_on_paper_controls_go_and_everything_is_shown(show: Callable[..., Seen]) -> None:
    page = show(sample_document(), color_scheme="dark").page
    page.emulate_media(media="print")
    assert ground(page) == "rgb(255, 255, 255)"
    assert page.locator(".controls").first.is_hidden()
    assert page.locator(".masthead").is_hidden()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".ledger details:not([open])").count() == 0


def faded(page: Page, nth: int, kind: str) -> int:
    return page.locator(".drawing").nth(nth).locator(f"{kind}.off").count()


def ends(page: Page, nth: int) -> list[tuple[int, int]]:
    """Both ends of every edge that is shown, by the numbers of the nodes."""
    return [
        tuple(pair)
        for pair in page.locator(".drawing")
        .nth(nth)
        .evaluate(
            "d => Array.from(d.querySelectorAll('.edge:not(.gone)'),"
            " e => [Number(e.dataset.from), Number(e.dataset.to)])"
        )
    ]


def reached(start: int, pairs: list[tuple[int, int]]) -> set[int]:
    seen, stack = {start}, [start]
    while stack:
        at = stack.pop()
        new = {b for a, b in pairs if a == at} - seen
        seen |= new
        stack += new
    return seen


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_pointing_at_a_node_shows_its_paths_alone(show: Callable[..., Seen], nth: int) -> None:
    seen = show(sample_document())
    page = seen.page
    drawing = page.locator(".drawing").nth(nth)
    pairs = ends(page, nth)
    total = drawing.locator(".node").count()
    for at in (0, total // 2, total - 1):
        node = drawing.locator(f"[data-node='{at}']")
        node.scroll_into_view_if_needed()
        node.hover()
        paths = reached(at, pairs) | reached(at, [(b, a) for a, b in pairs])
        assert faded(page, nth, ".node") == total - len(paths)
        lit = [p for p in pairs if p[0] in paths and p[1] in paths]
        assert faded(page, nth, ".edge") >= len(pairs) - len(lit)
        words = page.locator(".readout").nth(nth).inner_text()
        assert words == node.locator("title").evaluate("t => t.textContent.trim()")
    page.mouse.move(0, 0)
    assert faded(page, nth, ".node") == faded(page, nth, ".edge") == 0
    check_quiet(seen)


def test_pointing_at_an_edge_names_it_and_its_score(show: Callable[..., Seen]) -> None:
    page = show(sample_document()).page
    edge = page.locator(".drawing").first.locator(".edge").last  # the strongest lies on top
    edge.dispatch_event("pointerenter")
    words = page.locator(".readout").first.inner_text()
    assert re.fullmatch(r".+ \u2192 .+: \u2212?[\d.]+ logit difference", words)
    assert "off" not in (edge.get_attribute("class") or "")
    assert faded(page, 0, ".edge") > 0


def test_a_circuit_is_thinned_by_the_slider(show: Callable[..., Seen]) -> None:
    seen = show(sample_document())
    page = seen.page
    block = page.locator(".drawing-block").first
    slider = block.get_by_role("slider", name="Strongest edges")
    assert block.locator(".status").first.inner_text().startswith("40 of 40 edges")
    slider.fill("7")
    assert block.locator(".status").first.inner_text().startswith("7 of 40 edges")
    left = ends(page, 0)
    assert len(left) == 7
    sizes = block.locator(".edge").evaluate_all("es => es.map(e => Math.abs(e.dataset.score))")
    kept = block.locator(".edge:not(.gone)").evaluate_all(
        "es => es.map(e => Math.abs(e.dataset.score))"
    )
    assert sorted(kept) == sorted(sizes)[-7:]
    touched = {n for pair in left for n in pair}
    assert faded(page, 0, ".node") == block.locator(".node").count() - len(touched)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert len(ends(page, 0)) == 6
    assert "6 of 40" in (slider.get_attribute("aria-valuetext") or "")
    # Architectures have no scores, hence no slider.
    assert page.locator(".b-architecture").get_by_role("slider").count() == 0
    check_quiet(seen)


def test_a_drawing_can_be_walked_with_the_arrow_keys(show: Callable[..., Seen]) -> None:
    page = show(sample_document()).page
    drawing = page.locator(".drawing").first
    assert drawing.locator("[tabindex='0']").count() == 1

    def focused() -> tuple[str, int]:
        return tuple(  # type: ignore[return-value]  # a pair
            page.evaluate(
                "(() => { const n = document.activeElement; return"
                " [n.querySelector('title').textContent.split(' ')[0], Number(n.dataset.row)] })()"
            )
        )

    drawing.locator("[tabindex='0']").focus()
    assert focused() == ("embed", 0)
    page.keyboard.press("ArrowDown")
    assert focused() == ("embed", 0)
    page.keyboard.press("ArrowUp")
    name, row = focused()
    assert (name.startswith("attn.0.z"), row) == (True, 1)
    page.keyboard.press("ArrowRight")
    assert focused()[0] != name
    page.keyboard.press("ArrowLeft")
    assert focused() == (name, row)
    assert page.locator(".readout").first.inner_text().startswith(name)
    assert faded(page, 0, ".node") > 0
    for _ in range(10):
        page.keyboard.press("ArrowUp")
    assert focused()[0] == "logits"
    assert drawing.locator("[tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert faded(page, 0, ".node") == 0


def test_drawings_are_pictures_without_scripts(show: Callable[..., Seen]) -> None:
    seen = show(sample_document(), java_script_enabled=False)
    page = seen.page
    assert page.get_by_role("slider").count() == 0
    assert page.locator(".readout").count() == 0
    for nth in range(4):
        drawing = page.locator(".drawing").nth(nth)
        drawing.scroll_into_view_if_needed()
        assert drawing.is_visible()
        assert drawing.locator(".node").first.is_visible()
        assert drawing.locator(".off, .gone").count() == 0
    page.locator(".b-diagram summary").first.click()
    rows = page.locator(".b-diagram").first.locator(".numbers tbody tr")
    assert rows.count() == 40
    check_quiet(seen)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_a_drawing_stands_inside_its_box(show: Callable[..., Seen], scheme: str) -> None:
    page = show(sample_document(), color_scheme=scheme).page
    outside = page.evaluate(
        """() => Array.from(document.querySelectorAll('.drawing .node')).filter(node => {
          const box = node.querySelector('rect:not(.behind)').getBoundingClientRect();
          return Array.from(node.querySelectorAll('text.name, text.detail')).some(text => {
            const t = text.getBoundingClientRect();
            return t.left < box.left || t.right > box.right || t.top < box.top - 1
              || t.bottom > box.bottom + 1;
          });
        }).map(node => node.querySelector('title').textContent)"""
    )
    assert outside == []

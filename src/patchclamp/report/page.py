"""A document as one self-contained HTML page.

The page asks for nothing: style, script, pictures and data are in it, and its
content security policy forbids the rest. It is whole without scripts; with them
long tables page, sort and filter. Every string that reaches the template goes
through `prose` (by the environment's `finalize`) and is then escaped, so a
hostile name is shown, not obeyed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from patchclamp.core.document import Document, Passage
from patchclamp.core.findings import Evidence, Finding, Json, Verdict
from patchclamp.report import charts
from patchclamp.report.architecture_drawing import architecture_drawing, architecture_summary
from patchclamp.report.cells import is_numeric, table_view
from patchclamp.report.diagram_drawing import diagram_drawing, diagram_summary
from patchclamp.report.json_form import document_from_plain, plain_document
from patchclamp.report.png import png_size
from patchclamp.report.svg import swatch
from patchclamp.report.text import number, prose, shown, visible
from patchclamp.report.writing import write_whole

ROWS_DRAWN = 200
BARS_OPEN = 60
LEDGER_OPEN = 8
PICTURE_SIDE = 72
PICTURE_MOST = 160

_TEMPLATES = Path(__file__).with_name("templates")
_STYLES = ("colours.css", "style.css", "drawing.css")
_LEVELS = {
    Evidence.OBSERVED: "A statistic over what was recorded. It says what happened on these "
    "inputs, not why.",
    Evidence.INTERVENED: "The network was changed and the effect compared with a matched change "
    "that should not matter.",
    Evidence.VALIDATED: "Found by a method that recovers planted truth on networks of this kind "
    "and fails on the negative controls.",
    Evidence.CERTIFIED: "Proved for every input, activation or weight in a stated set.",
}

_PLURAL = {
    Verdict.HOLDS: "hold",
    Verdict.DOES_NOT_HOLD: "do not hold",
    Verdict.UNKNOWN: "unknown",
}


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the ledger and the findings that reached it."""

    evidence: Evidence
    rank: int
    meaning: str
    findings: tuple[Finding, ...]


def render(document: Document) -> str:
    """The page as text; the same document gives the same page.

    Raises: DataError if the document contradicts itself, OutputError if it holds
    what JSON cannot.
    """
    data = plain_document(document)
    document = document_from_plain(data)  # so that a page and its data never differ
    style = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _STYLES)
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    finding_anchors = _anchors("f", (finding.id for finding in document.findings))
    section_anchors = _anchors("s", (section.id for section in document.sections))
    return (
        _environment()
        .get_template("page.html")
        .render(
            document=document,
            levels=_ledger(document.findings),
            anchor=finding_anchors.__getitem__,
            section_anchor=section_anchors.__getitem__,
            policy=_policy(style, script),
            style=Markup(style),
            script=Markup(script),
            data=_embedded(data),
        )
    )


def write_page(document: Document, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all. Raises: as `render`; OutputError."""
    write_whole(path, render(document).encode("utf-8"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        plural=_PLURAL,
        count=_count_verdicts,
        charts=charts,
        table_view=table_view,
        is_numeric=is_numeric,
        architecture_drawing=architecture_drawing,
        architecture_summary=architecture_summary,
        diagram_drawing=diagram_drawing,
        diagram_summary=diagram_summary,
        swatch=swatch,
        picture_size=picture_size,
        passage=_passage,
        rows_drawn=ROWS_DRAWN,
        bars_open=BARS_OPEN,
        ledger_open=LEDGER_OPEN,
    )
    environment.filters.update(number=number, shown=shown, json=_one_line, percent=_percent)
    return environment


def _finalize(value: object) -> object:
    """What every `{{ }}` passes before it is escaped; markup is already safe."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return prose(value)
    return value


def _policy(style: str, script: str) -> str:
    """Nothing may load or run but this style, this script and pictures in the page."""
    return (
        f"default-src 'none'; style-src '{_source_hash(style)}'; "
        f"script-src '{_source_hash(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _embedded(data: dict[str, Json]) -> Markup:
    """JSON for a script element: ASCII, with nothing in it that could end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # U+2028 and U+2029 are escaped as all that is not ASCII
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _anchors(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """A distinct fragment for each name, readable where the name is."""
    anchors: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")[:80] or "x"
        anchor, again = f"{prefix}-{plain}", 2
        while anchor in taken:
            anchor, again = f"{prefix}-{plain}-{again}", again + 1
        taken.add(anchor)
        anchors[name] = anchor
    return anchors


def _ledger(findings: tuple[Finding, ...]) -> tuple[Level, ...]:
    """All four levels, strongest first, those without findings too."""
    levels = [
        Level(
            evidence=evidence,
            rank=rank,
            meaning=_LEVELS[evidence],
            findings=tuple(f for f in findings if f.evidence is evidence),
        )
        for rank, evidence in enumerate(Evidence, start=1)
    ]
    return tuple(reversed(levels))


def _count_verdicts(findings: Iterable[Finding]) -> list[tuple[Verdict, int]]:
    """How many findings have each verdict that occurs."""
    counts = Counter(finding.verdict for finding in findings)
    return [(verdict, counts[verdict]) for verdict in Verdict if counts[verdict]]


def picture_size(png_base64: str) -> tuple[int, int, bool]:
    """Width and height on the page, and whether pixels keep their edges.

    A small picture is enlarged by a whole number, which keeps its pixels square
    and even; a large one is made smaller, smoothly.
    """
    size = png_size(png_base64)
    assert size is not None  # the document was checked
    longest = max(size)
    if longest > PICTURE_MOST:
        width, height = (max(1, round(side * PICTURE_MOST / longest)) for side in size)
        return width, height, False
    scale = max(1, PICTURE_SIDE // longest)
    return size[0] * scale, size[1] * scale, True


def _passage(passage: Passage) -> Markup:
    """The tokens of a passage, tinted and underlined by strength, its focus boxed."""
    most = max((abs(s) for s in passage.strengths), default=0.0)
    parts = []
    for i, (token, strength) in enumerate(zip(passage.tokens, passage.strengths, strict=True)):
        degree = round(8 * abs(strength) / most) if most > 0 else 0
        kind = f"{'m' if strength < 0 else 'p'}{degree}" if degree else ""
        kind += " focus" if i == passage.focus else ""
        tag = "mark" if i == passage.focus else "span"
        parts.append(
            Markup('<{tag}{kind} title="{strength}">{token}</{tag}>').format(
                tag=tag,
                kind=Markup(' class="{}"').format(kind.strip()) if kind else "",
                strength=number(strength),
                token=_token(token),
            )
        )
    return Markup().join(parts)


def _token(token: str) -> Markup:
    """A token with its white space on show; a line break also breaks the line."""
    parts = []
    for piece in re.split(r"(\n| )", token):
        if piece == " ":
            parts.append(Markup('<i class="ws">\u00b7</i><wbr>'))
        elif piece == "\n":
            parts.append(Markup('<i class="ws">\u23ce</i><br>'))
        else:
            parts.append(shown(piece))
    return Markup().join(parts) if token else Markup('<i class="ws">\u2205</i>')


def _one_line(value: Json) -> str:
    return visible(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _percent(level: float) -> str:
    return f"{level * 100:g}%"

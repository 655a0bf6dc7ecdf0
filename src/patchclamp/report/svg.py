"""Line drawings as SVG, for a page and as files of their own.

On the page a drawing takes its colours from the page's style sheet; as a file it
carries the same rules with it. Every name goes through `shown`, so that it is text
whatever is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from patchclamp.report.text import shown, visible

LINE = 18  # pixels from one line of text to the next
_MARGIN = 16
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Markup in a space of its own.

    Attributes:
        parts: what is drawn, the lowest first.
        width, height: in pixels.
        label: what it is, for those who cannot see it.
        legend: a line's class in the style sheet, and what it stands for.
    """

    parts: Sequence[Markup]
    width: float
    height: float
    label: str
    legend: Sequence[tuple[str, str]] = ()

    def inline(self) -> Markup:
        """The drawing as an element of a page."""
        return Markup(
            '<svg class="drawing" width="{w:g}" height="{h:g}" viewBox="0 0 {w:g} {h:g}" '
            'role="group" aria-label="{label}">{parts}</svg>'
        ).format(
            w=self.width, h=self.height, label=visible(self.label), parts=Markup().join(self.parts)
        )

    def alone(self, title: str, lines: Sequence[str]) -> str:
        """The drawing as a file, under its title, some lines of text and its legend."""
        style = "".join(
            (_TEMPLATES / name).read_text(encoding="utf-8")
            for name in ("colours.css", "drawing.css")
        )
        texts = [("heading", title), *(("words", line) for line in lines)]
        y = float(_MARGIN)
        parts = []
        for kind, text in texts:
            y += LINE
            parts.append(
                Markup('<text class="{}" x="{}" y="{:g}">{}</text>').format(
                    kind, _MARGIN, y, shown(text)
                )
            )
        for kind, text in self.legend:
            y += LINE
            parts.append(
                Markup(
                    '<g transform="translate({} {:g})">{}<text x="30" y="11">{}</text></g>'
                ).format(_MARGIN, y - 11, swatch(kind), shown(text))
            )
        longest = max(len(text) for _, text in (*texts, *self.legend))
        width = 2 * _MARGIN + max(self.width, 7.5 * longest)
        y += LINE
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" class="alone drawing" width="{w:g}" '
            'height="{h:g}" viewBox="0 0 {w:g} {h:g}"><style>{style}</style>'
            '<rect class="ground" width="100%" height="100%"/>{parts}'
            '<g transform="translate({m} {y:g})">{inner}</g></svg>\n'
        ).format(
            w=width,
            h=y + self.height + _MARGIN,
            style=Markup(style),
            parts=Markup().join(parts),
            m=_MARGIN,
            y=y,
            inner=Markup().join(self.parts),
        )


def swatch(kind: str) -> Markup:
    """A short line, as the legend shows it."""
    return Markup('<line class="swatch {}" x1="1" x2="23" y1="6" y2="6"/>').format(kind)


def text_at(kind: str, x: float, y: float, text: str) -> Markup:
    """One line of text; `text` is a name from anywhere."""
    return Markup('<text class="{}" x="{:g}" y="{:g}">{}</text>').format(kind, x, y, shown(text))


def clipped(text: str, most: int) -> str:
    """Text of at most so many characters, the middle left out: both ends of a name tell."""
    text = visible(text)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}\u2026{text[head + 1 - most :]}"


def curve(
    start: tuple[float, float],
    bands: Sequence[tuple[float, float, float]],
    end: tuple[float, float],
) -> str:
    """Path data from `start` up to `end`, straight through the bands (x, from, to) between."""
    x, y = start
    data = [f"M{x:g} {y:g}"]
    for band_x, low, high in (*bands, (*end, end[1])):
        # A line that leads down or sideways leaves upwards all the same, in a loop.
        reach = (y - low) / 2 if y > low else 36.0
        data.append(f"C{x:g} {y - reach:g} {band_x:g} {low + reach:g} {band_x:g} {low:g}")
        if high != low:
            data.append(f"V{high:g}")
        x, y = band_x, high
    return "".join(data)

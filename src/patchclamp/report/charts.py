"""Charts as inline SVG: intervals, bars, histograms and curves.

Every value is also on the page as text, so a chart is never the only place
where a number stands. Colours are classes, which the style sheet sets for the
light and the dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from markupsafe import Markup

from patchclamp.core.document import Bars, Curve, Histogram
from patchclamp.core.findings import Finding
from patchclamp.report.scale import Scale
from patchclamp.report.text import number, visible

_PLOT_HEIGHT = 220
_ROW_HEIGHT = 20


def interval_strip(finding: Finding) -> Markup:
    """The effect and its interval on an axis, over the shaded range of the null."""
    effect, interval, null = finding.effect, finding.interval, finding.null
    if effect is None or (interval is None and null is None):
        return Markup()
    values = [effect]
    if interval is not None:
        values += [interval.low, interval.high]
    if null is not None:
        values += [x for x in (null.mean, null.low, null.high) if x is not None]
    scale = _with_zero_if_near(Scale.around(values, pad=0.06))
    parts = [_line("axis", scale.low, scale.high, 32, scale)]
    if null is not None:
        if null.low is not None and null.high is not None:
            parts.append(_span("null", null.low, null.high, 4, 28, scale))
        parts.append(_upright("null-mean", null.mean, 4, 32, scale))
    if scale.holds(0.0):
        parts.append(_upright("zero", 0.0, 2, 32, scale))
    if interval is not None:
        parts.append(_line("whisker", interval.low, interval.high, 18, scale))
        parts += [_upright("whisker", x, 12, 24, scale) for x in (interval.low, interval.high)]
    parts.append(_dot("effect", effect, 18, 5, scale))
    parts += _tick_labels(scale, 46, 4)
    return _svg("strip", 50, parts, label=_strip_label(finding))


def bar_rows(bars: Bars) -> list[tuple[str, Markup, Markup]]:
    """For each bar its label, its drawing and its value as text."""
    scale = bars_scale(bars)
    rows = []
    for i, label in enumerate(bars.labels):
        value = bars.values[i]
        middle = _ROW_HEIGHT / 2
        parts = []
        if bars.null_low:
            parts.append(_span("null", bars.null_low[i], bars.null_high[i], 0, _ROW_HEIGHT, scale))
        sign = "bar below" if value < 0 else "bar"
        parts.append(_span(sign, min(0, value), max(0, value), 5, _ROW_HEIGHT - 5, scale))
        parts.append(_upright("zero", 0.0, 0, _ROW_HEIGHT, scale))
        text = Markup("<b>{}</b>").format(number(value))
        if bars.low:
            ends = (bars.low[i], bars.high[i])
            parts.append(_line("whisker", *ends, middle, scale))
            parts += [_upright("whisker", x, middle - 4, middle + 4, scale) for x in ends]
            text += Markup(" <small>[{}, {}]</small>").format(*map(number, ends))
        rows.append((label, _svg("track", _ROW_HEIGHT, parts), text))
    return rows


def bars_axis(bars: Bars) -> Markup:
    """The axis that stands under the rows of `bar_rows`."""
    scale = bars_scale(bars)
    parts = [_line("axis", scale.low, scale.high, 1, scale)]
    return _svg("track", 20, parts + _tick_labels(scale, 15, 5))


def bars_scale(bars: Bars) -> Scale:
    """One axis for all bars, zero included."""
    ranges = (bars.values, bars.low, bars.high, bars.null_low, bars.null_high)
    return Scale.around([0.0, *(x for values in ranges for x in values)], pad=0.02)


def histogram_plot(histogram: Histogram) -> Markup:
    """Counts over their edges, with both axes."""
    if not histogram.counts:
        return Markup()
    across = Scale(low=histogram.edges[0], high=histogram.edges[-1])
    up = Scale(low=0.0, high=float(max(histogram.counts)) or 1.0)
    parts = [_grid(y, up) for y in up.ticks(5)]
    for (left, right), count in zip(pairwise(histogram.edges), histogram.counts, strict=True):
        top = _height(count, up)
        parts.append(_span("bar column", left, right, top, _PLOT_HEIGHT, across))
    most = max(range(len(histogram.counts)), key=histogram.counts.__getitem__)
    label = (
        f"{histogram.title}: histogram of {sum(histogram.counts):,} values from "
        f"{number(histogram.edges[0])} to {number(histogram.edges[-1])} {histogram.unit}, most of "
        f"them between {number(histogram.edges[most])} and {number(histogram.edges[most + 1])}"
    )
    return _plot(parts, across, up, label)


def curve_plot(curve: Curve) -> Markup:
    """Points with intervals, joined by a line, against the diagonal where one is asked for."""
    if not curve.x:
        return Markup()
    heights = [*curve.y, *curve.low, *curve.high]
    across = Scale.around(curve.x, pad=0.04)
    up = Scale.around(heights, pad=0.04)
    if curve.diagonal:
        both = [*curve.x, *heights]
        unit = all(0 <= v <= 1 for v in both)
        across = up = Scale(low=0.0, high=1.0) if unit else Scale.around(both, pad=0.04)
    parts = [_grid(y, up) for y in up.ticks(5)]
    if curve.diagonal:
        parts.append(_segment("diagonal", (up.low, up.low), (up.high, up.high), across, up))
    points = list(zip(curve.x, curve.y, strict=True))
    parts += [_segment("curve", a, b, across, up) for a, b in pairwise(points)]
    for x, low, high in zip(curve.x, curve.low, curve.high, strict=False):
        parts.append(_upright("whisker", x, _height(high, up), _height(low, up), across))
    most = max(curve.weight, default=0.0)
    for i, (x, y) in enumerate(points):
        # The area of a point is its weight; a point of no weight stays visible.
        radius = 2.5 + 5.5 * (curve.weight[i] / most) ** 0.5 if most > 0 else 4.0
        parts.append(_dot("point", x, _height(y, up), radius, across))
    label = (
        f"{curve.title}: {len(curve.x)} points, {curve.y_title} from {number(min(curve.y))} to "
        f"{number(max(curve.y))} over {curve.x_title} from {number(min(curve.x))} to "
        f"{number(max(curve.x))}"
    )
    return _plot(parts, across, up, label)


def cell_bar(low: float, high: float, scale: Scale) -> Markup:
    """The small bar in a table cell."""
    kind = "bar below" if low < 0 else "bar"
    return _svg("cell-bar", 10, [_span(kind, low, high, 0, 10, scale)])


def _with_zero_if_near(scale: Scale) -> Scale:
    """Zero belongs on the axis of an effect unless it would squeeze what there is to see."""
    length = scale.high - scale.low
    if scale.low > 0 and scale.low <= length:
        return Scale(low=-0.03 * scale.high, high=scale.high)
    if scale.high < 0 and -scale.high <= length:
        return Scale(low=scale.low, high=-0.03 * scale.low)
    return scale


def _strip_label(finding: Finding) -> str:
    text = f"effect {number(finding.effect)} {finding.unit}"
    if finding.interval is not None:
        text += f", interval {number(finding.interval.low)} to {number(finding.interval.high)}"
    if finding.null is not None:
        text += f", null mean {number(finding.null.mean)}"
        if finding.null.low is not None and finding.null.high is not None:
            text += f", null range {number(finding.null.low)} to {number(finding.null.high)}"
    return text


def _plot(parts: Iterable[Markup], across: Scale, up: Scale, label: str) -> Markup:
    """A drawing with tick labels at its left and below it, in three SVGs of one grid."""
    left = [
        Markup('<text class="tick right" x="100%" y="{:g}">{}</text>').format(
            min(max(_height(y, up) + 4, 10), _PLOT_HEIGHT), number(y)
        )
        for y in up.ticks(5)
    ]
    return Markup('<div class="plot">{}{}{}</div>').format(
        _svg("plot-left", _PLOT_HEIGHT, left),
        _svg("plot-field", _PLOT_HEIGHT, parts, label=label),
        _svg("plot-below", 18, _tick_labels(across, 14, 5)),
    )


def _svg(kind: str, height: float, parts: Iterable[Markup], label: str = "") -> Markup:
    # A drawing without a label repeats the text beside it.
    role = (
        Markup('role="img" aria-label="{}"').format(visible(label))
        if label
        else Markup('aria-hidden="true"')
    )
    return Markup('<svg class="{}" width="100%" height="{:g}" {}>{}</svg>').format(
        kind, height, role, Markup().join(parts)
    )


def _tick_labels(scale: Scale, y: float, num: int) -> list[Markup]:
    ticks = scale.ticks(num)
    return [
        Markup('<text class="tick{}" x="{:.2f}%" y="{:g}">{}</text>').format(
            _anchor(scale.percent(x)), scale.percent(x), y, number(x)
        )
        for x in ticks
    ]


def _anchor(percent: float) -> str:
    """Labels at the ends of an axis grow inwards, so that none is cut off."""
    return " left" if percent < 4 else " right" if percent > 96 else ""


def _span(kind: str, low: float, high: float, top: float, foot: float, scale: Scale) -> Markup:
    left, right = scale.percent(low), scale.percent(high)
    return Markup(
        '<rect class="{}" x="{:.2f}%" y="{:.4g}" width="{:.2f}%" height="{:.4g}"/>'
    ).format(kind, left, top, right - left, max(foot - top, 0))


def _line(kind: str, low: float, high: float, y: float, scale: Scale) -> Markup:
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:g}" y2="{:g}"/>').format(
        kind, scale.percent(low), scale.percent(high), y, y
    )


def _upright(kind: str, x: float, top: float, foot: float, scale: Scale) -> Markup:
    place = scale.percent(x)
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.4g}" y2="{:.4g}"/>').format(
        kind, place, place, top, foot
    )


def _segment(kind: str, a: Sequence[float], b: Sequence[float], across: Scale, up: Scale) -> Markup:
    return Markup('<line class="{}" x1="{:.2f}%" y1="{:.4g}" x2="{:.2f}%" y2="{:.4g}"/>').format(
        kind, across.percent(a[0]), _height(a[1], up), across.percent(b[0]), _height(b[1], up)
    )


def _dot(kind: str, x: float, y: float, radius: float, scale: Scale) -> Markup:
    return Markup('<circle class="{}" cx="{:.2f}%" cy="{:.4g}" r="{:.3g}"/>').format(
        kind, scale.percent(x), y, radius
    )


def _grid(y: float, up: Scale) -> Markup:
    height = _height(y, up)
    return Markup('<line class="grid" x1="0" x2="100%" y1="{:.4g}" y2="{:.4g}"/>').format(
        height, height
    )


def _height(y: float, up: Scale) -> float:
    """Pixels from the top of a plot."""
    return _PLOT_HEIGHT * (1 - up.percent(y) / 100)

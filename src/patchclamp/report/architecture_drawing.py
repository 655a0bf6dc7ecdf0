"""Neural circuit diagrams as SVG: a strand for every axis of every value.

Boxes are operators, one row for what can run at the same time; a wire is as many
strands as its value has axes, each with its name and size. A strand that passes a box
at its left is an axis that the box is applied over; a dashed strand is an axis along
which the reader repeats the value. Linear maps have a double edge. A frame holds what
the network does several times. Source: Abbott 2024.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from markupsafe import Markup

from patchclamp.core.document import Architecture, Box, Frame, Wire
from patchclamp.report.layered import Gaps, depths, ordered, spread
from patchclamp.report.svg import Drawing, clipped, curve, text_at
from patchclamp.report.text import number, visible

_LINE, _STRAND, _PORT = 15.0, 4.0, 120.0  # pixels between lines, strands, values of a box
_TURN = 46.0  # height in which wires change their place
_NAME_MOST, _AXIS_MOST = 36, 22
_NUM_COLOURS = 6  # of axes, in the style sheet

Band: TypeAlias = tuple[float, float, float]
"""Where a wire runs straight up: its place, from, to."""


def architecture_svg(architecture: Architecture) -> str:
    """The diagram as an SVG file that needs nothing else."""
    drawing = architecture_drawing(architecture)
    return drawing.alone(architecture.title, [architecture_summary(architecture)])


def architecture_summary(architecture: Architecture) -> str:
    """What is drawn, in words."""
    num = sum(len(box.operations) for box in architecture.boxes)
    parts = sum(1 for box in architecture.boxes if box.operations)
    return f"{num:,} operators in {parts:,} boxes, the input at the bottom."


def architecture_drawing(architecture: Architecture) -> Drawing:
    """The picture of an architecture."""
    layout = _Layout(architecture)
    parts = [
        *(layout.frame(frame) for frame in architecture.frames),
        *(layout.wire(wire) for wire in architecture.wires),
        *(layout.axes(wire) for wire in layout.firsts),
        *(layout.box(box) for box in architecture.boxes),
    ]
    left, right = layout.sides()
    shifted = Markup('<g transform="translate({:g})">{}</g>').format(-left, Markup().join(parts))
    return Drawing(
        parts=[shifted],
        width=right - left,
        height=layout.height,
        label=f"{architecture.title}: {architecture_summary(architecture)}",
        legend=_legend(architecture, layout.colours),
    )


class _Layout:
    """Where everything stands; makes the parts of one drawing."""

    def __init__(self, architecture: Architecture) -> None:
        self.boxes = {box.id: box for box in architecture.boxes}
        self.wires = architecture.wires
        self.number = {name: i for i, name in enumerate(self.boxes)}
        self.colours = _colours(architecture)
        values = {(wire.source, wire.value): wire for wire in reversed(self.wires)}
        self.firsts = list(reversed(values.values()))
        self.ports: dict[str, list[str]] = {name: [] for name in self.boxes}
        for wire in self.firsts:
            self.ports[wire.source].append(wire.value)
        self.texts = {name: _texts(box) for name, box in self.boxes.items()}
        self.size = {name: self._size(name) for name in self.boxes}
        links = [(wire.source, wire.target) for wire in self.wires]
        self.row = _rows(architecture, links)
        rows = [
            [name for name in self.boxes if self.row[name] == row]
            for row in range(max(self.row.values(), default=-1) + 1)
        ]
        self.rows = ordered(rows, links, [True] * len(rows))
        self.x = spread(self.rows, {n: self._room(n) for n in self.boxes}, links, 20.0)
        self.y, self.height = self._heights()
        self.bends = self._route()
        self.frames = {
            frame.id: self._frame_of(frame, architecture) for frame in architecture.frames
        }

    def _size(self, name: str) -> tuple[float, float]:
        longest = max(len(text) for text in self.texts[name])
        wide = max(7.2 * longest + 24, 84.0, _PORT * len(self.ports[name]) - 40)
        return wide, _LINE * len(self.texts[name]) + 14

    def _room(self, name: str) -> float:
        """Width with the axes written beside the strand above the box."""
        written = [_axis_lines(w) for w in self.firsts if w.source == name]
        longest = max((len(line) for lines in written for line in lines), default=0)
        last = _PORT * (len(self.ports[name]) - 1) / 2
        return max(self.size[name][0] + 24, 2 * (last + 20 + 6.4 * longest))

    def _above(self, row: int) -> float:
        """Height over a row in which strands run straight, beside the names of their axes."""
        written = [len(w.axes) for w in self.firsts if self.row[w.source] == row]
        return 13.0 * max(written, default=0) + 6

    def _heights(self) -> tuple[dict[str, float], float]:
        """Centres of the boxes from the top, and the height of all."""
        tall = [max(self.size[name][1] for name in row) for row in self.rows]
        height = sum(tall) + sum(self._above(row) + _TURN for row in range(len(self.rows)))
        y: dict[str, float] = {}
        foot = height - 16
        for row, names in enumerate(self.rows):
            y |= dict.fromkeys(names, foot - tall[row] / 2)
            foot -= tall[row] + self._above(row) + _TURN
        return y, height

    def _route(self) -> dict[Wire, list[Band]]:
        """Ways past the boxes of the rows between; each value keeps to one lane of its own."""
        lanes: dict[str, float] = {}
        spans = [
            [
                (self.x[n] - self.size[n][0] / 2 - 26, self.x[n] + self.size[n][0] / 2 + 16)
                for n in r
            ]
            for r in self.rows
        ]
        found: dict[Wire, list[Band]] = {}
        # The longest way of a value first, so that its other readers find the lane laid.
        for wire in sorted(self.wires, key=lambda w: self.row[w.source] - self.row[w.target]):
            rows = range(self.row[wire.source] + 1, self.row[wire.target])
            x, y = self._start(wire)
            bands = [(x, y, y - self._above(self.row[wire.source]))]
            if rows:
                if wire.value not in lanes:
                    taken = Gaps.of(span for row in rows for span in spans[row])
                    lanes[wire.value] = taken.nearest((x + self._end(wire)[0]) / 2)
                    for row in rows:
                        spans[row].append((lanes[wire.value] - 18, lanes[wire.value] + 18))
                half = [max(self.size[n][1] for n in names) / 2 for names in self.rows]
                middle = [self.y[names[0]] for names in self.rows]
                low = middle[rows[0]] + half[rows[0]] + 4
                high = middle[rows[-1]] - half[rows[-1]] - self._above(rows[-1])
                bands.append((lanes[wire.value], low, high))
            found[wire] = bands
        return found

    def _start(self, wire: Wire) -> tuple[float, float]:
        ports = self.ports[wire.source]
        aside = _PORT * (ports.index(wire.value) - (len(ports) - 1) / 2)
        return self.x[wire.source] + aside, self.y[wire.source] - self.size[wire.source][1] / 2

    def _end(self, wire: Wire) -> tuple[float, float]:
        """Wires come in side by side, in the order of what they come from."""
        wires = sorted((w for w in self.wires if w.target == wire.target), key=self._start)
        wide, high = self.size[wire.target]
        step = min(34.0, (wide - 24) / max(len(wires), 1))
        aside = step * (wires.index(wire) - (len(wires) - 1) / 2)
        return self.x[wire.target] + aside, self.y[wire.target] + high / 2

    def _frame_of(
        self, frame: Frame, architecture: Architecture
    ) -> tuple[float, float, float, float]:
        """Left, top, right and foot around all that is in the frame."""
        within = {frame.id}
        for other in architecture.frames:  # a frame stands after the one around it
            if other.inside in within:
                within.add(other.id)
        members = [name for name, box in self.boxes.items() if box.frame in within]
        pad = 22.0 + 12 * (len(within) - 1)
        sides = [self.x[n] + side * self.size[n][0] / 2 for n in members for side in (-1, 1)]
        for wire in self.wires:
            if wire.target in members:  # the ways of values within the frame belong into it
                sides += [x for x, _, _ in self.bends[wire][1:]]
        tops = [
            self.y[n] - self.size[n][1] / 2 - (self._above(self.row[n]) if self.ports[n] else 0)
            for n in members
        ]
        feet = [self.y[n] + self.size[n][1] / 2 for n in members]
        left, right = min(sides) - pad, max(sides) + pad
        left = min(left, (left + right) / 2 - 7.2 * len(_frame_name(frame)) - 24)
        return left, min(tops) - pad, right, max(feet) + min(pad, 34.0)

    def sides(self) -> tuple[float, float]:
        """How far the drawing goes to the left and to the right."""
        sides = [self.x[n] + side * self._room(n) / 2 for n in self.boxes for side in (-1, 1)]
        sides += [bend[0] for bends in self.bends.values() for bend in bends]
        sides += [side for box in self.frames.values() for side in (box[0], box[2])]
        return min(sides, default=0.0) - 12, max(sides, default=0.0) + 12

    def frame(self, frame: Frame) -> Markup:
        """A dashed outline with its words at the top."""
        left, top, right, foot = self.frames[frame.id]
        return Markup(
            '<g class="frame"><title>{}</title>'
            '<rect x="{:g}" y="{:g}" width="{:g}" height="{:g}" rx="10"/>{}</g>'
        ).format(
            visible(f"{frame.times} identical parts: {frame.label}"),
            left,
            top,
            right - left,
            foot - top,
            text_at("frame-name", left + 10, top + 17, _frame_name(frame)),
        )

    def wire(self, wire: Wire) -> Markup:
        """A strand for each axis, and dashed ones for the axes that the reader adds."""
        axes = [*((name, False) for name in wire.axes), *((name, True) for name in wire.broadcast)]
        strands = []
        for i, (name, repeated) in enumerate(axes or [("", False)]):
            aside = _STRAND * (i - (max(len(axes), 1) - 1) / 2)
            (x, y), (u, v) = self._start(wire), self._end(wire)
            bends = [(bend + aside, low, high) for bend, low, high in self.bends[wire]]
            strands.append(
                Markup('<path class="strand {}{}" d="{}"/>').format(
                    self._colour(name),
                    " repeated" if repeated else "",
                    curve((x + aside, y), bends, (u + aside, v)),
                )
            )
        words = f"{wire.value}: {', '.join(_axis_lines(wire)) or 'one number'}"
        if wire.broadcast:
            words += f"; repeated along {', '.join(wire.broadcast)}"
        return Markup('<g class="edge" data-from="{}" data-to="{}"><title>{}</title>{}</g>').format(
            self.number[wire.source],
            self.number[wire.target],
            visible(words),
            Markup().join(strands),
        )

    def axes(self, wire: Wire) -> Markup:
        """Names and sizes of a value's axes, beside its strands."""
        x, y = self._start(wire)
        lines = _axis_lines(wire)
        aside = x + 8 + _STRAND * len(lines) / 2
        return Markup().join(
            text_at("axis-name", aside, y - 8 - 13 * (len(lines) - 1 - i), line)
            for i, line in enumerate(lines)
        )

    def box(self, box: Box) -> Markup:
        """The box with its words, and at its left the axes that it is applied over."""
        x, y, (wide, high) = self.x[box.id], self.y[box.id], self.size[box.id]
        left, top = x - wide / 2, y - high / 2
        parts = [
            Markup(
                '<rect class="behind" x="{:g}" y="{:g}" width="{:g}" height="{:g}" rx="5"/>'
            ).format(left + 4 * i, top + 4 * i, wide, high)
            for i in ((2, 1) if box.times > 1 else ())
        ]
        insets = (0.0, 3.5) if box.linear else (0.0,)
        parts += [
            Markup('<rect x="{:g}" y="{:g}" width="{:g}" height="{:g}" rx="{:g}"/>').format(
                left + d, top + d, wide - 2 * d, high - 2 * d, 5 - d / 2
            )
            for d in insets
        ]
        for i, name in enumerate(box.over or ()):
            parts.append(
                Markup(
                    '<line class="strand {}" x1="{x:g}" x2="{x:g}" y1="{:g}" y2="{:g}"/>'
                ).format(self._colour(name), top - 4, top + high + 4, x=left - 6 - _STRAND * i)
            )
        for i, text in enumerate(self.texts[box.id]):
            kind = "name" if i == 0 else "detail"
            parts.append(text_at(kind, x, top + _LINE * (i + 1) + 3, text))
        return Markup(
            '<g class="node kind-{}" data-node="{}" data-row="{}" role="img">'
            "<title>{}</title>{}</g>"
        ).format(
            box.kind,
            self.number[box.id],
            self.row[box.id],
            visible(_words(box)),
            Markup().join(parts),
        )

    def _colour(self, name: str) -> str:
        return f"colour-{self.colours[name]}" if name in self.colours else "colour-other"


def _rows(architecture: Architecture, links: Sequence[tuple[str, str]]) -> dict[str, int]:
    """What can run at the same time shares a row; what needs nothing runs when it is needed."""
    row = depths([box.id for box in architecture.boxes], links)
    reads = {target for _, target in links}
    for box in architecture.boxes:
        users = [row[target] for source, target in links if source == box.id]
        if box.id not in reads and box.kind != "input" and users:
            row[box.id] = max(0, min(users) - 1)
    return row


def _frame_name(frame: Frame) -> str:
    return clipped(f"\u00d7 {frame.times} identical: {frame.label}", _NAME_MOST + 6)


def _texts(box: Box) -> list[str]:
    """The lines in a box."""
    texts = [clipped(box.label, _NAME_MOST)]
    if box.times > 1:
        texts.append(f"\u00d7 {box.times} identical")
    facts = []
    if box.linear:
        facts.append("linear map")
    if len(box.operations) > 1 and box.kind == "module":
        facts.append(f"{len(box.operations):,} operators")
    if box.num_weights:
        facts.append(f"{number(box.num_weights)} weights")
    if facts:
        texts.append(", ".join(facts))
    if box.over:
        texts.append(clipped(f"for each {', '.join(box.over)}", _NAME_MOST + 4))
    return texts


def _words(box: Box) -> str:
    """All that is known of a box, in one line."""
    words = [box.label, *_texts(box)[1:]]
    if box.operations and box.over is None:
        words.append("not known along which axes it is applied")
    if box.operations:
        words.append("operators: " + ", ".join(box.operations[:6]))
        if len(box.operations) > 6:
            words[-1] += f" and {len(box.operations) - 6:,} more"
    return " \u00b7 ".join(words)


def _axis_lines(wire: Wire) -> list[str]:
    return [
        clipped(name if name == size else f"{name} {size}", _AXIS_MOST)
        for name, size in zip(wire.axes, wire.sizes, strict=True)
    ]


def _colours(architecture: Architecture) -> Mapping[str, int]:
    """A colour for each of the commonest axis names; the others share a grey."""
    names = Counter(name for wire in architecture.wires for name in (*wire.axes, *wire.broadcast))
    return {name: i for i, (name, _) in enumerate(names.most_common(_NUM_COLOURS))}


def _legend(architecture: Architecture, colours: Mapping[str, int]) -> list[tuple[str, str]]:
    legend = [(f"strand colour-{i}", name) for name, i in colours.items()]
    if any(box.over for box in architecture.boxes):
        legend.append(("strand upright", "left of a box: done for each index of the axis"))
    if any(wire.broadcast for wire in architecture.wires):
        legend.append(("strand repeated", "axis along which a value is repeated"))
    if any(box.linear for box in architecture.boxes):
        legend.append(("double", "linear map, up to a constant"))
    return legend

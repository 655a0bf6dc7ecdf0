"""A circuit's diagram as SVG: nodes in rows, edges around what is between.

The width of an edge is the size of its score, its colour the sign; edges enter a head
at its q, k or v. It draws plain data only; `circuit_drawing` makes that of a circuit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from patchclamp.core.document import Diagram, DiagramEdge, DiagramNode
from patchclamp.report.layered import Gaps, spread
from patchclamp.report.svg import Drawing, clipped, curve, text_at
from patchclamp.report.text import number, visible

_SLOTS = ("q", "k", "v")
_PITCH, _HALF = 84.0, 13.0  # pixels from row to row, and half the height of a node
_NUM_COLOURS = 6  # of groups, in the style sheet


def diagram_drawing(diagram: Diagram) -> Drawing:
    """The picture of a diagram."""
    rows: list[list[str]] = [[] for _ in diagram.rows]
    for node in sorted(diagram.nodes, key=lambda n: n.column):
        rows[node.row].append(node.id)
    widths = {n.id: max(36.0, 8.0 * len(clipped(n.label, 24)) + 14) for n in diagram.nodes}
    links = [(edge.source, edge.target) for edge in diagram.edges]
    gutter = 14 + 7.0 * max((len(clipped(name, 18)) for name in diagram.rows), default=0)
    x = {name: gutter + 12 + at for name, at in spread(rows, widths, links, 22.0).items()}
    height = len(rows) * _PITCH
    y = [height - (row + 0.5) * _PITCH for row in range(len(rows))]
    canvas = _Canvas(diagram=diagram, rows=rows, widths=widths, x=x, y=y)
    width = max((x[n] + widths[n] / 2 for n in x), default=gutter)
    width = max(width, canvas.reach()) + 12
    names = [
        text_at("row-name", 0, at + 4, clipped(name, 18))
        for name, at in zip(diagram.rows, y, strict=True)
    ]
    return Drawing(
        parts=[*names, *canvas.edges(), *canvas.nodes()],
        width=width,
        height=height,
        label=f"{diagram.title}: {' '.join(diagram_summary(diagram))}",
        legend=_legend(diagram),
    )


def diagram_summary(diagram: Diagram) -> list[str]:
    """What is drawn and what is not, in words."""
    scored = [e for e in diagram.edges if e.score is not None]
    text = [f"{len(diagram.nodes):,} nodes and {len(scored):,} edges, the input at the bottom."]
    if diagram.num_edges_left_out:
        least = min((abs(e.score) for e in scored if e.score is not None), default=0.0)
        left = f"{diagram.num_edges_left_out:,} weaker edges of {number(least)} or less"
        if diagram.num_nodes_left_out:
            left += f", and {diagram.num_nodes_left_out:,} nodes that only they touch,"
        text.append(f"Not drawn: {left} also belong to the circuit.")
    return text


class _Canvas:
    """Where everything stands; makes the parts of one drawing."""

    def __init__(
        self,
        *,
        diagram: Diagram,
        rows: Sequence[Sequence[str]],
        widths: Mapping[str, float],
        x: Mapping[str, float],
        y: Sequence[float],
    ) -> None:
        self.diagram, self.widths, self.x, self.y = diagram, widths, x, y
        self.at = {node.id: i for i, node in enumerate(diagram.nodes)}
        self.slots: dict[str, list[str]] = {node.id: [] for node in diagram.nodes}
        for slot in _SLOTS:
            for edge in diagram.edges:
                if edge.slot == slot and slot not in self.slots[edge.target]:
                    self.slots[edge.target].append(slot)
        self.groups = _groups(diagram)
        gaps = [
            Gaps.of((x[n] - widths[n] / 2 - 7, x[n] + widths[n] / 2 + 7) for n in row)
            for row in rows
        ]
        self.bends = {i: self._bends(edge, gaps) for i, edge in enumerate(diagram.edges)}

    def reach(self) -> float:
        """How far to the right an edge is led around nodes."""
        return max((x for bends in self.bends.values() for x, _, _ in bends), default=0.0)

    def edges(self) -> list[Markup]:
        """Weak edges first, so that strong ones lie above them."""
        most = max((abs(e.score or 0.0) for e in self.diagram.edges), default=0.0)
        listed = sorted(
            enumerate(self.diagram.edges), key=lambda pair: (abs(pair[1].score or 0.0), -pair[0])
        )
        return [self._edge(i, edge, most) for i, edge in listed]

    def nodes(self) -> list[Markup]:
        """Every node with its slots and its name."""
        reads = [edge.target for edge in self.diagram.edges]
        writes = [edge.source for edge in self.diagram.edges]
        return [
            self._node(node, reads.count(node.id), writes.count(node.id))
            for node in self.diagram.nodes
        ]

    def _row(self, name: str) -> int:
        return self.diagram.nodes[self.at[name]].row

    def _bends(self, edge: DiagramEdge, gaps: Sequence[Gaps]) -> list[tuple[float, float, float]]:
        """The nearest gap to the straight line in each row on the way."""
        low, high = self._row(edge.source), self._row(edge.target)
        a, b = self.x[edge.source], self.x[edge.target]
        return [
            (
                gaps[row].nearest(a + (b - a) * (row - low) / (high - low)),
                self.y[row] + _HALF + 4,
                self.y[row] - _HALF - 4,
            )
            for row in range(low + 1, high)
        ]

    def _port(self, name: str, slot: str) -> float:
        """Where along the foot of a node an edge comes in."""
        slots = self.slots[name]
        if slot not in slots:
            return self.x[name]
        return self.x[name] + 13.0 * (slots.index(slot) - (len(slots) - 1) / 2)

    def _edge(self, i: int, edge: DiagramEdge, most: float) -> Markup:
        start = (self.x[edge.source], self.y[self._row(edge.source)] - _HALF)
        end = (self._port(edge.target, edge.slot), self.y[self._row(edge.target)] + _HALF + 3)
        share = abs(edge.score) / most if edge.score is not None and most > 0 else 0.0
        sign = "fixed" if edge.score is None else "less" if edge.score < 0 else "more"
        slot = f" ({visible(edge.slot)})" if edge.slot else ""
        words = "fixed link" if edge.score is None else f"{number(edge.score)} {self.diagram.unit}"
        return Markup(
            '<g class="edge {}" data-from="{}" data-to="{}"{}><title>{}</title>'
            '<path class="line" d="{}" stroke-width="{:.2f}"/></g>'
        ).format(
            sign,
            self.at[edge.source],
            self.at[edge.target],
            Markup(' data-score="{!r}"').format(edge.score) if edge.score is not None else "",
            visible(f"{edge.source} \u2192 {edge.target}{slot}: {words.strip()}"),
            curve(start, self.bends[i], end),
            1.0 + 5.0 * share,
        )

    def _node(self, node: DiagramNode, reads: int, writes: int) -> Markup:
        x, y, width = self.x[node.id], self.y[node.row], self.widths[node.id]
        words = [node.id, node.kind]
        if node.group:
            words.append(node.group)
        if node.score is not None:
            words.append(f"{number(node.score)} {self.diagram.unit}".strip())
        words.append(f"{reads} in, {writes} out")
        group = self.groups.get(node.group)
        parts = [
            Markup('<rect x="{:g}" y="{:g}" width="{:g}" height="{:g}" rx="{}"/>').format(
                x - width / 2, y - _HALF, width, 2 * _HALF, 13 if node.kind == "head" else 4
            )
        ]
        if group is not None:
            ends = (x - width / 2 + 7, x + width / 2 - 7)
            parts.append(
                Markup(
                    '<line class="colour-{}" x1="{:g}" x2="{:g}" y1="{y:g}" y2="{y:g}"/>'
                ).format(group, *ends, y=y - _HALF)
            )
        parts.append(text_at("name", x, y + 4, clipped(node.label, 24)))
        for slot in self.slots[node.id]:
            port, foot = self._port(node.id, slot), y + _HALF
            parts += [
                Markup('<circle class="slot-{}" cx="{:g}" cy="{:g}" r="6"/>').format(
                    slot, port, foot
                ),
                text_at(f"slot text-{slot}", port, foot + 3, slot),
            ]
        return Markup(
            '<g class="node kind-{}" data-node="{}" data-row="{}" role="img">'
            "<title>{}</title>{}</g>"
        ).format(
            node.kind,
            self.at[node.id],
            node.row,
            visible(" \u00b7 ".join(words)),
            Markup().join(parts),
        )


def _groups(diagram: Diagram) -> dict[str, int]:
    """A colour for each group; beyond the last colour, groups are named but not coloured."""
    names = sorted({node.group for node in diagram.nodes if node.group})
    return {name: i for i, name in enumerate(names[:_NUM_COLOURS])}


def _legend(diagram: Diagram) -> list[tuple[str, str]]:
    scores = [edge.score for edge in diagram.edges if edge.score is not None]
    legend = []
    if any(score >= 0 for score in scores):
        legend.append(("more", "edge, width by its score" + _unit(diagram)))
    if any(score < 0 for score in scores):
        legend.append(("less", "edge with a negative score"))
    if len(scores) < len(diagram.edges):
        legend.append(("fixed", "shared key or value head, not scored"))
    words = {"q": "into queries", "k": "into keys", "v": "into values"}
    used = {edge.slot for edge in diagram.edges}
    legend += [(f"slot-{slot}", words[slot]) for slot in _SLOTS if slot in used]
    return legend + [(f"colour-{i}", name) for name, i in _groups(diagram).items()]


def _unit(diagram: Diagram) -> str:
    return f" ({diagram.unit})" if diagram.unit else ""

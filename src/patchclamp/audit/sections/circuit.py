"""A circuit as a section: what it is, how much of the behaviour it carries, and what that rests on.

`circuit_section` turns the result of a search into blocks and findings; it measures nothing
itself. Findings about the complement and about single edges need intervals and nulls, which
`patchclamp.audit.circuit_parts.weigh` measures; without them those two are shown as numbers
and claimed by no finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchclamp.audit.circuit_claims import CARRIES, Claims, chosen, shown
from patchclamp.audit.circuit_parts import Weighed
from patchclamp.core.circuit import Circuit, Edge, Node, Reader
from patchclamp.core.document import Bars, Block, Cell, Column, Diagram, Facts, Section, Table
from patchclamp.methods.circuits.checking.behaviour import Performance
from patchclamp.methods.circuits.checking.evaluation import Faithfulness, Point
from patchclamp.methods.circuits.finding.search import CircuitSearch, Found
from patchclamp.methods.circuits.network.masks import connected
from patchclamp.net import Net
from patchclamp.report.circuit_drawing import diagram_of
from patchclamp.report.text import number

_LEVELS = (0.8, 0.95, 0.99)
_MAX_DRAWN = 60


def circuit_section(
    found: Found,
    net: Net,
    *,
    search: CircuitSearch | None = None,
    weighed: Weighed | None = None,
    groups: Mapping[Node, str] | None = None,
    tried: Sequence[Performance] = (),
    validation: str = "",
) -> Section:
    """The section of one circuit.

    Args:
        search: the one that found it; its defaults where None.
        weighed: intervals and nulls of the complement and of single edges.
        groups: a name for some nodes, such as a head's type; drawn as colours.
        tried: every behaviour that was measured, for the table of behaviours.
        validation: which planted truth the method was checked on; stands with the findings.
    """
    search = search or CircuitSearch()
    page = _Page(found, net, search, weighed)
    claims = Claims(found=found, search=search, weighed=weighed, validation=validation)
    blocks: list[Block] = [page.facts()]
    if warned := page.warnings():
        blocks.append(warned)
    if tried:
        blocks.append(behaviours(tried))
    blocks += [
        _diagram(found, groups),
        page.sizes(),
        *page.losses(),
        page.size_table(),
        page.edges(),
    ]
    return Section(
        id="circuit",
        title=f"The circuit of {found.circuit.record.task}",
        summary=page.summary(),
        blocks=tuple(blocks),
        findings=tuple(claims.findings()),
    )


def _diagram(found: Found, groups: Mapping[Node, str] | None) -> Diagram:
    """The largest edges that can be seen, and of those the ones that connect input and output."""
    circuit = found.circuit
    shown_part = circuit
    for num in range(circuit.num_edges, 0, -max(1, circuit.num_edges // 100)):
        largest = circuit.top(num).kept & circuit.kept
        shown_part = circuit.with_kept(connected(found.wiring, largest))
        if shown_part.num_edges <= _MAX_DRAWN:
            break
    left = circuit.num_edges - shown_part.num_edges
    note = "The largest edges that connect the input with the output"
    said = [f"{note}; {left:,} more belong to the circuit."] if left else []
    if any(edge.slot for edge in shown_part.edges()):
        said.append("The letters at a head say where an edge enters it.")
    return diagram_of(
        shown_part, title="Diagram", note=" ".join(said), max_edges=_MAX_DRAWN, groups=groups
    )


def behaviours(tried: Sequence[Performance]) -> Table:
    """Which behaviours the network has."""
    rows: list[tuple[Cell, ...]] = [
        (
            p.name,
            "performs" if p.present else "does not perform",
            p.accuracy,
            f"{p.accuracy_interval.low:.0%} to {p.accuracy_interval.high:.0%}",
            f"{p.chance:.0%}",
            p.contrast,
            p.num,
            p.objection or "",
        )
        for p in tried
    ]
    return Table(
        title="Behaviours",
        columns=(
            Column(name="behaviour", title="Behaviour"),
            Column(name="verdict", title="Verdict"),
            Column(name="accuracy", title="Right", role="share", help="right answer above wrong"),
            Column(name="interval", title="95% interval"),
            Column(name="chance", title="By chance"),
            Column(
                name="contrast",
                title="Clean less corrupt",
                role="number",
                help="how far the prompt moves the metric",
            ),
            Column(name="pairs", title="Pairs", role="number"),
            Column(name="reason", title="Why not"),
        ),
        rows=tuple(rows),
        note="A behaviour that is not there is not explained: its circuit would be one of noise.",
    )


class _Page:
    """What the blocks and findings of one circuit share."""

    def __init__(
        self,
        found: Found,
        net: Net,
        search: CircuitSearch,
        weighed: Weighed | None,
    ) -> None:
        self.found, self.net, self.search = found, net, search
        self.weighed = weighed
        self.circuit: Circuit = found.circuit
        self.record = found.circuit.record
        self.level = search.level
        self.point = chosen(found.train, found.held_out, search.level)

    # ---- words ----------------------------------------------------------------------

    def summary(self) -> str:
        c, held = self.circuit, self.found.held_out
        carries = CARRIES[self.record.ablation]
        opening = (
            f"Which connections inside {self.net.name} carry '{self.record.task}'. Every edge "
            f"between parts of the network was scored, the largest were kept, and all others were "
            f"cut: they carry {carries}. What both inputs of a pair share is no part of this. "
        )
        if self.point is None:
            return opening + (
                f"No measured part of the {c.num_possible:,} edges keeps {self.level:.0%} of the "
                "behaviour: there is no small circuit to show."
            )
        return opening + (
            f"{c.num_edges:,} of {c.num_possible:,} edges "
            f"({_percent(c.num_edges / c.num_possible)}) keep "
            f"{self.point.faithfulness:.0%} of it on {held.num_examples} pairs that were not used "
            f"to find them; without them the rest of the network keeps "
            f"{shown(self.found.parts.complement, 2):.0%}."
        )

    def facts(self) -> Facts:
        p, held, train = self.found.performance, self.found.held_out, self.found.train
        items = [
            ("behaviour", self.record.task),
            ("pairs", f"{train.num_examples} to find it, {held.num_examples} held out"),
            ("metric", self.record.metric),
            (
                "the network does it",
                f"right on {p.accuracy:.0%} [{p.accuracy_interval.low:.0%}, "
                f"{p.accuracy_interval.high:.0%}] of {p.num} inputs, "
                f"by chance {p.chance:.0%}",
            ),
            (
                "metric on clean and corrupt",
                f"{number(p.clean)} and {number(p.corrupt)}",
            ),
            (
                "edges",
                f"{self.circuit.num_edges:,} of {self.circuit.num_possible:,} kept, between "
                f"{len(self.found.nodes):,} nodes",
            ),
            ("faithfulness on held-out pairs", number(shown(self.found.parts.faithfulness))),
            (
                "completeness: faithfulness of all edges but these",
                number(shown(self.found.parts.complement)),
            ),
            *(
                (f"edges for {level:.0%} on held-out pairs", self._size(held, level))
                for level in _LEVELS
            ),
            *self._writers(),
            (
                "CPR, area under faithfulness over size",
                f"{number(held.cpr)} held out, {number(train.cpr)} found on",
            ),
            (
                "CMD, area between faithfulness and 1",
                f"{number(held.cmd)} held out, {number(train.cmd)} found on",
            ),
            (
                "first-order scores against exact effects",
                f"rank correlation {number(self.found.agreement)} over "
                f"{len(self.found.effects.edges)} edges",
            ),
            ("method", f"{self.record.method}, {self.record.direction}, {self.record.sign}"),
            ("cut edges carry", CARRIES[self.record.ablation]),
        ]
        return Facts(title="The circuit in numbers", items=tuple(items))

    def _size(self, curve: Faithfulness, level: float) -> str:
        point = curve.size_at(level)
        if point is None:
            return "none of the measured sizes is enough"
        return f"{point.num_edges:,} ({_percent(point.share)})"

    def _writers(self) -> list[tuple[str, str]]:
        """How many whole writers are needed, where that was measured: nodes apart from edges."""
        curve = self.found.by_node
        if curve is None:
            return []
        point = curve.size_at(self.level)
        text = (
            "none of the measured numbers is enough"
            if point is None
            else f"{point.size:,} ({_percent(point.share)}), all their edges kept"
        )
        return [(f"whole writers for {self.level:.0%} on held-out pairs", text)]

    def warnings(self) -> Facts | None:
        said = list(self.found.warnings)
        held = self.found.held_out
        if held.num_falls > 0:
            said.append(
                f"Larger is not always more faithful: {held.num_falls} of {len(held.points)} steps "
                "of the held-out curve fall by more than 0.02. Some edges work against the "
                "behaviour."
            )
        if self.found.parts.faithfulness > 1.2:
            said.append(
                "The circuit does more than the whole network: edges that were cut work against it."
            )
        if self.found.agreement < 0.5 and len(self.found.effects.edges) >= 3:
            said.append(
                "First-order scores and exact effects disagree on the order of the largest edges: "
                "trust the exact columns."
            )
        if not said:
            return None
        return Facts(
            title="Read this first",
            items=tuple((f"warning {i}", text) for i, text in enumerate(said, 1)),
        )

    # ---- blocks ---------------------------------------------------------------------

    def sizes(self) -> Bars:
        points = _distinct(self.found.held_out.points)
        return Bars(
            title="Faithfulness over size, on held-out pairs",
            labels=tuple(f"{p.num_edges:,} edges ({_percent(p.share)})" for p in points),
            values=tuple(shown(p.faithfulness) for p in points),
            unit="faithfulness",
            low=tuple(shown(p.interval.low) for p in points),
            high=tuple(shown(p.interval.high) for p in points),
            null_low=tuple(shown(p.random_low) for p in points),
            null_high=tuple(shown(p.random_high) for p in points),
            note="0: all edges cut. 1: the whole network. Whiskers: 95% interval over pairs. "
            f"Shaded: {self.search.num_random} random circuits of the same size.",
        )

    def losses(self) -> list[Bars]:
        """What is lost without each of the largest edges, where that was measured."""
        if self.weighed is None or self.point is None:
            return []
        parts, num = self.weighed.losses, len(self.weighed.losses)
        return [
            Bars(
                title="What is lost without one edge",
                labels=tuple(str(edge) for edge in parts),
                values=tuple(shown(part.value) for part in parts.values()),
                unit="fall of faithfulness",
                low=tuple(shown(part.interval.low) for part in parts.values()),
                high=tuple(shown(part.interval.high) for part in parts.values()),
                null_low=(0.0,) * num,
                null_high=(shown(max(self.weighed.random_additions)),) * num,
                note="The circuit with one more edge cut, on held-out pairs; largest score first. "
                "Shaded: the change when a random edge from outside is put in. The losses need "
                "not add up to 1: edges can stand in for each other, or do nothing alone.",
            )
        ]

    def size_table(self) -> Table:
        trained = {p.num_edges: p for p in self.found.train.points}
        rows: list[tuple[Cell, ...]] = [
            (
                p.num_edges,
                round(100 * p.share, 2),
                p.num_connected,
                shown(trained[p.num_edges].faithfulness) if p.num_edges in trained else None,
                shown(p.faithfulness),
                shown(p.random_low),
                shown(p.random_mean),
                shown(p.random_high),
            )
            for p in _distinct(self.found.held_out.points)
        ]
        return Table(
            title="Sizes",
            columns=(
                Column(name="edges", title="Edges", role="number"),
                Column(name="share", title="of all", role="number", unit="%"),
                Column(
                    name="connected",
                    title="Connected",
                    role="number",
                    help="edges on a kept way from the input to the output; others do nothing",
                ),
                Column(name="train", title="Found on", role="number", help="faithfulness"),
                Column(name="held_out", title="Held out", role="number", help="faithfulness"),
                Column(name="random_low", title="Random, least", role="number"),
                Column(name="random", title="Random, mean", role="number"),
                Column(name="random_high", title="Random, most", role="number"),
            ),
            rows=tuple(rows),
            note="Connected counts are of the edges with the largest scores, before unconnected "
            "ones are dropped from the circuit.",
        )

    def edges(self) -> Table:
        effects, rows = self.found.effects, list[tuple[Cell, ...]]()
        noising, denoising = effects.noising.mean(1).tolist(), effects.denoising.mean(1).tolist()
        losses = self._losses()
        for edge, noise, denoise in zip(effects.edges, noising, denoising, strict=True):
            read = Reader(edge.reader, edge.slot)
            score = self.circuit.scores[
                self.circuit.readers.index(read), self.circuit.writers.index(edge.writer)
            ]
            rows.append(
                (
                    str(edge.writer),
                    str(read),
                    float(score),
                    shown(noise),
                    shown(denoise),
                    None if edge not in losses else shown(losses[edge]),
                    self._kept(edge),
                )
            )
        return Table(
            title="The edges with the largest scores",
            columns=(
                Column(name="from", title="From", role="address"),
                Column(name="to", title="To", role="address"),
                Column(
                    name="score",
                    title="First-order score",
                    role="number",
                    help="a search light: how it was found",
                ),
                Column(
                    name="noising",
                    title="Cut in the clean run",
                    role="bar",
                    help="exact change of the metric",
                ),
                Column(
                    name="denoising",
                    title="Mended in the corrupt run",
                    role="bar",
                    help="exact change of the metric",
                ),
                Column(
                    name="loss",
                    title="Loss without it",
                    role="number",
                    help="fall of the circuit's faithfulness when this edge is cut too",
                ),
                Column(name="kept", title="In the circuit", role="flag"),
            ),
            rows=tuple(rows),
            note=f"Scores and effects are changes of the {self.record.metric}.",
        )

    def _kept(self, edge: Edge) -> bool:
        row = self.circuit.readers.index(Reader(edge.reader, edge.slot))
        return bool(self.circuit.kept[row, self.circuit.writers.index(edge.writer)])

    def _losses(self) -> dict[Edge, float]:
        measured = {} if self.weighed is None else self.weighed.losses
        return {**self.found.parts.losses, **{e: part.value for e, part in measured.items()}}


def _distinct(points: Sequence[Point]) -> list[Point]:
    """In a small network several shares are the same number of edges."""
    return list({p.num_edges: p for p in points}.values())


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"

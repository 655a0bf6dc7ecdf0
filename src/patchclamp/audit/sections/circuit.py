"""A circuit as a section: what it is, how much of the behaviour it carries, and what that rests on.

`circuit_section` turns the result of a search into blocks and findings; it measures nothing
itself. Findings about the complement and about single edges need intervals and nulls, which
`patchclamp.audit.circuit_parts.weigh` measures; without them those two are shown as numbers
and claimed by no finding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from patchclamp.audit.circuit_parts import Weighed
from patchclamp.core.circuit import Circuit, Edge, Node, Reader
from patchclamp.core.document import Bars, Block, Cell, Column, Facts, Section, Table
from patchclamp.core.findings import Evidence, Finding, Interval, Json, Null, Record, Verdict
from patchclamp.methods.circuits.behaviour import Performance
from patchclamp.methods.circuits.evaluation import Faithfulness, Point
from patchclamp.methods.circuits.search import CircuitSearch, Found
from patchclamp.net import Net
from patchclamp.report.circuit_drawing import diagram_of
from patchclamp.report.text import number

_LEVELS = (0.8, 0.95, 0.99)
_MAX_DRAWN = 60
_MAX_LISTED = 200
_CLAIMED = 3
_CARRIES = {
    "resample": "their value on the corrupt input of the pair",
    "mean": "their mean over the corrupt inputs",
    "positional mean": "their mean over the corrupt inputs, at each position",
    "zero": "zero",
    "noise": "their value with noise of their own spread",
    "optimal": "the constant that hurts least",
}


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
    page = _Page(found, net, search or CircuitSearch(), weighed, validation)
    note = "Width: the size of a score; q, k and v: where an edge enters a head."
    diagram = diagram_of(
        found.circuit,
        title="Diagram",
        note=note if found.circuit.num_edges > 0 else "",
        max_edges=_MAX_DRAWN,
        groups=groups,
    )
    blocks: list[Block] = [page.facts()]
    if warned := page.warnings():
        blocks.append(warned)
    if tried:
        blocks.append(behaviours(tried))
    blocks += [diagram, page.sizes(), *page.losses(), page.size_table(), page.edges()]
    return Section(
        id="circuit",
        title=f"The circuit of {found.circuit.record.task}",
        summary=page.summary(),
        blocks=tuple(blocks),
        findings=tuple(page.findings()),
    )


def behaviours(tried: Sequence[Performance]) -> Table:
    """Which behaviours the network has."""
    rows: list[tuple[Cell, ...]] = [
        (
            p.name,
            p.accuracy,
            p.accuracy_interval.low,
            p.accuracy_interval.high,
            p.chance,
            p.contrast,
            p.num,
            "performs" if p.present else "does not perform",
            p.objection or "",
        )
        for p in tried
    ]
    return Table(
        title="Behaviours",
        columns=(
            Column(name="behaviour", title="Behaviour"),
            Column(name="accuracy", title="Right", role="share", help="right answer above wrong"),
            Column(name="low", title="low", role="share", help="of the 95% interval"),
            Column(name="high", title="high", role="share", help="of the 95% interval"),
            Column(name="chance", title="By chance", role="share"),
            Column(
                name="contrast",
                title="Clean less corrupt",
                role="number",
                help="how far the prompt moves the metric",
            ),
            Column(name="pairs", title="Pairs", role="number"),
            Column(name="verdict", title="Verdict"),
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
        validation: str,
    ) -> None:
        self.found, self.net, self.search = found, net, search
        self.weighed, self.validation = weighed, validation
        self.circuit: Circuit = found.circuit
        self.record = found.circuit.record
        self.level = search.level
        self.point = _chosen(found.train, found.held_out, search.level)

    # ---- words ----------------------------------------------------------------------

    def summary(self) -> str:
        c, held = self.circuit, self.found.held_out
        carries = _CARRIES[self.record.ablation]
        opening = (
            f"Which connections inside {self.net.name} carry '{self.record.task}'. Every edge "
            f"between parts of the network was scored, the largest were kept, and all others were "
            f"cut: they carry {carries}. "
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
            f"{_shown(self.found.parts.complement, 2):.0%}."
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
                f"{p.accuracy_interval.high:.0%}] of {p.num} held-out inputs, "
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
            ("faithfulness on held-out pairs", number(_shown(self.found.parts.faithfulness))),
            (
                "completeness: faithfulness of all edges but these",
                number(_shown(self.found.parts.complement)),
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
            ("cut edges carry", _CARRIES[self.record.ablation]),
        ]
        return Facts(title="The circuit in numbers", items=tuple(items))

    def _size(self, curve: Faithfulness, level: float) -> str:
        point = curve.size_at(level)
        if point is None:
            return "no measured size"
        return f"{point.num_edges:,} ({_percent(point.share)})"

    def _writers(self) -> list[tuple[str, str]]:
        """How many whole writers are needed, where that was measured: nodes apart from edges."""
        curve = self.found.by_node
        if curve is None:
            return []
        point = curve.size_at(self.level)
        text = (
            "no measured number"
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
            values=tuple(_shown(p.faithfulness) for p in points),
            unit="faithfulness",
            low=tuple(_shown(p.interval.low) for p in points),
            high=tuple(_shown(p.interval.high) for p in points),
            null_low=tuple(_shown(p.random_low) for p in points),
            null_high=tuple(_shown(p.random_high) for p in points),
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
                values=tuple(_shown(part.value) for part in parts.values()),
                unit="fall of faithfulness",
                low=tuple(_shown(part.interval.low) for part in parts.values()),
                high=tuple(_shown(part.interval.high) for part in parts.values()),
                null_low=(0.0,) * num,
                null_high=(_shown(max(self.weighed.random_additions)),) * num,
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
                p.share,
                p.num_connected,
                _shown(trained[p.num_edges].faithfulness) if p.num_edges in trained else None,
                _shown(p.faithfulness),
                _shown(p.interval.low),
                _shown(p.interval.high),
                _shown(p.random_low),
                _shown(p.random_mean),
                _shown(p.random_high),
            )
            for p in _distinct(self.found.held_out.points)
        ]
        return Table(
            title="Sizes",
            columns=(
                Column(name="edges", title="Edges", role="number"),
                Column(name="share", title="of all", role="share"),
                Column(
                    name="connected",
                    title="Connected",
                    role="number",
                    help="edges on a kept way from the input to the output; others do nothing",
                ),
                Column(name="train", title="Found on", role="number", help="faithfulness"),
                Column(name="held_out", title="Held out", role="number", help="faithfulness"),
                Column(name="low", title="low", role="number", help="of the 95% interval"),
                Column(name="high", title="high", role="number", help="of the 95% interval"),
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
                    _shown(noise),
                    _shown(denoise),
                    None if edge not in losses else _shown(losses[edge]),
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
                    unit=self.record.metric,
                    help="exact change of the metric",
                ),
                Column(
                    name="denoising",
                    title="Mended in the corrupt run",
                    role="bar",
                    unit=self.record.metric,
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
        )

    def _kept(self, edge: Edge) -> bool:
        row = self.circuit.readers.index(Reader(edge.reader, edge.slot))
        return bool(self.circuit.kept[row, self.circuit.writers.index(edge.writer)])

    def _losses(self) -> dict[Edge, float]:
        measured = {} if self.weighed is None else self.weighed.losses
        return {**self.found.parts.losses, **{e: part.value for e, part in measured.items()}}

    # ---- findings -------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        found = [self._faithful()]
        if self.weighed is not None and self.point is not None:
            found.append(self._complete(self.weighed))
            # The parts without which most is lost; the bars show all that were measured.
            losses = self.weighed.losses
            worst = sorted(losses, key=lambda e: -losses[e].value)[:_CLAIMED]
            found += [self._needed(self.weighed, e) for e in worst]
        return found

    def _faithful(self) -> Finding:
        # Without a circuit, the largest part that was measured stands for the claim.
        parts = [p for p in self.found.held_out.points if p.share < 1]
        point = self.point or (parts[-1] if parts else self.found.held_out.points[-1])
        num = self.circuit.num_edges if self.point is not None else point.num_edges
        high = point.random_high
        if point.interval.low >= self.level and point.interval.low > high and point.share < 1:
            verdict = Verdict.HOLDS
        elif point.interval.high < self.level or point.interval.high <= high or point.share >= 1:
            verdict = Verdict.DOES_NOT_HOLD
        else:
            verdict = Verdict.UNKNOWN
        return self._finding(
            "faithful",
            f"{num:,} of {self.circuit.num_possible:,} edges of {self.net.name} alone do at least "
            f"{self.level:.0%} of '{self.record.task}'.",
            point.faithfulness,
            point.interval,
            Null(
                kind="random circuits of the same number of edges",
                mean=point.random_mean,
                low=point.random_low,
                high=point.random_high,
                num=self.search.num_random,
            ),
            verdict,
            {
                "cut": "all edges but those of the circuit",
                "num_cut": self.circuit.num_possible - num,
                "kept": self._listed(num),
                "carry": _CARRIES[self.record.ablation],
            },
            "faithfulness: 0 with all edges cut, 1 for the whole network",
            (
                "the range of the random circuits is their least and most; few of them connect "
                "the input with the output at small sizes",
            ),
        )

    def _complete(self, weighed: Weighed) -> Finding:
        part, allowed = weighed.complement, 1 - self.level
        low = min(weighed.random_complements)
        if part.interval.high <= allowed and part.interval.high < low:
            verdict = Verdict.HOLDS
        elif part.interval.low > allowed or part.interval.low >= low:
            verdict = Verdict.DOES_NOT_HOLD
        else:
            verdict = Verdict.UNKNOWN
        return self._finding(
            "complete",
            f"Without the circuit's {self.circuit.num_edges:,} edges, the rest of "
            f"{self.net.name} does at most {allowed:.0%} of '{self.record.task}'.",
            part.value,
            part.interval,
            _range("the network without as many random edges", weighed.random_complements),
            verdict,
            {
                "cut": "the edges of the circuit",
                "num_cut": self.circuit.num_edges,
                "edges": self._listed(self.circuit.num_edges),
                "carry": _CARRIES[self.record.ablation],
            },
            "faithfulness of the complement",
            (),
        )

    def _needed(self, weighed: Weighed, edge: Edge) -> Finding:
        part, high = weighed.losses[edge], max(weighed.random_additions)
        if part.interval.low > max(0.0, high):
            verdict = Verdict.HOLDS
        else:
            verdict = Verdict.DOES_NOT_HOLD if part.interval.high <= high else Verdict.UNKNOWN
        return self._finding(
            f"needed/{edge}",
            f"The circuit needs the edge {edge}: cutting it as well makes it less faithful.",
            part.value,
            part.interval,
            _range(
                "random edges from outside put in, size of the change", weighed.random_additions
            ),
            verdict,
            {
                "cut": "all edges but those of the circuit, and one of them",
                "num_cut": self.circuit.num_possible - self.circuit.num_edges + 1,
                "also_cut": str(edge),
                "carry": _CARRIES[self.record.ablation],
            },
            "fall of faithfulness",
            (
                f"among the {_CLAIMED} of the {len(weighed.losses)} edges with the largest scores "
                "without which most is lost; not corrected for that choice",
            ),
        )

    def _finding(
        self,
        name: str,
        claim: str,
        effect: float,
        interval: Interval,
        null: Null,
        verdict: Verdict,
        edits: dict[str, Json],
        unit: str,
        caveats: tuple[str, ...],
    ) -> Finding:
        record, held = self.record, self.found.held_out
        return Finding(
            id=f"circuit/{name}",
            claim=claim,
            subject=f"circuit of {record.task}",
            effect=effect,
            unit=unit,
            interval=interval,
            null=null,
            evidence=Evidence.INTERVENED,
            verdict=verdict,
            over=f"{held.num_examples} held-out pairs of {record.task}",
            validation=self.validation,
            record=Record(
                method="circuits.search",
                options=dict(record.options),
                model=record.model,
                model_hash=record.model_hash,
                data=record.task,
                data_hash=_one_hash(str(record.options.get("held_out_hash", record.data_hash))),
                metric=record.metric,
                edits=(edits,),
                engine="graph",
                seed=self.search.seed,
                versions=dict(record.versions),
            ),
            caveats=(*caveats, *self.found.warnings),
        )

    def _listed(self, num: int) -> list[Json]:
        """The largest edges, as many as a record can hold; the options find all of them again."""
        largest = self.circuit if self.point is not None else self.circuit.top(num)
        return [str(e) for e in largest.edges()[:_MAX_LISTED]]


def _chosen(train: Faithfulness, held_out: Faithfulness, level: float) -> Point | None:
    """The held-out point of the size that was kept; None if only the whole network would do."""
    point = train.size_at(level)
    if point is None or point.share >= 1:
        return None
    return next(p for p in held_out.points if p.num_edges == point.num_edges)


def _one_hash(hashes: str) -> str:
    """Pairs of several lengths have a hash for each; the record has one, of all."""
    several = hashes.split()
    return hashes if len(several) == 1 else hashlib.sha256(hashes.encode()).hexdigest()


def _distinct(points: Sequence[Point]) -> list[Point]:
    """In a small network several shares are the same number of edges."""
    return list({p.num_edges: p for p in points}.values())


def _range(kind: str, values: Sequence[float]) -> Null:
    return Null(
        kind=kind,
        mean=sum(values) / len(values),
        low=min(values),
        high=max(values),
        num=len(values),
    )


def _shown(value: float, digits: int = 6) -> float:
    """Without the rounding noise of single precision, and without a minus before a zero."""
    return round(value, digits) + 0.0


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"

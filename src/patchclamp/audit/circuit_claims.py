"""What is claimed of a circuit: that it is faithful, complete, and needs its largest edges.

Each claim holds only where its whole interval is on the right side of both the level that
was asked for and the range that its null reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchclamp.audit.circuit_parts import Weighed
from patchclamp.core.circuit import Circuit, Edge
from patchclamp.core.findings import Evidence, Finding, Interval, Json, Null, Record, Verdict
from patchclamp.methods.circuits.checking.evaluation import Faithfulness, Point
from patchclamp.methods.circuits.finding.search import CircuitSearch, Found

CARRIES = {
    "resample": "their value on the corrupt input of the pair",
    "mean": "their mean over the corrupt inputs",
    "positional mean": "their mean over the corrupt inputs, at each position",
    "zero": "zero",
    "noise": "their value with noise of their own spread",
    "optimal": "the constant that hurts least",
}
"""What cut edges carry, by the kind of ablation."""
_MAX_LISTED = 200
_CLAIMED = 3


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Makes the findings of one circuit.

    Attributes:
        search: the one that found it.
        weighed: intervals and nulls of the complement and of single edges; without them
            nothing is claimed of those.
        validation: which planted truth the method was checked on.
    """

    found: Found
    search: CircuitSearch
    weighed: Weighed | None
    validation: str

    @property
    def circuit(self) -> Circuit:
        """The circuit itself."""
        return self.found.circuit

    @property
    def task(self) -> str:
        """What the circuit is of."""
        return self.found.circuit.record.task

    @property
    def name(self) -> str:
        """Of the network."""
        return self.found.wiring.net.name

    @property
    def point(self) -> Point | None:
        """The held-out point of the circuit; None where there is no small circuit."""
        return chosen(self.found.train, self.found.held_out, self.search.level)

    def findings(self) -> list[Finding]:
        """Faithfulness always; completeness and need where they were weighed."""
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
        verdict = Verdict.UNKNOWN
        if point.interval.high < self.search.level or point.share >= 1:
            verdict = Verdict.DOES_NOT_HOLD
        elif point.interval.low >= self.search.level and point.interval.low > point.random_high:
            verdict = Verdict.HOLDS
        return self._finding(
            "faithful",
            f"{num:,} of {self.circuit.num_possible:,} edges of {self.name} alone do at least "
            f"{self.search.level:.0%} of '{self.task}'.",
            point.faithfulness,
            point.interval,
            Null(
                kind="random circuits of the same number of edges (range: least and most)",
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
                "carry": CARRIES[self.circuit.record.ablation],
            },
            "faithfulness: 0 with all edges cut, 1 for the whole network",
            ("few small random circuits connect the input with the output at all",),
        )

    def _complete(self, weighed: Weighed) -> Finding:
        part, allowed = weighed.complement, 1 - self.search.level
        low = min(weighed.random_complements)
        verdict = Verdict.UNKNOWN
        if part.interval.low > allowed:
            verdict = Verdict.DOES_NOT_HOLD
        elif part.interval.high <= allowed and part.interval.high < low:
            verdict = Verdict.HOLDS
        return self._finding(
            "complete",
            f"Without the circuit's {self.circuit.num_edges:,} edges, the rest of "
            f"{self.name} does at most {allowed:.0%} of '{self.task}'.",
            part.value,
            part.interval,
            _range("the network without as many random edges", weighed.random_complements),
            verdict,
            {
                "cut": "the edges of the circuit",
                "num_cut": self.circuit.num_edges,
                "edges": self._listed(self.circuit.num_edges),
                "carry": CARRIES[self.circuit.record.ablation],
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
                "carry": CARRIES[self.circuit.record.ablation],
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
        record, held = self.circuit.record, self.found.held_out
        return Finding(
            id=f"circuit/{name}",
            claim=claim,
            subject=f"circuit of {record.task}",
            effect=shown(effect),
            unit=unit,
            interval=replace(interval, low=shown(interval.low), high=shown(interval.high)),
            null=null,
            evidence=Evidence.INTERVENED,
            verdict=verdict,
            over=f"{held.num_examples} held-out pairs of {record.task}",
            validation=self.validation if name == "faithful" else "",
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
        largest = self.found.circuit if self.point is not None else self.circuit.top(num)
        return [str(e) for e in largest.edges()[:_MAX_LISTED]]


def chosen(train: Faithfulness, held_out: Faithfulness, level: float) -> Point | None:
    """The held-out point of the size that was kept; None if only the whole network would do."""
    point = train.size_at(level)
    if point is None or point.share >= 1:
        return None
    return next(p for p in held_out.points if p.num_edges == point.num_edges)


def _one_hash(hashes: str) -> str:
    """Pairs of several lengths have a hash for each; the record has one, of all."""
    several = hashes.split()
    return hashes if len(several) == 1 else hashlib.sha256(hashes.encode()).hexdigest()


def _range(kind: str, values: Sequence[float]) -> Null:
    return Null(
        kind=f"{kind} (range: least and most)",
        mean=sum(values) / len(values),
        low=min(values),
        high=max(values),
        num=len(values),
    )


def shown(value: float, digits: int = 6) -> float:
    """Without the rounding noise of single precision, and without a minus before a zero."""
    return round(value, digits) + 0.0

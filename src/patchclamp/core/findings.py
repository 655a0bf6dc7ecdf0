"""Findings: what patchclamp says, and how far each statement may be trusted.

A finding is one claim with its effect, an interval, the null or baseline it was
compared with, the level of evidence it earned, and the record that reproduces
it. The constructor refuses a level that the finding does not carry the proof
of, so that no method can claim more than it did. This module imports nothing
heavy: reports and the command line read findings without loading torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from patchclamp.core.errors import EvidenceError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Evidence(StrEnum):
    """The four levels, weakest first (docs/evidence.md)."""

    OBSERVED = "observed"
    """A statistic over recorded activations or outputs."""
    INTERVENED = "intervened"
    """The effect of an edit against a matched null edit."""
    VALIDATED = "validated"
    """The method recovers planted truth on networks of this kind and fails on negative controls."""
    CERTIFIED = "certified"
    """Proved for every input, activation or weight in a stated set."""


class Verdict(StrEnum):
    """What the evidence says of the claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval around an effect, e.g. `Interval(low=.91, high=.97, method="Wilson")`."""

    low: float
    high: float
    level: float = 0.95
    method: str


@dataclass(frozen=True, kw_only=True)
class Null:
    """What the effect is compared with.

    Attributes:
        kind: what was done instead, e.g. "random groups of the same size".
        mean, low, high: the null's centre and its central 95% range.
        num: how many null draws were made (0 for an analytic baseline).
        p: one-sided p value of the effect under the null, (1 + hits) / (1 + num)
            where it is by permutation; None where none was computed.
    """

    kind: str
    mean: float
    low: float | None = None
    high: float | None = None
    num: int = 0
    p: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything needed to measure the finding again."""

    method: str
    options: dict[str, Json] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    data: str = ""
    data_hash: str = ""
    metric: str = ""
    edits: tuple[dict[str, Json], ...] = ()
    engine: str = ""
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim and its evidence.

    Attributes:
        id: stable slug, unique in an audit: `ablation/layers.3`.
        claim: a sentence a person can disagree with.
        subject: the site, unit or network that it is about.
        effect: the measured size; None only where the verdict is `unknown`.
        unit: the units of effect, interval and null ("accuracy", "nats").
        over: the set that the statement ranges over ("360 held-out digits").
        validation: for `validated`: which planted truth and controls the method passed.
        certificate: for `certified`: the set and the arithmetic ("reals", "float32").
        caveats: what a reader should know before relying on it.
    """

    id: str
    claim: str
    subject: str
    effect: float | None
    unit: str
    evidence: Evidence
    verdict: Verdict
    over: str
    record: Record
    interval: Interval | None = None
    null: Null | None = None
    validation: str = ""
    certificate: str = ""
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def refuse(lacks: str) -> EvidenceError:
            return EvidenceError(
                f"finding '{self.id}' claims the level '{self.evidence}' without {lacks}",
                hint="lower its evidence level or add what is missing",
            )

        if self.effect is None and self.verdict is not Verdict.UNKNOWN:
            raise EvidenceError(
                f"finding '{self.id}' has the verdict '{self.verdict}' without an effect"
            )
        numbers = [self.effect]
        if self.interval is not None:
            numbers += [self.interval.low, self.interval.high]
        if self.null is not None:
            numbers += [self.null.mean, self.null.low, self.null.high, self.null.p]
        if any(x is not None and not math.isfinite(x) for x in numbers):
            raise EvidenceError(f"finding '{self.id}' carries a number that is not finite")
        if self.evidence is Evidence.INTERVENED and self.null is None:
            raise refuse("a matched null")
        if self.evidence is Evidence.INTERVENED and not self.record.edits:
            raise refuse("the edits in its record")
        if self.evidence is Evidence.VALIDATED and not self.validation:
            raise refuse("a validation on planted truth")
        if self.evidence is Evidence.CERTIFIED and not self.certificate:
            raise refuse("a certificate")

    def to_json(self) -> dict[str, Json]:
        """Plain data, valid under the schema in `report/schema.json`."""
        data = dataclasses.asdict(self)
        data["evidence"], data["verdict"] = str(self.evidence), str(self.verdict)
        data["caveats"] = list(self.caveats)
        data["record"]["edits"] = list(self.record.edits)
        return data

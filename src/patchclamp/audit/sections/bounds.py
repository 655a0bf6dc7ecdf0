"""What is proved: how far inputs may move before the class can change, and one edit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.audit.context import Context
from patchclamp.audit.provable import Plan, plan
from patchclamp.bounding.ways import Method
from patchclamp.core.document import Block, Cell, Column, Curve, Histogram, Section, Table
from patchclamp.core.errors import BoundError, EditError
from patchclamp.core.findings import Evidence, Finding, Interval, Json, Record, Verdict
from patchclamp.methods.bounds.certified_edit import CertifiedEdit, EditedBox, EditResult
from patchclamp.methods.bounds.nearest_attack import NearestAttack
from patchclamp.methods.bounds.radius import CertifiedRadius, Radius, RadiusResult
from patchclamp.methods.material import RowKind, record
from patchclamp.methods.neurons.ablation import Importance, ablations, unit_means

_GREY_LEVEL = 1 / 255
_EDIT_SHARE = 0.5
"""Of each row's certified radius: the edited network has a smaller one."""
_EDIT_ROWS = 4
_BINS = 10
_POINTS = 13


def bounds(ctx: Context) -> Section | None:
    """Certified and attacked radii of a few rows, and the least important units clamped."""
    planned = plan(ctx)
    if planned is None:
        return None
    method = CertifiedRadius(
        methods=planned.methods,
        max_radius=planned.max_radius,
        attack=NearestAttack(seed=ctx.seed),
    )
    try:
        found = method.run(
            ctx.net,
            planned.material.call,
            labels=planned.material.labels,
            within=planned.within,
            seconds=ctx.budget.share(0.7),
            progress=ctx.progress,
        )
    except BoundError as e:
        ctx.budget.skip("certified claims", str(e), e.hint or "the method CertifiedRadius")
        return None
    for name, num in found.left_out.items():
        ctx.budget.skip(
            f"{name} of {num} of {len(found.rows)} rows, for their radii",
            "the share of the time was used up",
            "a larger --budget",
        )
    page = _Page(ctx, planned, found)
    edited = _edit(ctx, planned, found)
    blocks, findings = page.blocks(), page.findings()
    if edited is not None:
        blocks.append(_edit_table(edited[1], page))
        findings.append(_edit_finding(page, *edited))
    return Section(
        id="bounds",
        title="What is proved",
        summary=page.summary(),
        blocks=tuple(blocks),
        findings=tuple(ctx.signed(f) for f in findings),
    )


class _Page:
    """The radii in words, tables and charts."""

    def __init__(self, ctx: Context, planned: Plan, found: RadiusResult) -> None:
        self.ctx, self.planned, self.found = ctx, planned, found
        self.rows = found.rows
        self.certified = [r.certified for r in self.rows if r.certified]
        self.attacked = [r.attacked for r in self.rows if r.attacked]
        self.within = _range(planned.within)

    @property
    def set_in_words(self) -> str:
        """What may move, and how."""
        inside = f" within {self.within}" if self.within else ""
        return f"every input of the network{inside} that differs by at most the radius everywhere"

    def summary(self) -> str:
        """What was done, and what came of it."""
        num, proved = len(self.rows), len(self.certified)
        wrong = sum(not r.is_right for r in self.rows)
        methods = ", ".join(self.planned.methods)
        unknown = num - proved - wrong
        rest = f" Of {unknown} rows nothing beyond the row itself is proved." if unknown else ""
        return (
            f"For {num} rows, how far every number of the input may move at once (the L-inf "
            f"radius) before the class can change. The certified radius is proved: no input "
            f"nearer is of another class, over the reals, by {methods} bounds in float64 rounded "
            "outwards. The attacked radius is a distance at which gradient descent found an "
            "input of another class, checked on the network itself. Between the two nothing is "
            f"known. {proved} rows have a certified radius; {wrong} are classified wrongly as "
            f"they are.{rest}"
        )

    # ---- blocks -------------------------------------------------------------

    def blocks(self) -> list[Block]:
        """The accuracy over radius, both distributions, and all rows."""
        return [self._curve(), *self._histograms(), self._table()]

    def accuracy(self, radius: float) -> tuple[float, float]:
        """At least, by proof; at most, by attack: the share of rows that keep their class."""
        num = len(self.rows)
        proved = sum(r.certified is not None and r.certified >= radius for r in self.rows)
        broken = sum(r.attacked is not None and r.attacked <= radius for r in self.rows)
        return proved / num, (num - broken) / num

    def _curve(self) -> Curve:
        last = max([*self.certified, *self.attacked], default=self.planned.max_radius)
        x = [last * i / (_POINTS - 1) for i in range(_POINTS)]
        low, high = zip(*(self.accuracy(r) for r in x), strict=True)
        return Curve(
            title="Accuracy when every input within a radius counts",
            x=tuple(x),
            y=tuple(low),
            x_title="radius",
            y_title="share of rows",
            low=tuple(low),
            high=tuple(high),
            note="Points: the share of rows proved to keep their class. Whiskers reach up to the "
            "share that no attack changed: the truth lies on the whisker. The left end counts "
            "the rows as they are.",
        )

    def _histograms(self) -> list[Histogram]:
        last = max([*self.certified, *self.attacked], default=0.0)
        if last == 0:
            return []
        edges = [last * i / _BINS for i in range(_BINS + 1)]
        notes = (
            "Rows whose radius is proved; no nearer input is of another class.",
            "Rows of which a nearer input of another class was not found.",
        )
        return [
            Histogram(
                title=f"{name} radii",
                edges=tuple(edges),
                counts=_counts(values, edges),
                unit="radius",
                note=f"{len(values)} of {len(self.rows)} rows. {note}",
            )
            for name, values, note in zip(
                ("Certified", "Attacked"), (self.certified, self.attacked), notes, strict=True
            )
        ]

    def _table(self) -> Table:
        rows: list[tuple[Cell, ...]] = [
            (
                i,
                self.name(r.label),
                self.name(r.predicted),
                r.certified,
                r.attacked,
                r.method or None,
                _known(r),
            )
            for i, r in enumerate(self.rows)
        ]
        return Table(
            title="All rows",
            columns=(
                Column(name="row", title="Row", role="number"),
                Column(name="label", title="Label"),
                Column(name="given", title="Given"),
                Column(name="certified", title="Certified", role="number", help="radius, proved"),
                Column(
                    name="attacked",
                    title="Attacked",
                    role="number",
                    help="radius at which a change was found",
                ),
                Column(name="by", title="By", help="the bounds that proved it"),
                Column(name="rest", title="The rest", help="what is not known"),
            ),
            rows=tuple(rows),
            note=f"Radii are in units of the network's input. The set: {self.set_in_words}.",
        )

    def name(self, c: int) -> str:
        """Of a class."""
        names = self.planned.material.class_names
        return names[c] if c < len(names) else str(c)

    # ---- findings -----------------------------------------------------------

    def record(self, method: str, metric: str, **options: Json) -> Record:
        """How it was made."""
        return record(
            self.ctx.net,
            self.planned.material,
            method=method,
            metric=metric,
            seed=self.ctx.seed,
            options=options,
            engine="graph",
        )

    def certificate(self, share: float = 1.0) -> str:
        """The set, the arithmetic and the network; for a share of each radius."""
        part = "" if share == 1 else f", here {share:g} times the row's certified radius"
        return (
            f"over {self.found.holds}; the set is {self.set_in_words}{part}; bounds by "
            f"{', '.join(self.planned.methods)} in float64, rounded outwards; network "
            f"{self.ctx.net.name}, SHA-256 {self.ctx.model_hash}"
        )

    def findings(self) -> list[Finding]:
        """Proved radii, proved accuracy for pixels, attacked radii."""
        found = [self._radius(), self._attack()]
        if self.planned.material.kind is RowKind.IMAGE and self.planned.within is not None:
            found.insert(1, self._grey_level())
        return found

    def _radius(self) -> Finding:
        method = self.record("bounds.radius", "certified radius")
        right = [r.certified or 0.0 for r in self.rows if r.is_right]
        proved = len(self.certified)
        return Finding(
            id="bounds/certified",
            claim=f"{proved} of {len(self.rows)} rows keep their class under every change of the "
            "input up to a proved radius of their own.",
            subject="logits",
            effect=statistics.median(right) if proved else None,
            unit="L-inf radius, median of the rows classified correctly",
            interval=Interval(
                low=min(right), high=max(right), level=1.0, method="least and largest of the rows"
            )
            if proved
            else None,
            evidence=Evidence.CERTIFIED if proved else Evidence.OBSERVED,
            verdict=Verdict.HOLDS if proved else Verdict.UNKNOWN,
            over=self.planned.over,
            record=method,
            certificate=self.certificate() if proved else "",
            caveats=(
                "a statement about these rows and not about others",
                "rounding in the network's own arithmetic is not part of it",
            ),
        )

    def _grey_level(self) -> Finding:
        dark, bright = self.planned.within or (torch.zeros(1), torch.ones(1))
        widths = (bright - dark).double() * _GREY_LEVEL  # of each channel, as the network sees it
        low, high = self.accuracy(float(widths.max()))[0], self.accuracy(float(widths.min()))[1]
        return Finding(
            id="bounds/grey-level",
            claim=f"At least {low:.0%} of the rows are classified correctly and stay so whatever "
            "all pixels change to at once within 1/255 of their range.",
            subject="logits",
            effect=low,
            unit="share of rows",
            interval=Interval(low=low, high=high, level=1.0, method="proof below, attack above"),
            evidence=Evidence.CERTIFIED if low > 0 else Evidence.OBSERVED,
            verdict=Verdict.HOLDS if low > 0 else Verdict.UNKNOWN,
            over=self.planned.over,
            record=self.record("bounds.radius", "certified accuracy", radius=float(widths.max())),
            certificate=self.certificate() if low > 0 else "",
            caveats=("a statement about these rows and not about others",),
        )

    def _attack(self) -> Finding:
        searched = [r for r in self.rows if r.searched and r.is_right]
        some = bool(self.attacked)
        return Finding(
            id="bounds/attacked",
            claim=f"Of {len(searched)} rows that are classified correctly, {len(self.attacked)} "
            "have an input of another class near them, which was found and run again.",
            subject="logits",
            effect=statistics.median(self.attacked) if some else None,
            unit="L-inf radius, median of those found",
            interval=Interval(
                low=min(self.attacked),
                high=max(self.attacked),
                level=1.0,
                method="least and largest of the rows",
            )
            if some
            else None,
            evidence=Evidence.OBSERVED,
            verdict=Verdict.HOLDS if some else Verdict.UNKNOWN,
            over=self.planned.over,
            record=self.record("bounds.nearest_attack", "distance to another class"),
            caveats=("an attack that finds nothing nearer proves nothing",),
        )


def _known(r: Radius) -> str:
    """In words; what is unknown is said to be."""
    if not r.is_right:
        return "wrong as it is"
    if r.certified and r.attacked is not None:
        return "unknown between"
    if r.certified:
        return "unknown beyond"
    return "unknown" if r.attacked is None else "unknown below"


def _counts(values: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    last = edges[-1]
    return tuple(
        sum(a <= v < b or (b == last and v == last) for v in values)
        for a, b in itertools.pairwise(edges)
    )


def _range(within: tuple[Tensor, Tensor] | None) -> str:
    if within is None:
        return ""
    low, high = (float(f(side)) for f, side in zip((torch.min, torch.max), within, strict=True))
    return f"[{low:g}, {high:g}]"


# ---- the edit ---------------------------------------------------------------


def _edit(ctx: Context, planned: Plan, found: RadiusResult) -> tuple[Importance, EditResult] | None:
    """The least important group of units held at its mean, on half of each certified box."""
    rows = [i for i, r in enumerate(found.rows) if r.certified][:_EDIT_ROWS]
    done = [] if ctx.ablated is None else ctx.ablated.done
    groups = [i for i in done if i.group.kind == "unit group"]
    if not rows or not groups:
        why = "ablation measured no group of units" if rows else "no row has a certified radius"
        ctx.budget.skip("a certified edit", why, "a larger --budget")
        return None
    least = min(groups, key=lambda i: abs(i.effect))
    means = unit_means(ctx.net, ctx.material, sorted(least.group.members), 64)
    material = planned.material.rows(ctx.net, torch.tensor(rows))
    radii = torch.tensor([_EDIT_SHARE * (found.rows[i].certified or 0.0) for i in rows])
    best = max(planned.methods, key=list(Method).index)
    try:
        result = CertifiedEdit(
            method=min(best, Method.CROWN, key=list(Method).index),
            attack=NearestAttack(seed=ctx.seed),
        ).run(
            ctx.net,
            material.call,
            radii.double(),
            ablations(ctx.net, least.group.members, means),
            labels=material.labels,
            within=planned.within,
            seconds=ctx.budget.share(0.8),
            progress=ctx.progress,
        )
    except (BoundError, EditError) as e:
        ctx.budget.skip(f"the certified edit of {least.group.name}", str(e), e.hint or "")
        return None
    if result.left_out:
        ctx.budget.skip(
            f"the certified edit on {len(result.left_out)} of {len(rows)} rows",
            "the share of the time was used up",
            "a larger --budget",
        )
    if not result.boxes:
        return None
    return least, result


def _edit_table(result: EditResult, page: _Page) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            page.name(b.label),
            b.radius,
            b.plain,
            b.edited,
            b.shift.low,
            b.shift.high,
            str(b.verdict),
        )
        for b in result.boxes.values()
    ]
    return Table(
        title="The edit on every row's box",
        columns=(
            Column(name="label", title="Label"),
            Column(name="radius", title="Radius", role="number"),
            Column(name="plain", title="Margin from", role="number", help="without the edit"),
            Column(name="edited", title="Edited from", role="number", help="with the edit"),
            Column(name="low", title="Shift from", role="number", help="of any margin"),
            Column(name="high", title="Shift to", role="number", help="of any margin"),
            Column(name="verdict", title="Kept", help="the class, in the whole box"),
        ),
        rows=tuple(rows),
        note="Margins are logits of the label minus the nearest other; all bounds are proved for "
        f"every input in the box, which has {_EDIT_SHARE:g} times the row's certified radius.",
    )


def _edit_finding(page: _Page, least: Importance, result: EditResult) -> Finding:
    boxes: list[EditedBox] = list(result.boxes.values())
    kept = sum(b.verdict is Verdict.HOLDS for b in boxes)
    broken = any(b.verdict is Verdict.DOES_NOT_HOLD for b in boxes)
    proved = kept == len(boxes)
    verdict = Verdict.DOES_NOT_HOLD if broken else Verdict.UNKNOWN
    return Finding(
        id="bounds/edit",
        claim=f"Clamping {least.group.name} to their mean changes the class of no input in the "
        f"boxes of {len(boxes)} rows.",
        subject=least.group.name,
        effect=kept / len(boxes),
        unit="share of boxes for which it is proved",
        evidence=Evidence.CERTIFIED if proved else Evidence.OBSERVED,
        verdict=Verdict.HOLDS if proved else verdict,
        over=f"the boxes of {len(boxes)} of {page.planned.over}",
        record=record(
            page.ctx.net,
            page.planned.material,
            method="bounds.certified_edit",
            metric="class in the box",
            seed=page.ctx.seed,
            options={"share_of_certified_radius": _EDIT_SHARE},
            edits=least.edits,
            engine="graph",
        ),
        certificate=page.certificate(_EDIT_SHARE) if proved else "",
        caveats=(
            f"no margin changes by more than {result.largest_shift:.3g} logits in these boxes, "
            "which is proved as well",
            "the group with the least effect of those that were ablated",
        ),
    )

"""What every unit does: strength, sparsity, dead, dense and redundant, what it answers to."""

from __future__ import annotations

import time
from collections.abc import Sequence

from patchclamp.audit.choose import num_units, unit_taps
from patchclamp.audit.classes import MAX_OBSERVATIONS, Selected, classes, selected
from patchclamp.audit.context import Context, listed
from patchclamp.audit.examples import examples
from patchclamp.core.document import Block, Cell, Column, Histogram, Section, Table
from patchclamp.core.findings import Evidence, Finding, Interval, Null, Record, Verdict
from patchclamp.methods.material import record
from patchclamp.methods.neurons.activity import Activity, SiteActivity
from patchclamp.methods.neurons.redundancy import Redundancy, RedundancyResult
from patchclamp.methods.statistics import wilson

_MAX_ROWS = 2000
_MAX_UNITS_REDUNDANCY = 2048
_SHARE = 0.1
"""Of the time that is left, for redundant pairs."""
_COLUMNS = (
    Column(name="site", title="Site", role="address"),
    Column(name="unit", title="Unit"),
    Column(name="mean", title="Mean", role="bar"),
    Column(name="variance", title="Variance", role="bar", help="over all rows and positions"),
    Column(name="peak", title="Peak", role="number", help="largest value on this data"),
    Column(name="active", title="Active", role="share", help="share of values above zero"),
    Column(
        name="sparsity",
        title="Sparsity",
        role="share",
        help="lifetime sparsity: 0 always alike, 1 answers once",
    ),
    Column(name="dead", title="Dead", role="flag"),
    Column(name="dense", title="Dense", role="flag"),
    Column(name="prefers", title="Prefers", help="class it tells best from the rest"),
    Column(name="auroc", title="AUROC", role="number", help="on rows not used to choose the class"),
    Column(name="low", title="low", role="number", help="of the 95% interval"),
    Column(name="high", title="high", role="number", help="of the 95% interval"),
    Column(
        name="p",
        title="p",
        role="number",
        help="shuffled labels, corrected for all units of the site",
    ),
)


def units(ctx: Context) -> Section:
    """The units of the network's nonlinearities."""
    taps = unit_taps(ctx.net)
    method = Activity(batch_size=32, max_observations=2 * MAX_OBSERVATIONS)
    ctx.activities = method.run(ctx.net, ctx.material, taps, ctx.progress)
    known = classes(ctx)
    chosen = selected(ctx, known)
    names = known.names if known is not None else ()
    pairs = _redundant(ctx)
    findings = [_dead(ctx), *_selective(ctx, chosen, names), *_redundancy(ctx, pairs)]
    blocks: list[Block] = [_table(ctx.activities, chosen, names), _histogram(ctx.activities)]
    if any(r.num_pairs for _, r in pairs):
        blocks.append(_pairs(pairs))
    shown = examples(ctx, chosen, names)
    if shown is not None:
        blocks.append(shown)
    total = sum(num_units(a.tap) for a in ctx.activities)
    return Section(
        id="units",
        title="Units",
        summary=f"{total:,} units in {len(taps)} sites ({listed([t.label for t in taps], 4)}), "
        f"over {ctx.over}. Selectivity is the area under the ROC curve (AUROC) of one unit alone "
        "for the class it prefers, chosen on one half of the rows and measured on the other.",
        blocks=tuple(blocks),
        findings=tuple(ctx.signed(f) for f in findings),
    )


def _record(ctx: Context, method: str, metric: str) -> Record:
    return record(ctx.net, ctx.material, method=method, metric=metric, seed=ctx.seed)


def _selective(ctx: Context, chosen: Sequence[Selected], names: Sequence[str]) -> list[Finding]:
    """How many units are selective, and the most selective unit of the three best sites."""
    if not chosen:
        return []
    num = sum(int((c.result.p_family <= 0.05).sum()) for c in chosen)
    total = sum(c.result.p.numel() for c in chosen)
    span = wilson(num, total)
    share = Finding(
        id="units/selective",
        claim="More units tell a class from the rest than shuffled labels would let through.",
        subject=listed([c.activity.tap.label for c in chosen]),
        effect=num / total,
        unit="share of units with corrected p at most .05",
        interval=span,
        null=Null(kind="chance that any unit of a site passes under shuffled labels", mean=0.05),
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if span.low > 0.05 else Verdict.UNKNOWN,
        over=ctx.over,
        record=_record(ctx, "neurons.selectivity", "AUROC of the preferred class"),
        caveats=("the interval treats units as independent draws, which they are not",),
    )
    best = sorted(chosen, key=lambda c: -float(c.result.low.max()))[:3]
    return [share, *(_most_selective(ctx, c, names) for c in best)]


def _most_selective(ctx: Context, c: Selected, names: Sequence[str]) -> Finding:
    r, label = c.result, c.activity.tap.label
    u = int(r.low.argmax())
    name = str(c.activity.table["unit"][u])
    holds = float(r.low[u]) > r.null_high and float(r.p_family[u]) <= 0.05
    return Finding(
        id=f"units/selective/{label}/{name}",
        claim=f"Unit {name} of {label} answers to class {names[int(r.best[u])]} more than to "
        "the rest.",
        subject=f"{label} unit {name}",
        effect=float(r.auroc[u]),
        unit="AUROC",
        interval=Interval(
            low=float(r.low[u]),
            high=float(r.high[u]),
            method=f"normal, {r.num_groups} independent groups of rows",
        ),
        null=Null(
            kind="largest of all units of the site under shuffled labels",
            mean=r.null_mean,
            high=r.null_high,
            num=r.num_shuffles,
            p=float(r.p_family[u]),
        ),
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if holds else Verdict.UNKNOWN,
        over=ctx.over,
        record=_record(ctx, "neurons.selectivity", "AUROC of the preferred class"),
        caveats=(
            f"the most selective of {r.p.numel():,} units of the site, which p and null allow for",
        ),
    )


def _dead(ctx: Context) -> Finding:
    num = sum(int(a.table["dead"].sum()) for a in ctx.activities)
    total = sum(a.table.height for a in ctx.activities)
    return Finding(
        id="units/dead",
        claim="No unit is dead on this data.",
        subject=listed([a.tap.label for a in ctx.activities]),
        effect=num / total,
        unit="share of units",
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if num == 0 else Verdict.DOES_NOT_HOLD,
        over=ctx.over,
        record=_record(ctx, "neurons.activity", "share of dead units"),
        caveats=(f"{num} of {total:,} units; a count on this data, so it has no interval",),
    )


def _redundant(ctx: Context) -> list[tuple[SiteActivity, RedundancyResult]]:
    few, many = Redundancy(seed=ctx.seed, shuffles=5), Redundancy(seed=ctx.seed)
    fitting = [a for a in ctx.activities if 2 <= a.values.shape[1] <= _MAX_UNITS_REDUNDANCY]
    if len(fitting) < len(ctx.activities):
        ctx.budget.skip(
            f"redundant pairs in {len(ctx.activities) - len(fitting)} sites",
            f"they have one unit, or more than {_MAX_UNITS_REDUNDANCY:,}",
            "the method Redundancy on the sites of interest",
        )
    made: list[tuple[SiteActivity, RedundancyResult]] = []
    deadline = time.monotonic() + ctx.budget.share(_SHARE)
    for a in fitting:
        if made and time.monotonic() > deadline:
            ctx.budget.skip(
                f"redundant pairs in {len(fitting) - len(made)} more sites, from {a.tap.label}",
                "their share of the time was used up",
                "a larger --budget",
            )
            break
        # The largest of a million pairs hardly varies from shuffle to shuffle.
        method = few if a.values.shape[1] > 512 else many
        made.append((a, method.run(a.values[:MAX_OBSERVATIONS])))
    return made


def _redundancy(
    ctx: Context, pairs: Sequence[tuple[SiteActivity, RedundancyResult]]
) -> list[Finding]:
    """The closest pair of all sites, against the closest pair after shuffling."""
    found = [(a, r) for a, r in pairs if r.closest is not None]
    if not found:
        return []
    a, r = max(found, key=lambda x: x[1].closest or 0.0)
    closest = r.closest or 0.0
    num, tested = sum(x.num_pairs for _, x in pairs), sum(x.num_tested for _, x in pairs)
    return [
        Finding(
            id="units/redundant",
            claim="Some pair of units says nearly the same thing (|correlation| at least .95).",
            subject=a.tap.label,
            effect=closest,
            unit="largest |correlation| of a pair",
            null=Null(
                kind="the same with every unit's observations turned by an offset of its own",
                mean=r.null_mean,
                high=r.null_max,
                num=r.num_shuffles,
            ),
            evidence=Evidence.OBSERVED,
            verdict=Verdict.UNKNOWN
            if r.null_max >= r.limit
            else (Verdict.HOLDS if num else Verdict.DOES_NOT_HOLD),
            over=ctx.over,
            record=_record(ctx, "neurons.redundancy", "largest |correlation|"),
            caveats=(f"{num:,} of {tested:,} pairs in {len(pairs)} sites reach the limit",),
        )
    ]


# ---- blocks -----------------------------------------------------------------


def _pairs(pairs: Sequence[tuple[SiteActivity, RedundancyResult]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for a, r in pairs:
        names = a.table["unit"]
        rows += [
            (a.tap.label, str(names[x]), str(names[y]), float(c)) for x, y, c in r.pairs.iter_rows()
        ]
    rows.sort(key=lambda row: -abs(float(row[3] or 0)))
    return Table(
        title="Redundant pairs",
        columns=(
            Column(name="site", title="Site", role="address"),
            Column(name="a", title="Unit"),
            Column(name="b", title="Unit"),
            Column(name="correlation", title="Correlation", role="bar"),
        ),
        rows=tuple(rows),
        note="At most 50 pairs a site are listed, strongest first.",
    )


def _table(
    activities: Sequence[SiteActivity], chosen: Sequence[Selected], names: Sequence[str]
) -> Table:
    selectivity = {c.activity.tap.label: c for c in chosen}
    total = sum(a.table.height for a in activities)
    rows: list[tuple[Cell, ...]] = []
    for a in activities:
        most = max(1, a.table.height * _MAX_ROWS // max(total, _MAX_ROWS))
        kept = a.table.with_row_index("number").top_k(most, by="std").sort("number")
        for row in kept.iter_rows(named=True):
            rows.append(
                (
                    row["site"],
                    row["unit"],
                    row["mean"],
                    row["std"] ** 2,
                    row["peak"],
                    row["active"],
                    row["sparsity"],
                    row["dead"],
                    row["dense"],
                    *_answers(selectivity.get(a.tap.label), row["number"], names),
                )
            )
    shown = f"{len(rows):,} of {total:,} units, those that vary most in each site. "
    return Table(
        title="Units",
        columns=_COLUMNS,
        rows=tuple(rows),
        note=(shown if len(rows) < total else "")
        + "AUROC, its interval and p are for the preferred class.",
    )


def _answers(c: Selected | None, unit: int, names: Sequence[str]) -> tuple[Cell, ...]:
    if c is None:
        return (None, None, None, None, None)
    r = c.result
    return (
        names[int(r.best[unit])],
        float(r.auroc[unit]),
        float(r.low[unit]),
        float(r.high[unit]),
        float(r.p_family[unit]),
    )


def _histogram(activities: Sequence[SiteActivity]) -> Histogram:
    counts = [0] * 20
    for a in activities:
        for s in a.table["sparsity"].to_list():
            counts[min(19, int(s * 20))] += 1
    return Histogram(
        title="Lifetime sparsity of the units",
        edges=tuple(i / 20 for i in range(21)),
        counts=tuple(counts),
        unit="sparsity",
        note="0: always alike. 1: answers to a single input.",
    )

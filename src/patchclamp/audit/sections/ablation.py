"""What breaks when layers, heads or groups of units are taken away."""

from __future__ import annotations

from collections.abc import Sequence

from patchclamp.audit.budget import affordable
from patchclamp.audit.choose import channel_groups, head_groups, layer_groups, usable
from patchclamp.audit.context import Context
from patchclamp.audit.reserve import share_for_ablation
from patchclamp.core.document import Bars, Cell, Column, Section, Table
from patchclamp.core.findings import Evidence, Finding, Verdict
from patchclamp.core.sites import Tap
from patchclamp.methods.material import Material, record, score_for
from patchclamp.methods.neurons.ablation import Ablation, AblationResult, Group, Importance

_KIND_TITLES = {
    "layer": "Layers",
    "attention layer": "Attention layers",
    "mlp layer": "MLP layers",
    "head": "Heads",
    "unit group": "Groups of units",
}


def ablation(ctx: Context) -> Section:
    """Mean ablation of every layer, head and group of units, as far as the time goes."""
    groups = _groups(ctx)
    runs = len(groups) + Ablation.min_nulls * len({g.null_key for g in groups})
    own = share_for_ablation(ctx)
    material = affordable(ctx.net, ctx.material, ctx.budget, passes=runs, share=0.7 * own)
    result = Ablation(seed=ctx.seed).run(
        ctx.net,
        material,
        score_for(ctx.net, material),
        groups,
        seconds=ctx.budget.share(0.9 * own),
        progress=ctx.progress,
    )
    ctx.ablated = result
    if result.skipped:
        ctx.budget.skip(
            f"ablation of {len(result.skipped)} of {len(groups)} groups, from {result.skipped[0]}",
            f"one ablation takes about {result.seconds_each:.2f} s, and each kind of group needs "
            f"{result.num_nulls} random groups beside it",
            "a larger --budget",
        )
    by_kind = {k: [i for i in result.done if i.group.kind == k] for k in _KIND_TITLES}
    return Section(
        id="ablation",
        title="Ablation",
        summary=f"Each group of units was held at its mean over the data (mean ablation) and the "
        f"{ctx.score.name} compared with the plain run, row by row; beside it the same for "
        f"{result.num_nulls} random groups of as many units, over {material.num} rows. Without "
        f"edits the score is "
        f"{result.plain:.4f} {ctx.score.unit}. {len(result.done)} groups were ablated.",
        blocks=(
            *(
                _bars(title, by_kind[kind], ctx.score.unit)
                for kind, title in _KIND_TITLES.items()
                if by_kind[kind]
            ),
            _table(result, ctx.score.unit),
        ),
        findings=tuple(ctx.signed(f) for f in _findings(ctx, material, result)),
    )


def _groups(ctx: Context) -> list[Group]:
    """Layers first, then heads, then groups of units: the order in which time is spent."""
    table = ctx.net.quick_sites()

    def named(start: str, end: str) -> list[Tap]:
        names = [a for a in table.aliases if a.startswith(start) and a.endswith(end)]
        return [tap for tap in ctx.net.taps(names) if usable(tap)] if names else []

    attention, mlp = named("attn.", ".out"), named("mlp.", ".out")
    heads = named("attn.", ".z")
    if not attention and not mlp:
        taps = [a.tap for a in ctx.activities]
        if ctx.net.capture_error() is None:
            structural = [a for a in ctx.net.sites.aliases if a.startswith("attn.")]
            zs = [a for a in structural if a.endswith(".z")]
            heads = [t for t in (ctx.net.taps(zs) if zs else []) if usable(t)]
        return [*layer_groups(taps), *head_groups(heads), *channel_groups(ctx.activities)]
    return [
        *_renamed(layer_groups(attention), "attention layer"),
        *_renamed(layer_groups(mlp), "mlp layer"),
        *head_groups(visited(heads)),
        *(channel_groups(ctx.activities) if _small(ctx) else []),
    ]


def visited(taps: Sequence[Tap]) -> list[Tap]:
    """Layers in an order whose every beginning is spread over the depth (van der Corput)."""
    bits = max(1, (len(taps) - 1).bit_length())
    order = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits)]
    return [taps[i] for i in order if i < len(taps)]


def _small(ctx: Context) -> bool:
    """Groups of units are worth their time where there are few sites."""
    if len(ctx.activities) <= 8:
        return True
    ctx.budget.skip(
        "ablation of groups of units inside the MLP layers",
        f"{len(ctx.activities)} sites; layers and heads come first",
        "the method Ablation on the sites of interest",
    )
    return False


def _renamed(groups: Sequence[Group], kind: str) -> list[Group]:
    return [Group(name=g.name, kind=kind, members=g.members, pool=g.pool) for g in groups]


def _bars(title: str, done: Sequence[Importance], unit: str) -> Bars:
    return Bars(
        title=title,
        labels=tuple(i.group.name for i in done),
        values=tuple(i.effect for i in done),
        unit=unit,
        low=tuple(i.interval.low for i in done),
        high=tuple(i.interval.high for i in done),
        null_low=tuple(_or_mean(i.null.low, i.null.mean) for i in done),
        null_high=tuple(_or_mean(i.null.high, i.null.mean) for i in done),
        note="Positive: the network gets worse without it. Shaded: the central 95% of random "
        "groups of as many units. Whiskers: 95% interval over rows.",
    )


def _or_mean(value: float | None, mean: float) -> float:
    return mean if value is None else value


def _table(result: AblationResult, unit: str) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            i.group.name,
            i.group.kind,
            i.group.size,
            i.effect,
            i.interval.low,
            i.interval.high,
            i.null.mean,
            _or_mean(i.null.high, i.null.mean),
            i.null.p,
        )
        for i in sorted(result.done, key=lambda i: -i.effect)
    ]
    return Table(
        title="All ablations",
        columns=(
            Column(name="group", title="Group", role="address"),
            Column(name="kind", title="Kind"),
            Column(name="units", title="Units", role="number"),
            Column(name="effect", title="Effect", role="bar", unit=unit),
            Column(name="low", title="low", role="number", help="of the 95% interval"),
            Column(name="high", title="high", role="number", help="of the 95% interval"),
            Column(name="null", title="Random groups", role="number", help="mean effect"),
            Column(name="null_high", title="their 97.5%", role="number"),
            Column(name="p", title="p", role="number", help="not corrected for many groups"),
        ),
        rows=tuple(rows),
    )


def _verdict(i: Importance) -> Verdict:
    """Holds where the whole interval is beyond the null's range, fails where it is below."""
    null_high = _or_mean(i.null.high, i.null.mean)
    if i.interval.low > null_high and i.effect > 0:
        return Verdict.HOLDS
    return Verdict.DOES_NOT_HOLD if i.interval.high < null_high else Verdict.UNKNOWN


def _findings(ctx: Context, material: Material, result: AblationResult) -> list[Finding]:
    """One finding a kind's strongest three groups; the table has all."""
    found = []
    for kind in _KIND_TITLES:
        done = sorted((i for i in result.done if i.group.kind == kind), key=lambda i: -i.effect)
        for i in done[:3]:
            found.append(
                Finding(
                    id=f"ablation/{i.group.name}",
                    claim=f"{ctx.net.name} needs {i.group.name} more than it needs random units "
                    f"of the same number.",
                    subject=i.group.name,
                    effect=i.effect,
                    unit=ctx.score.unit,
                    interval=i.interval,
                    null=i.null,
                    evidence=Evidence.INTERVENED,
                    verdict=_verdict(i),
                    over=f"{material.num} rows of {material.name}",
                    record=record(
                        ctx.net,
                        material,
                        method="neurons.ablation",
                        metric=f"change of {ctx.score.name}",
                        seed=ctx.seed,
                        options={"num_nulls": i.null.num},
                        edits=i.edits,
                    ),
                    caveats=(
                        f"among the strongest 3 of {len(done)} of its kind; p is not corrected "
                        "for that choice",
                    ),
                )
            )
    return found

"""How little it takes to change answers, and whether the gradients that say so can be trusted."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.audit.budget import seconds_per_row
from patchclamp.audit.context import Context
from patchclamp.audit.provable import input_limits
from patchclamp.audit.reserve import left_for_attacks, unfit_for_attacks
from patchclamp.core.document import Block, Cell, Column, Curve, Section, Table
from patchclamp.core.errors import PatchclampError
from patchclamp.core.findings import Evidence, Finding, Null, Record, Verdict
from patchclamp.methods.material import Material, record
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.ensemble import CLEAN, Combined, Ensemble
from patchclamp.methods.robustness.attacks.masking import Masking, MaskingCheck
from patchclamp.methods.robustness.attacks.masking import Verdict as MaskingVerdict
from patchclamp.methods.statistics import wilson

_RADII = (2 / 255, 8 / 255, 32 / 255)
"""As shares of the range of the inputs."""
_MAX_ROWS, _MIN_ROWS = 48, 8
_PLANS = ((20, 200, 800), (6, 30, 200))
"""Steps, queries, and about how many forward passes a row then takes, all radii and the check
for masked gradients together: the first that fits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tried:
    """One radius: the ensemble, and random noise of the same size."""

    radius: float
    steps: int
    found: Combined
    noisy: float


def robustness(ctx: Context) -> Section | None:
    """Attacked accuracy at a few radii; None, with the reason, where nothing can be attacked."""
    reason = unfit_for_attacks(ctx)
    if reason is not None:
        ctx.budget.skip("attacks", *reason)
        return None
    seconds = left_for_attacks(ctx)
    most, each = min(_MAX_ROWS, ctx.material.num), seconds_per_row(ctx.net, ctx.material)
    plans = [(min(most, int(seconds / (each * p))), s, q) for s, q, p in _PLANS]
    fitting = [plan for plan in plans if plan[0] >= min(_MIN_ROWS, most)]
    if not fitting:
        why = f"a row takes about {each * _PLANS[-1][2]:.1f} s, and {seconds:.0f} s were left"
        ctx.budget.skip("attacks", why, "a larger --budget")
        return None
    num, steps, queries = fitting[0]
    rows = ctx.material.rows(ctx.net, torch.arange(num))
    try:
        return _section(ctx, rows, steps, queries, time.monotonic() + seconds)
    except PatchclampError as e:
        ctx.budget.skip("attacks", str(e), e.hint or "the attacks in Python")
        return None


def _section(
    ctx: Context, rows: Material, steps: int, queries: int, deadline: float
) -> Section | None:
    within, span = input_limits(ctx)
    network = Classifier.open(ctx.net, rows.call, within=within)
    labels = rows.labels
    if labels is None:
        return None
    ensemble = Ensemble.standard(
        Norm.LINF,
        network.num_classes,
        num_steps=steps,
        num_queries=queries,
        seed=ctx.seed,
    )
    tried: list[_Tried] = []
    asked = MaskingCheck(num_steps=steps, num_queries=queries, seed=ctx.seed)
    masking = asked.run(network, network.value, labels, _RADII[1] * span)
    for share in _RADII:
        if tried and time.monotonic() > deadline:
            ctx.budget.skip(
                f"attacks within {share * span:.4g}", "the time was used up", "a larger --budget"
            )
            continue
        found = ensemble.run(network, network.value, labels, share * span, progress=ctx.progress)
        noisy = _noisy(network, labels, share * span, ctx.seed)
        tried.append(_Tried(radius=share * span, steps=steps, found=found, noisy=noisy))
    blocks: list[Block] = [_curve(tried), _table(tried[-1].found, rows), _signs(masking)]
    return Section(
        id="robustness",
        title="How little changes an answer",
        summary=f"{rows.num} rows were attacked by {_names(tried)}, all within a distance that "
        "no element of the input exceeds (L-inf), in units of the network's input. A row counts "
        "as broken where any attack breaks it, which a fresh run of the network confirms. What "
        "no attack breaks may still be broken by another; what is proved stands further down.",
        blocks=tuple(blocks),
        findings=tuple(
            ctx.signed(f) for f in _findings(ctx, rows, tried, masking, _RADII[1] * span)
        ),
    )


def _noisy(network: Classifier, labels: Tensor, radius: float, seed: int) -> float:
    """The share of rows that stay right with every element moved by the radius at random."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, network.value.shape, generator=generator) * 2 - 1
    x = network.value + radius * signs.to(network.value)
    if network.within is not None:
        low, high = network.within
        x = torch.minimum(torch.maximum(x, low), high)
    answers = network.answers(x, torch.arange(network.num)).argmax(1)
    return float((answers == labels).double().mean())


def _names(tried: list[_Tried]) -> str:
    names = dict.fromkeys(t.attack for each in tried for t in each.found.tried)
    return ", ".join(names) or "nothing: no row is right as it is"


# ---- findings -----------------------------------------------------------------


def _findings(
    ctx: Context, rows: Material, tried: list[_Tried], masking: Masking, radius: float
) -> list[Finding]:
    return [*(_attacked(ctx, rows, t) for t in tried), _masked(ctx, rows, masking, tried, radius)]


def _record(
    ctx: Context, rows: Material, method: str, metric: str, radius: float, steps: int
) -> Record:
    return record(
        ctx.net,
        rows,
        method=method,
        metric=metric,
        seed=ctx.seed,
        options={"norm": str(Norm.LINF), "radius": radius, "num_steps": steps},
    )


def _attacked(ctx: Context, rows: Material, t: _Tried) -> Finding:
    num = len(t.found.table)
    left = sum(row.broken_by is None for row in t.found.table)
    broken = sum(row.broken_by not in (None, CLEAN) for row in t.found.table)
    return Finding(
        id=f"robustness/attacked/{t.radius:.4g}",
        claim=f"{broken} of {num} rows change their answer when no element of the input moves by "
        f"more than {t.radius:.4g}.",
        subject="logits",
        effect=left / num,
        unit="share of rows that stay right: robust accuracy is at most this",
        interval=wilson(left, num),
        null=Null(kind="random noise of the same size", mean=t.noisy, num=1),
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if broken else Verdict.UNKNOWN,
        over=f"{rows.num} rows of {rows.name}",
        record=_record(
            ctx, rows, "robustness.ensemble", "accuracy under attack", t.radius, t.steps
        ),
        caveats=("an upper bound: an attack that finds nothing proves nothing",),
    )


def _masked(
    ctx: Context, rows: Material, m: Masking, tried: list[_Tried], radius: float
) -> Finding:
    honest = m.verdict is MaskingVerdict.NO_SIGN
    unknown = m.verdict is MaskingVerdict.UNKNOWN
    shown = ", ".join(sign.name for sign in m.found)
    return Finding(
        id="robustness/gradients",
        claim="Gradients do not hide how easily answers change (no gradient masking).",
        subject="logits",
        effect=float(len(m.found)),
        unit="signs of masked gradients",
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if honest else Verdict.UNKNOWN if unknown else Verdict.DOES_NOT_HOLD,
        over=f"{m.num_rows} rows of {rows.name} that are right",
        record=_record(ctx, rows, "robustness.masking", "signs", radius, tried[0].steps),
        caveats=(m.statement, *((f"signs: {shown}",) if shown else ())),
    )


# ---- what is drawn --------------------------------------------------------------


def _curve(tried: list[_Tried]) -> Curve:
    clean = tried[0].found
    num = len(clean.table)
    lefts = [sum(r.broken_by is None for r in t.found.table) for t in tried]
    right = sum(r.broken_by != CLEAN for r in clean.table)
    spans = [wilson(n, num) for n in (right, *lefts)]
    return Curve(
        title="Accuracy under attack",
        x=(0.0, *(t.radius for t in tried)),
        y=tuple(n / num for n in (right, *lefts)),
        x_title="radius",
        y_title="share of rows right",
        low=tuple(s.low for s in spans),
        high=tuple(s.high for s in spans),
        note="The left end is accuracy as it is; with random noise of the same sizes it is "
        + ", ".join(f"{t.noisy:.2f}" for t in tried)
        + ".",
    )


def _table(found: Combined, rows: Material) -> Table:
    names = rows.class_names

    def name(c: int) -> str:
        return names[c] if c < len(names) else str(c)

    cells: list[tuple[Cell, ...]] = [
        (
            r.row,
            name(r.label),
            name(r.clean),
            name(r.answer),
            r.broken_by or "nothing found",
            r.margin,
            r.distance,
        )
        for r in found.table
    ]
    return Table(
        title=f"Rows within {float(found.radius.max()):.4g}",
        columns=(
            Column(name="row", title="Row"),
            Column(name="label", title="Label"),
            Column(name="given", title="Given", help="the class as it is"),
            Column(name="attacked", title="Attacked", help="the class at the worst point found"),
            Column(name="by", title="Broken by"),
            Column(name="margin", title="Margin", role="number", help="logits, at that point"),
            Column(name="distance", title="Distance", role="number", help="L-inf, of that point"),
        ),
        rows=tuple(cells),
    )


def _signs(m: Masking) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (s.name, s.measured, s.threshold, s.is_there, s.meaning) for s in m.signs
    ]
    return Table(
        title="Signs of masked gradients",
        columns=(
            Column(name="sign", title="Sign"),
            Column(name="measured", title="Measured", role="number"),
            Column(name="threshold", title="Above", role="number"),
            Column(name="there", title="There", role="flag"),
            Column(name="meaning", title="What was measured"),
        ),
        rows=tuple(rows),
        note=m.statement,
    )

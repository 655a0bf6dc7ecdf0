"""Whether the instruments can be trusted here: the engines checked against each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from patchclamp.audit.choose import spread
from patchclamp.audit.context import Context
from patchclamp.core.document import Cell, Column, Facts, Section, Table
from patchclamp.core.edit_kinds import Scale
from patchclamp.core.errors import CaptureError, EngineError, TargetError
from patchclamp.core.findings import Evidence, Finding, Verdict
from patchclamp.core.sites import Tap
from patchclamp.engine.checks import relative_error
from patchclamp.methods.material import Material, record

_LIMIT = 1e-5
_GRADIENT_LIMIT = 1e-4
_ROWS = 4


def engines(ctx: Context) -> Section:
    """Graph against hooks, identity edits, gradients, and rows alone against rows together."""
    net = ctx.net
    few = ctx.material.rows(net, torch.arange(min(_ROWS, ctx.material.num)))
    taps = spread([a.tap for a in ctx.activities], 4)
    checks: list[tuple[str, str, float, Callable[[], float]]] = [
        ("identity", "An edit that changes nothing changes nothing, bit for bit.", 0.0,
         lambda: _identity(ctx, few, taps)),
        ("rows", "A row gives the same output alone as among others.", _LIMIT,
         lambda: _alone(ctx, few)),
        ("output", "The captured graph gives the live network's output.", _LIMIT,
         lambda: _output(ctx, few)),
        ("sites", "The captured graph gives the live network's values at shared sites.", _LIMIT,
         lambda: _sites(ctx, few, taps)),
        ("gradients", "Both engines give the same gradients at shared sites.", _GRADIENT_LIMIT,
         lambda: _gradients(ctx, few, taps)),
    ]  # fmt: skip
    findings = [_finding(ctx, few, *check) for check in checks]
    coverage = net.coverage()
    rows: list[tuple[Cell, ...]] = [
        (f.claim, f.effect, _limits(checks)[f.id], str(f.verdict)) for f in findings
    ]
    capture = "passed" if coverage.check is not None and coverage.check.passed else "not available"
    return Section(
        id="engines",
        title="Engine cross-checks",
        summary="Two engines reach the inside of this network: hooks on the live module, and code "
        "generated from its captured graph. Before anything else on this page is believed, they "
        "have to agree.",
        blocks=(
            Facts(
                title="Engines",
                items=(
                    ("hooks engine", f"{len(coverage.hooks):,} sites"),
                    ("graph engine", f"{len(coverage.graph):,} sites"),
                    ("capture checks", capture),
                    *((f"fixed: {axis}", why) for axis, why in coverage.fixed.items()),
                    *((name, why) for name, why in list(coverage.missing.items())[:12]),
                ),
                note="" if coverage.error is None else str(coverage.error),
            ),
            Table(
                title="Checks",
                columns=(
                    Column(name="check", title="Check"),
                    Column(name="difference", title="Largest relative difference", role="number"),
                    Column(name="limit", title="Limit", role="number"),
                    Column(name="verdict", title="Verdict"),
                ),
                rows=tuple(rows),
            ),
        ),
        findings=tuple(ctx.signed(f) for f in findings),
    )


def _limits(
    checks: list[tuple[str, str, float, Callable[[], float]]],
) -> dict[str, float]:
    return {f"engine/{name}": limit for name, _, limit, _ in checks}


def _finding(
    ctx: Context,
    few: Material,
    name: str,
    claim: str,
    limit: float,
    measure: Callable[[], float],
) -> Finding:
    caveats: tuple[str, ...] = ()
    effect: float | None = None
    try:
        effect = measure()
    except (CaptureError, EngineError, TargetError) as e:
        caveats = (f"not measured: {e}",)
    verdict = Verdict.UNKNOWN
    if effect is not None:
        verdict = Verdict.HOLDS if effect <= limit else Verdict.DOES_NOT_HOLD
    return Finding(
        id=f"engine/{name}",
        claim=claim,
        subject=ctx.net.name,
        effect=effect,
        unit="largest relative difference",
        evidence=Evidence.OBSERVED,
        verdict=verdict,
        over=f"{few.num} rows of {few.name}",
        record=record(
            ctx.net,
            few,
            method="engines",
            metric="largest difference over the largest value (at least 1)",
            options={"limit": limit},
            engine="hooks and graph",
        ),
        caveats=caveats,
    )


def _labels(taps: list[Tap]) -> list[str]:
    return [tap.label for tap in taps]


def _identity(ctx: Context, few: Material, taps: list[Tap]) -> float:
    plain = ctx.net.run(few.call).output
    edits = [Scale(site=label, factor=1.0) for label in _labels(taps)]
    return relative_error(ctx.net.run(few.call, edits=edits).output, plain)


def _alone(ctx: Context, few: Material) -> float:
    together = ctx.net.run(few.call).output
    alone = [ctx.net.run(batch).output for batch in ctx.net.batches(few.call, 1)]
    return relative_error(torch.cat(alone), together)


def _output(ctx: Context, few: Material) -> float:
    live = ctx.net.run(few.call, engine="hooks").output
    return relative_error(ctx.net.run(few.call, engine="graph").output, live)


def _sites(ctx: Context, few: Material, taps: list[Tap]) -> float:
    live = ctx.net.record(few.call, _shared(ctx, taps), engine="hooks")
    captured = ctx.net.record(few.call, _shared(ctx, taps), engine="graph")
    return max(relative_error(captured.tensor(n), live.tensor(n)) for n in live)


def _gradients(ctx: Context, few: Material, taps: list[Tap]) -> float:
    names = _shared(ctx, taps)

    def target(output: torch.Tensor) -> torch.Tensor:
        return output.flatten(1).float().pow(2).mean(1)

    live = ctx.net.gradients(few.call, names, target, engine="hooks").grads
    captured = ctx.net.gradients(few.call, names, target, engine="graph").grads
    worst = 0.0
    for name in live:
        scale = float(live.tensor(name).abs().max())
        difference = float((live.tensor(name) - captured.tensor(name)).abs().max())
        worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


def _shared(ctx: Context, taps: list[Tap]) -> list[str]:
    """Sites that both engines reach; raises EngineError where there is none."""
    table = ctx.net.sites
    shared = [t.label for t in taps if len(table[t.label].site.engines) == 2]
    if not shared:
        raise EngineError("no site is reached by both engines")
    return shared

"""Whether the instruments can be trusted here: the engines checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from patchclamp.audit.choose import spread
from patchclamp.audit.context import Context
from patchclamp.core.document import Column, Facts, Section, Table
from patchclamp.core.edit_kinds import Scale
from patchclamp.core.errors import CaptureError, EngineError, TargetError
from patchclamp.core.findings import Evidence, Finding, Verdict
from patchclamp.core.sites import Tap
from patchclamp.engine.checks import relative_error
from patchclamp.engine.coverage import Coverage
from patchclamp.methods.material import Material, record

_LIMIT = 1e-5
_GRADIENT_LIMIT = 1e-4
_ROWS = 4
_SECONDS_PER_MODULE = 0.05
_SHARE = 0.25
"""A capture took about 25 ms a module on one core, and is checked for about as long again."""

Check: TypeAlias = "tuple[str, str, float, Callable[[], float]]"
"""Name, claim, limit, and what measures the difference."""


def engines(ctx: Context) -> Section:
    """Graph against hooks, identity edits, gradients, and rows alone against rows together."""
    few = ctx.material.rows(ctx.net, torch.arange(min(_ROWS, ctx.material.num)))
    taps = spread([a.tap for a in ctx.activities], 4)
    checks: list[Check] = [
        ("identity", "An edit that changes nothing changes nothing, bit for bit.", 0.0,
         lambda: _identity(ctx, few, taps)),
        ("rows", "A row gives the same output alone as among others.", _LIMIT,
         lambda: _alone(ctx, few)),
    ]  # fmt: skip
    captured = _affordable(ctx)
    if captured:
        checks += _against_graph(ctx, few, taps)
    findings = [_finding(ctx, few, *check) for check in checks]
    return Section(
        id="engines",
        title="Engine cross-checks",
        summary="Two engines reach the inside of this network: hooks on the live module, and code "
        "generated from its captured graph. Before anything else on this page is believed, they "
        "have to agree.",
        blocks=(
            *([_engines(ctx.net.coverage())] if captured else []),
            _table(findings, _limits(checks)),
        ),
        findings=tuple(ctx.signed(f) for f in findings),
    )


def _affordable(ctx: Context) -> bool:
    """Whether a capture fits; said once, where it does not."""
    seconds = _SECONDS_PER_MODULE * len(list(ctx.net.module.modules()))
    fits = seconds <= _SHARE * ctx.budget.seconds
    if not fits:
        ctx.budget.skip(
            "the captured graph, and every check that needs it",
            f"capturing and checking would take about {seconds:.0f} s",
            "a larger --budget",
        )
    return fits


def _against_graph(ctx: Context, few: Material, taps: list[Tap]) -> list[Check]:
    return [
        ("output", "The captured graph gives the live network's output.", _LIMIT,
         lambda: _output(ctx, few)),
        ("sites", "The captured graph gives the live network's values at shared sites.", _LIMIT,
         lambda: _sites(ctx, few, taps)),
        ("gradients", "Both engines give the same gradients at shared sites.", _GRADIENT_LIMIT,
         lambda: _gradients(ctx, few, taps)),
    ]  # fmt: skip


def _engines(coverage: Coverage) -> Facts:
    passed = coverage.check is not None and coverage.check.passed
    return Facts(
        title="Engines",
        items=(
            ("hooks engine", f"{len(coverage.hooks):,} sites"),
            ("graph engine", f"{len(coverage.graph):,} sites"),
            ("capture checks", "passed" if passed else "not available"),
            *((f"fixed: {axis}", why) for axis, why in coverage.fixed.items()),
            *((name, why) for name, why in list(coverage.missing.items())[:12]),
        ),
        note="" if coverage.error is None else str(coverage.error),
    )


def _table(findings: list[Finding], limits: dict[str, float]) -> Table:
    return Table(
        title="Checks",
        columns=(
            Column(name="check", title="Check"),
            Column(name="difference", title="Largest relative difference", role="number"),
            Column(name="limit", title="Limit", role="number"),
            Column(name="verdict", title="Verdict"),
        ),
        rows=tuple((f.claim, f.effect, limits[f.id], str(f.verdict)) for f in findings),
    )


def _limits(checks: list[Check]) -> dict[str, float]:
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

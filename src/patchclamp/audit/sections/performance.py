"""How well the network does its task on this data, and whether its confidence is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchclamp.audit.context import Context
from patchclamp.core.document import Bars, Cell, Column, Curve, Section, Table
from patchclamp.core.errors import DataError
from patchclamp.core.findings import Evidence, Finding, Verdict
from patchclamp.methods.material import plain_output, record
from patchclamp.methods.statistics import bootstrap_mean, wilson
from patchclamp.methods.trust.calibration import Calibration, CalibrationResult
from patchclamp.methods.trust.performance import PerformanceResult, accuracy, token_loss

_NEXT_TOKEN = "next-token cross-entropy"


def performance(ctx: Context) -> Section | None:
    """Accuracy or loss with its baseline; None where the data has nothing to be right about."""
    if ctx.score.name == _NEXT_TOKEN:
        return _language(ctx)
    if ctx.material.labels is None or ctx.score.unit != "nats":
        ctx.budget.skip(
            "accuracy, loss and calibration",
            "the data has no labels for what this network puts out",
            "--data with labels",
        )
        return None
    return _classifier(ctx, ctx.material.labels)


def _classifier(ctx: Context, labels: Tensor) -> Section:
    logits = plain_output(ctx.net, ctx.material, batch_size=64)
    result = accuracy(logits, labels)
    beats = result.interval.low > result.baseline.mean
    finding = Finding(
        id="performance/accuracy",
        claim=f"{ctx.net.name} classifies better than always saying the commonest class.",
        subject="logits",
        effect=result.value,
        unit="accuracy",
        interval=result.interval,
        null=result.baseline,
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if beats else Verdict.DOES_NOT_HOLD,
        over=ctx.over,
        record=record(ctx.net, ctx.material, method="performance.accuracy", metric="accuracy"),
    )
    confidence, guess = logits.double().softmax(1).max(1)
    calibration = _calibration(ctx, confidence, guess == labels)
    names = ctx.material.class_names
    return Section(
        id="performance",
        title="Performance and calibration",
        summary=f"{ctx.net.name} is right on {result.value:.1%} of {labels.numel()} rows; the "
        f"commonest class alone would be right on {result.baseline.mean:.1%}.",
        blocks=(
            _by_class(result, names),
            _mistakes(result, names),
            *(_reliability(c) for c in calibration),
        ),
        findings=(ctx.signed(finding), *(ctx.signed(_calibrated(ctx, c)) for c in calibration)),
    )


def _calibration(ctx: Context, confidence: Tensor, right: Tensor) -> list[CalibrationResult]:
    """The calibration, or nothing where the data has too few rows for it."""
    try:
        return [Calibration(seed=ctx.seed).judge(confidence, right)]
    except DataError as e:
        ctx.budget.skip("calibration", str(e), "--data with more rows")
        return []


def _name(names: tuple[str, ...], c: int) -> str:
    return names[c] if c < len(names) else str(c)


def _by_class(result: PerformanceResult, names: tuple[str, ...]) -> Bars:
    classes = sorted(result.per_class, key=lambda c: -result.per_class[c][1])[:40]
    shares = [result.per_class[c] for c in sorted(classes)]
    spans = [wilson(hits, num) for hits, num in shares]
    return Bars(
        title="Accuracy by class",
        labels=tuple(
            f"{_name(names, c)} ({num})"
            for c, (_, num) in zip(sorted(classes), shares, strict=True)
        ),
        values=tuple(hits / num for hits, num in shares),
        unit="accuracy",
        low=tuple(s.low for s in spans),
        high=tuple(s.high for s in spans),
        note="Number of rows in brackets; intervals are 95% (Wilson).",
    )


def _mistakes(result: PerformanceResult, names: tuple[str, ...]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    if result.confusion is not None:
        wrong = result.confusion.clone()
        wrong.fill_diagonal_(0)
        for c, g in wrong.nonzero().tolist():
            num = int(result.confusion[c].sum())
            rows.append(
                (_name(names, c), _name(names, g), int(wrong[c, g]), int(wrong[c, g]) / num)
            )
    rows.sort(key=lambda r: -float(r[2] or 0))
    return Table(
        title="Mistakes",
        columns=(
            Column(name="label", title="Label"),
            Column(name="guess", title="Guess"),
            Column(name="rows", title="Rows", role="number"),
            Column(name="share", title="of that label", role="share"),
        ),
        rows=tuple(rows),
        note="" if rows else "No mistakes on this data.",
    )


def _reliability(result: CalibrationResult) -> Curve:
    total = sum(result.count)
    return Curve(
        title="Reliability",
        x=tuple(result.confidence),
        y=tuple(result.accuracy),
        x_title="confidence",
        y_title="share correct",
        low=tuple(i.low for i in result.accuracy_interval),
        high=tuple(i.high for i in result.accuracy_interval),
        weight=tuple(n / total for n in result.count),
        diagonal=True,
        note="Bins of equal numbers of rows; on the diagonal, confidence means what it says.",
    )


def _calibrated(ctx: Context, result: CalibrationResult) -> Finding:
    limit = result.null.high if result.null.high is not None else result.null.mean
    return Finding(
        id="calibration/top-class",
        claim="The confidence of the top class is calibrated: its error is no larger than "
        "perfect calibration would show on as many rows.",
        subject="logits",
        effect=result.error,
        unit="expected calibration error",
        interval=result.interval,
        null=result.null,
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if result.error <= limit else Verdict.DOES_NOT_HOLD,
        over=ctx.over,
        record=record(
            ctx.net,
            ctx.material,
            method="trust.calibration",
            metric="expected calibration error, 10 bins of equal mass",
            seed=ctx.seed,
        ),
        caveats=("a small error is expected also of a well calibrated network: see the null",),
    )


def _language(ctx: Context) -> Section:
    tokens = ctx.material.tokens
    if tokens is None:
        raise RuntimeError("a next-token score without tokens")
    losses, each, sure, right = [], [], [], []
    start = 0
    for batch in ctx.net.batches(ctx.material.call, 8):
        logits = ctx.net.run(batch).output
        at = slice(start, start + logits.shape[0])
        start = at.stop
        log_p = logits[:, :-1].float().log_softmax(-1)
        wanted = tokens[at][:, 1:]
        losses.append(ctx.score.rows(logits, at))
        each.append(-log_p.gather(2, wanted[..., None])[..., 0])
        best = log_p.max(-1)
        sure.append(best.values.exp())
        right.append(best.indices == wanted)
    loss = token_loss(
        torch.cat(losses),
        tokens,
        vocabulary=logits.shape[-1],
        seed=ctx.seed,
        mask=ctx.material.mask,
    )
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if ctx.material.mask is not None:
        counted = ctx.material.mask[:, 1:]
    confidence, correct = torch.cat(sure)[counted], torch.cat(right)[counted]
    calibration = _calibration(ctx, confidence, correct)
    better = loss.interval.high < loss.baseline.mean
    finding = Finding(
        id="performance/loss",
        claim=f"{ctx.net.name} predicts the next token better than token frequencies do.",
        subject="logits",
        effect=loss.value,
        unit="nats per token",
        interval=loss.interval,
        null=loss.baseline,
        evidence=Evidence.OBSERVED,
        verdict=Verdict.HOLDS if better else Verdict.DOES_NOT_HOLD,
        over=ctx.over,
        record=record(ctx.net, ctx.material, method="performance.token_loss", metric=_NEXT_TOKEN),
    )
    perplexity = math.exp(min(loss.value, 700.0))
    return Section(
        id="performance",
        title="Performance and calibration",
        summary=f"Next-token loss {loss.value:.3f} nats per token over {tokens.shape[0]} rows of "
        f"{tokens.shape[1]} tokens (perplexity {perplexity:.1f}); the top guess is right "
        f"{float(correct.double().mean()):.1%} of the time. The token frequencies of the "
        f"other rows give {loss.baseline.mean:.3f} nats.",
        blocks=(
            _by_position(torch.cat(each), counted, ctx.seed),
            *(_reliability(c) for c in calibration),
        ),
        findings=(ctx.signed(finding), *(ctx.signed(_calibrated(ctx, c)) for c in calibration)),
    )


def _by_position(losses: Tensor, counted: Tensor, seed: int) -> Curve:
    """Mean loss at up to 32 positions, with intervals over rows."""
    usable = [int(i) for i in (counted.sum(0) >= 2).nonzero()[:, 0]]
    shown = usable[:: max(1, len(usable) // 32)]
    columns = [losses[counted[:, i], i] for i in shown]
    spans = [bootstrap_mean(c, seed=seed, num=500) for c in columns]
    return Curve(
        title="Loss by position",
        x=tuple(float(i + 1) for i in shown),
        y=tuple(float(c.mean()) for c in columns),
        x_title="position",
        y_title="nats per token",
        low=tuple(s.low for s in spans),
        high=tuple(s.high for s in spans),
        note="A network that uses its context predicts later tokens better.",
    )

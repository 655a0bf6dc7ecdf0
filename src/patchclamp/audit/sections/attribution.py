"""What the network's answers are laid to, with every method's own validation beside its maps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from patchclamp.audit.budget import seconds_per_row
from patchclamp.audit.context import Context
from patchclamp.audit.examples import picture
from patchclamp.audit.reserve import left_for_maps
from patchclamp.core.document import (
    Block,
    Cell,
    Column,
    Examples,
    Passage,
    Picture,
    Section,
    Table,
    UnitExamples,
)
from patchclamp.core.errors import PatchclampError
from patchclamp.core.findings import Evidence, Finding, Null, Verdict
from patchclamp.methods.attribution import Attribution, Explainer, method
from patchclamp.methods.attribution.faithfulness.curves import PixelFlipping
from patchclamp.methods.attribution.gradients.integrated import IntegratedGradients
from patchclamp.methods.material import Material, RowKind, plain_output, record
from patchclamp.truth.attribution.base import PlantedMaps
from patchclamp.truth.attribution.fitting import Recipe
from patchclamp.truth.attribution.glyphs import Glyphs
from patchclamp.truth.attribution.validation import Question, Trial, Validate, Validation

_ROWS = 12
_SHOWN = 8
_PLANTED = 100
"""Images with a glyph: fewer leave the map of another image, a control, too wide an interval."""
_MARGIN = 1.5
"""Of the estimate: rows run few at a time at first, and gradients cost more than counted."""
_COPY = 8e-8
"""Seconds a weight, to make a copy of the network with its weights in another order."""
_CURVES = 27
"""Maps that are removed, controls included, times replacements."""
_RECIPE = Recipe(epochs=4, rate=1e-2, decay=0.01)
_SECONDS_PLANTED = 12.0
"""To train the network with the planted glyph, and to look at its maps."""

_IMAGES = ("grad_cam", "integrated_gradients", "smoothgrad", "occlusion")
_OTHERS = ("gradient_times_value", "integrated_gradients", "occlusion")
_PASSES = {"integrated_gradients": 100, "smoothgrad": 75, "grad_cam": 3, "occlusion": 60}
"""About how many forward passes a map takes."""

_PLANS = ((_ROWS, 8), (8, 5), (6, 3), (6, 0))
"""Rows, and steps in which their places are removed (0: that is not asked): the largest that
leaves time for two methods."""

_QUESTIONS = {
    Question.PLANTED: "Planted",
    Question.LEARNT: "Learnt",
    Question.FAITHFUL: "Faithful",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tried:
    """One method, and what validation says of it and its maps."""

    how: Explainer
    validation: Validation

    @property
    def maps(self) -> Attribution:
        """Of the rows that are shown."""
        return self.validation.maps


def attribution(ctx: Context) -> Section | None:
    """Maps of a few methods; None, with the reason in what was left out, where there are none."""
    rows, target = _rows(ctx)
    if target is None:
        ctx.budget.skip("attribution", "the network gives no classes to explain", "in Python")
        return None
    seconds = left_for_maps(ctx)
    deadline = time.monotonic() + seconds
    names = _IMAGES if ctx.material.kind is RowKind.IMAGE else _OTHERS
    planted = _planted(ctx, seconds)
    each = _MARGIN * seconds_per_row(ctx.net, rows, rows=1)
    num, steps = _plan(ctx, names, each, deadline - time.monotonic())
    if not steps:
        why = "removing places step by step takes too long here"
        ctx.budget.skip("whether maps are faithful", why, "a larger --budget")
    if num < rows.num:
        rows, target = rows.rows(ctx.net, torch.arange(num)), target[:num]
    tried: list[_Tried] = []
    for name in names:
        left, needed = deadline - time.monotonic(), _seconds(ctx, name, each, num, steps)
        if needed > left:
            why = f"it needs about {needed:.0f} s, and {left:.0f} s were left for maps"
            ctx.budget.skip(f"maps by {name}", why, "a larger --budget")
            continue
        try:
            tried.append(_try(ctx, name, rows, target, planted, steps))
        except PatchclampError as e:
            ctx.budget.skip(f"maps by {name}", str(e), e.hint or "another site, by at=")
    if not tried:
        return None
    blocks: list[Block] = [_table(tried)]
    shown = _shown(ctx, rows, tried)
    if shown is not None:
        blocks.append(shown)
    return Section(
        id="attribution",
        title="What answers are laid to",
        summary=f"Maps of {rows.num} rows of {rows.name}: how much each place of the input "
        "speaks for the class that the network gives. A map is worth what its method can show: "
        f"{_asked(planted, steps)}. Controls that know nothing of the network are asked the same, "
        "and where one does as well there is no verdict.",
        blocks=tuple(blocks),
        findings=tuple(ctx.signed(f) for t in tried for f in _findings(ctx, t, rows)),
    )


def _asked(planted: dict[str, PlantedMaps], steps: int) -> str:
    """The questions that were asked here, in words."""
    said = ["whether it follows what this network learnt"]
    if planted:
        said.insert(0, "it is asked for a planted glyph in a network that was seen to read it")
    else:
        said[0] = f"it is asked {said[0]}"
    if steps:
        said.append("whether the score falls where it says")
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def _rows(ctx: Context) -> tuple[Material, Tensor | None]:
    """A few rows, and the class that the network gives each."""
    few = ctx.material.rows(ctx.net, torch.arange(min(_ROWS, ctx.material.num)))
    output = plain_output(ctx.net, few, batch_size=_ROWS)
    last = output[:, -1] if output.ndim == 3 and few.kind is RowKind.TEXT else output
    if last.ndim != 2 or last.shape[1] < 2 or few.num < 2:
        return few, None
    return few, last.argmax(1)


def _seconds(ctx: Context, name: str, each: float, num: int, steps: int) -> float:
    """About how long a method takes on so many rows, with what it is asked beside its maps."""
    copied = _COPY * ctx.net.num_parameters
    return copied + each * num * (3 * _PASSES.get(name, 4) + _CURVES * steps)


def _plan(ctx: Context, names: Sequence[str], each: float, seconds: float) -> tuple[int, int]:
    """The largest plan that leaves time for the first two methods, else the smallest."""
    for num, steps in _PLANS:
        if sum(_seconds(ctx, name, each, num, steps) for name in names[:2]) <= seconds:
            return num, steps
    return _PLANS[-1]


def _planted(ctx: Context, seconds: float) -> dict[str, PlantedMaps]:
    """The bench for networks that see images, where there is time for it."""
    if ctx.material.kind is not RowKind.IMAGE:
        return {}
    if seconds < _SECONDS_PLANTED:
        ctx.budget.skip(
            "planted truth for maps",
            f"training its network takes about {_SECONDS_PLANTED:.0f} s",
            "a larger --budget, or `patchclamp validate`",
        )
        return {}
    return {"glyphs": _glyphs()}


@cache
def _glyphs() -> PlantedMaps:
    """Trained once in a process."""
    return Glyphs(num=_PLANTED, num_train=2000, recipe=_RECIPE).run()


def _try(
    ctx: Context,
    name: str,
    rows: Material,
    target: Tensor,
    planted: dict[str, PlantedMaps],
    steps: int,
) -> _Tried:
    # where integrated gradients do not meet their tolerance, `error` on the page says so
    loose = name == IntegratedGradients.name
    how = IntegratedGradients(strict=False) if loose else method(name)()
    flipping = PixelFlipping(num_steps=steps) if steps else None
    asked = Validate(num_planted=_PLANTED, flipping=flipping, seed=ctx.seed)
    found = asked.run(how, ctx.net, rows.call, target, planted=planted, progress=ctx.progress)
    return _Tried(how=how, validation=found)


# ---- findings -----------------------------------------------------------------


def _findings(ctx: Context, t: _Tried, rows: Material) -> list[Finding]:
    """The method on planted truth, and on this network."""
    made = []
    for question in (Question.PLANTED, Question.LEARNT):
        trials = t.validation.of(question)
        if trials:
            made.append(_finding(ctx, t, rows, trials[0]))
    return made


def _finding(ctx: Context, t: _Tried, rows: Material, trial: Trial) -> Finding:
    planted = trial.question is Question.PLANTED
    name, nearest = t.validation.method, trial.nearest
    claim = (
        f"Maps by {name} show a planted glyph and not its mirror image, better than controls do."
        if planted
        else f"Maps by {name} follow what this network learnt: they change when its weights are "
        "put in another order, and stay when the input hardly changes."
    )
    over = (
        f"{_PLANTED} images of a glyph, {trial.network}"
        if planted
        else f"{rows.num} rows of {rows.name}"
    )
    return Finding(
        id=f"attribution/{name}/{trial.question}",
        claim=claim,
        subject=name,
        effect=trial.method.mean,
        unit=trial.measure,
        interval=trial.method.interval,
        null=Null(
            kind=f"the control that comes nearest: {nearest.name}",
            mean=nearest.score.mean,
            low=nearest.score.interval.low,
            high=nearest.score.interval.high,
        ),
        evidence=Evidence.VALIDATED if planted else Evidence.OBSERVED,
        verdict=trial.verdict,
        over=over,
        validation=_words(t.validation) if planted else "",
        record=record(
            ctx.net,
            rows,
            method=f"attribution.{name}",
            metric=trial.measure,
            seed=ctx.seed,
            options=t.how.options(),
        ),
        caveats=(trial.reason,)
        if trial.verdict is not Verdict.HOLDS
        else ("what holds on the bench's network need not hold on every other",)
        if planted
        else (),
    )


def _words(v: Validation) -> str:
    """The outcome of planted trials."""
    return "; ".join(
        f"{t.bench}: {t.measure} {t.method.mean:.2f}, nearest control {t.nearest.name} "
        f"{t.nearest.score.mean:.2f}, {t.verdict}"
        for t in v.of(Question.PLANTED)
    )


# ---- what is drawn --------------------------------------------------------------


def _table(tried: list[_Tried]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            t.validation.method,
            trial.bench,
            trial.method.mean,
            trial.method.interval.low,
            trial.method.interval.high,
            trial.nearest.name,
            trial.nearest.score.mean,
            str(trial.verdict),
            trial.reason,
        )
        for t in tried
        for trial in t.validation.trials
    ]
    return Table(
        title="What the methods can show",
        columns=(
            Column(name="method", title="Method"),
            Column(name="bench", title="Asked on"),
            Column(name="score", title="Score", role="number", help="higher is better"),
            Column(name="low", title="low", role="number", help="of the 95% interval"),
            Column(name="high", title="high", role="number", help="of the 95% interval"),
            Column(name="control", title="Nearest control"),
            Column(name="reached", title="reaches", role="number"),
            Column(name="verdict", title="Verdict"),
            Column(name="why", title="Because"),
        ),
        rows=tuple(rows),
        note="Scores of different rows are of different measures: signal mass (.5 is chance) for "
        "planted truth, rank correlation that is lost with the weights, mean fall of the logit "
        "while places are removed in the map's order. What removed places are replaced by can "
        "turn a verdict, so all replacements are shown.",
    )


def _shown(ctx: Context, rows: Material, tried: list[_Tried]) -> Examples | None:
    """Maps as pictures or passages, the validation in each method's line."""
    if rows.kind is RowKind.ARRAY:
        return None
    units = []
    for t in tried:
        line = ", ".join(
            f"{_QUESTIONS[q].lower()}: {t.validation.answer(q)}"
            for q in Question
            if t.validation.of(q)
        )
        if t.maps.error is not None:
            line += f"; largest completeness error {float(t.maps.error.max()):.1%}"
        drawn = UnitExamples(unit=t.validation.method, summary=line)
        if rows.kind is RowKind.IMAGE:
            pictures = _pictures(rows, t.maps, signed=t.how.is_signed)
            units.append(replace(drawn, pictures=pictures))
        else:
            units.append(replace(drawn, passages=_passages(ctx, rows, t.maps)))
    return Examples(
        title="Maps",
        units=tuple(units),
        note="Red speaks for the class, blue against it, over the input in grey (of methods that "
        "know no sign, red is what matters either way); each map is "
        "scaled by its own largest value, which is the number beside it.",
    )


def _pictures(rows: Material, maps: Attribution, *, signed: bool) -> tuple[Picture, ...]:
    images = rows.call.tensors()[0]
    made = []
    for row in range(min(_SHOWN, rows.num)):
        heat = maps.heat(signed=signed)[row]
        if heat.ndim != 2 or heat.shape != images.shape[-2:]:
            return ()
        top = float(heat.abs().max())
        made.append(
            Picture(
                png_base64=picture(overlay(images[row], heat)), label=_label(rows, row), value=top
            )
        )
    return tuple(made)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Red where the heat is above 0, blue below, over the image in grey: (3, row, column)."""
    grey = image.float().mean(0)
    low, high = float(grey.min()), float(grey.max())
    grey = 0.15 + 0.7 * (grey - low) / max(high - low, 1e-12)
    share = (heat.float() / heat.abs().max().clamp(min=1e-12)).clamp(-1, 1)
    strength = share.abs() ** 0.7
    colour = torch.zeros(3, *heat.shape)
    colour[0], colour[2] = (share > 0).float(), (share < 0).float()
    return grey * (1 - strength) + colour * strength


def _label(rows: Material, row: int) -> str:
    if rows.labels is None:
        return f"row {row}"
    c = int(rows.labels[row])
    return rows.class_names[c] if c < len(rows.class_names) else str(c)


def _passages(ctx: Context, rows: Material, maps: Attribution) -> tuple[Passage, ...]:
    tokens, tokenizer = rows.tokens, ctx.net.tokenizer
    if tokens is None:
        return ()
    made = []
    for row in range(min(_SHOWN // 2, rows.num)):
        heat = maps.heat(signed=True)[row]
        if heat.shape != tokens[row].shape:
            return ()
        ids = tokens[row].tolist()
        pieces = [str(i) for i in ids] if tokenizer is None else tokenizer.pieces(ids)
        focus = int(heat.abs().argmax())
        made.append(
            Passage(
                tokens=tuple(pieces),
                strengths=tuple(float(s) for s in heat),
                focus=focus,
                value=float(heat[focus]),
            )
        )
    return tuple(made)

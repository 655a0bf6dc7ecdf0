"""The inputs that drive a unit most, as pictures or passages."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.audit.classes import Selected
from patchclamp.audit.context import Context
from patchclamp.core.document import Examples, Passage, Picture, UnitExamples
from patchclamp.methods.material import RowKind
from patchclamp.methods.neurons.activity import SiteActivity, flat, strongest
from patchclamp.report.png import encode_png

_UNITS = 12
_EXAMPLES = 8
_BEFORE, _AFTER = 24, 8


def examples(ctx: Context, chosen: Sequence[Selected], names: Sequence[str]) -> Examples | None:
    """The most selective units of every site and the rows that drive them; None for arrays."""
    if ctx.material.kind is RowKind.ARRAY:
        return None
    picked = _picked(ctx, chosen, names)
    units = []
    for activity, unit, summary in picked:
        label = f"{activity.tap.label} unit {activity.table['unit'][unit]}"
        if ctx.material.kind is RowKind.IMAGE:
            units.append(
                UnitExamples(unit=label, summary=summary, pictures=_pictures(ctx, activity, unit))
            )
            continue
        passages = _passages(ctx, activity, unit)
        if passages:
            units.append(UnitExamples(unit=label, summary=summary, passages=passages))
    if not units:
        return None
    return Examples(
        title="What drives the most selective units",
        units=tuple(units),
        note="The rows with the largest value of the unit, largest first.",
    )


def _picked(
    ctx: Context, chosen: Sequence[Selected], names: Sequence[str]
) -> list[tuple[SiteActivity, int, str]]:
    if not chosen:
        return [
            (a, int(torch.tensor(a.table["std"].to_list()).argmax()), "varies most in its site")
            for a in ctx.activities[:_UNITS]
        ]
    each = max(1, _UNITS // len(chosen))
    picked = []
    for c in chosen[:_UNITS]:
        for u in c.result.low.topk(min(each, c.result.low.numel())).indices.tolist():
            summary = (
                f"prefers class {names[int(c.result.best[u])]}, "
                f"AUROC {float(c.result.auroc[u]):.2f}"
            )
            picked.append((c.activity, u, summary))
    return picked


def _pictures(ctx: Context, activity: SiteActivity, unit: int) -> tuple[Picture, ...]:
    images = ctx.material.call.tensors()[0]
    labels, names = ctx.material.labels, ctx.material.class_names
    made = []
    for row, value in strongest(activity, unit, _EXAMPLES):
        label = f"row {row}"
        if labels is not None:
            c = int(labels[row])
            label = names[c] if c < len(names) else str(c)
        made.append(Picture(png_base64=picture(images[row]), label=label, value=value))
    return tuple(made)


def picture(image: Tensor) -> str:
    """An image (channel, row, column) of any range as PNG in base64."""
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = float(image.min()), float(image.max())
    scaled = (image - low) / max(high - low, 1e-12) * 255
    pixels = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, channels = pixels.shape
    png = encode_png(width, height, pixels.numpy().tobytes(), 1 if channels == 1 else 3)
    return base64.b64encode(png).decode("ascii")


def _passages(ctx: Context, activity: SiteActivity, unit: int) -> tuple[Passage, ...]:
    tokens, tokenizer = ctx.material.tokens, ctx.net.tokenizer
    if tokens is None:
        return ()
    tap = activity.tap
    made = []
    for row, value in strongest(activity, unit, _EXAMPLES // 2):
        one = ctx.material.rows(ctx.net, torch.tensor([row]))
        acts = ctx.net.record(one.call, tap.label)
        strengths = flat(acts.tensor(tap.label), tap, activity.axes)[0, :, unit]
        if strengths.numel() != tokens.shape[1]:
            return ()  # a passage needs a value at each of its tokens
        focus = int(strengths.argmax())
        start, stop = max(0, focus - _BEFORE), min(tokens.shape[1], focus + _AFTER)
        ids = tokens[row, start:stop].tolist()
        pieces = [str(i) for i in ids] if tokenizer is None else tokenizer.pieces(ids)
        made.append(
            Passage(
                tokens=tuple(pieces),
                strengths=tuple(float(s) for s in strengths[start:stop]),
                focus=focus - start,
                value=value,
            )
        )
    return tuple(made)

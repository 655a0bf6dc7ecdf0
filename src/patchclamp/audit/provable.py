"""What an audit tries to prove: of which networks, on how many rows, by which methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.audit.budget import seconds_per_row
from patchclamp.audit.context import Context
from patchclamp.bounding.ways import Method
from patchclamp.core.errors import BoundError, CaptureError, InputError
from patchclamp.methods.bounds.margins import Classifier
from patchclamp.methods.material import Material, RowKind
from patchclamp.model.preprocessing import prepared

_SHARE = 0.15
"""Of the whole budget: the number of rows must not depend on how busy the machine is."""
_MAX_ROWS = 24
_MIN_ROWS = 4
_EVALUATIONS = {Method.INTERVAL: 16, Method.FORWARD_CROWN: 4, Method.CROWN: 1, Method.ALPHA: 1}
"""Bounds in float64 that a row takes about as long as, as measured; cheap ones are searched
with as many steps, and rows are bounded side by side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What is proved.

    Attributes:
        material: the rows.
        methods: for all of them.
        within: limits of pixels, as the network sees them; None where none are known.
        max_radius: how far is looked.
    """

    material: Material
    methods: tuple[Method, ...]
    within: tuple[Tensor, Tensor] | None
    max_radius: float

    @property
    def over(self) -> str:
        """The set, in words."""
        return f"{self.material.num} rows of {self.material.name}"


def unfit(ctx: Context) -> tuple[str, str] | None:
    """Why nothing can be proved of this network on this data, and the way out; None if it can."""
    if ctx.material.kind is RowKind.TEXT:
        return (
            "its inputs are tokens, which cannot move by a little",
            "net.bound with the embeddings perturbed, on a few tokens",
        )
    if ctx.material.labels is None or ctx.score.unit != "nats":
        return "the data has no labels for what this network puts out", "--data with labels"
    error = ctx.net.capture_error()
    if error is not None:
        return f"the network cannot be captured: {error}", "see its left-out engine checks"
    return None


def reserved(ctx: Context) -> float:
    """Seconds that earlier sections leave to the proofs."""
    return 0.0 if unfit(ctx) is not None else 2 * _SHARE * ctx.budget.seconds


def plan(ctx: Context) -> Plan | None:
    """Rows and methods that fit, or None with the reason in what was left out."""
    reason = unfit(ctx)
    seconds = _SHARE * ctx.budget.seconds
    if reason is None and 100 * seconds_per_row(ctx.net, ctx.material) > seconds:
        reason = "one pass through the network takes too long for bounds", "a larger --budget"
    if reason is None:
        few = ctx.material.rows(ctx.net, torch.arange(min(_MAX_ROWS, ctx.material.num)))
        try:
            network = Classifier(ctx.net, few.call)
        except (BoundError, CaptureError, InputError) as e:
            reason = str(e), e.hint or "the method CertifiedRadius on a network with rules"
    if reason is not None:
        ctx.budget.skip("certified claims", *reason)
        return None
    spent, num, methods = 0.0, few.num, list[Method]()
    for method, times in _EVALUATIONS.items():
        each = spent + times * network.seconds(method)
        most = max(1, int(seconds / each))
        if methods and most < min(_MIN_ROWS, few.num):
            break
        num, spent = min(num, most), each
        methods.append(method)
    within, max_radius = input_limits(ctx)
    return Plan(
        material=few.rows(ctx.net, torch.arange(num)),
        methods=tuple(methods),
        within=within,
        max_radius=max_radius,
    )


def input_limits(ctx: Context) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """Black and white as the network sees them, and the distance between; else the data's span."""
    (x,) = ctx.material.call.tensors()
    span = float(x.max()) - float(x.min()) or 1.0
    if ctx.material.kind is not RowKind.IMAGE:
        return None, span
    how = ctx.net.loaded.preprocessing
    if how is not None:
        size = (round(how.height / how.crop), round(how.width / how.crop))
        black, white = (
            prepared(torch.full((1, how.channels, *size), v), how)[0] for v in (0.0, 1.0)
        )
        low, high = torch.minimum(black, white), torch.maximum(black, white)
        if bool((x >= low).all() and (x <= high).all()):
            return (low, high), float((high - low).max())
        return None, span
    if float(x.min()) >= 0 and float(x.max()) <= 1:
        return (torch.tensor(0.0), torch.tensor(1.0)), 1.0
    return None, span

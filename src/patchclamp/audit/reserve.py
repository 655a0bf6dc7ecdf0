"""How much of the time is kept for sections that come late, so that early ones leave it."""

from __future__ import annotations

from patchclamp.audit import provable
from patchclamp.audit.context import Context
from patchclamp.methods.material import RowKind

_MAPS, _ATTACKS = 0.15, 0.1
"""Of the whole budget."""


def for_maps(ctx: Context) -> float:
    """Seconds for what answers are laid to."""
    return _MAPS * ctx.budget.seconds


def for_attacks(ctx: Context) -> float:
    """Seconds for attacks; none where nothing can be attacked."""
    return 0.0 if unfit_for_attacks(ctx) is not None else _ATTACKS * ctx.budget.seconds


def for_proofs(ctx: Context) -> float:
    """Seconds for what is proved; none where nothing can be."""
    return provable.reserved(ctx)


def unfit_for_attacks(ctx: Context) -> tuple[str, str] | None:
    """Why nothing can be attacked here, and the way out; None if it can."""
    if ctx.material.kind is RowKind.TEXT:
        return "its inputs are tokens, which cannot move by a little", "attacks at an embedding"
    if ctx.material.labels is None or ctx.score.unit != "nats":
        return "the data has no labels for what this network puts out", "--data with labels"
    return None


def left_for_maps(ctx: Context) -> float:
    """What remains once attacks and proofs have theirs."""
    return max(0.0, ctx.budget.left - for_attacks(ctx) - for_proofs(ctx))


def left_for_attacks(ctx: Context) -> float:
    """What remains once proofs have theirs."""
    return max(0.0, ctx.budget.left - for_proofs(ctx))


def share_for_ablation(ctx: Context) -> float:
    """The share of what is left that nothing after ablation needs."""
    kept = for_maps(ctx) + for_attacks(ctx) + for_proofs(ctx)
    return max(0.0, 1 - kept / max(ctx.budget.left, 1e-9))

"""Which circuit an audit looks for, and what of the search the time allows.

Networks that read: behaviours that are shipped are measured, and the one that is performed
best is explained. Networks that classify: two classes are told apart. Everything else,
and everything that is too large or too slow, is listed as left out, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from patchclamp.audit.budget import seconds_per_row
from patchclamp.audit.circuit_parts import weigh
from patchclamp.audit.class_circuit import class_pairs, explain
from patchclamp.audit.context import Context
from patchclamp.audit.planted_edges import kind_of, recovered, validation
from patchclamp.audit.sections.circuit import behaviours, circuit_section
from patchclamp.core.circuit import Node
from patchclamp.core.document import Section
from patchclamp.core.errors import PatchclampError
from patchclamp.data.behaviours import INDUCTION
from patchclamp.engine.layers import find_layers
from patchclamp.methods.circuits.checking.behaviour import Performance, performs
from patchclamp.methods.circuits.finding.search import (
    CircuitSearch,
    Found,
    contrasts_of,
    shipped_task,
)
from patchclamp.methods.circuits.heads.head_kinds import HeadKind
from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of
from patchclamp.methods.circuits.network.contrast import Contrast
from patchclamp.methods.circuits.network.wiring import Wiring, wire
from patchclamp.methods.material import RowKind, plain_output

BEHAVIOURS = ("indirect objects", INDUCTION)
"""Those that are measured, in this order: the one with the shorter prompts first."""
_BY_HAND = "patchclamp.methods.circuits in Python, with pairs and a metric of your own"
LEAST_SECONDS = 5.0
_SHARE = 0.4
_MEASURING = 0.25
_MAX_EDGES = 4_000_000
_TYPED_ROWS, _TYPED_LENGTH = 8, 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of a search is done."""

    pairs: int
    fractions: tuple[float, ...]
    num_random: int
    verify: int
    num_edges: int

    def search(self, seed: int) -> CircuitSearch:
        """Edges are taken away one by one by `weigh`, which gives intervals too."""
        return CircuitSearch(
            fractions=self.fractions,
            num_random=self.num_random,
            verify=self.verify,
            max_parts=0,
            seed=seed,
        )

    def seconds(self, masked: float, gradient: float) -> float:
        """Estimated time, from that of one pair in a masked run and in a run with gradients."""
        runs = 3 * (2 + len(self.fractions) * (1 + self.num_random))  # twice edges, once nodes
        runs += 4 + (4 + self.num_edges + 2 * self.num_random)
        # an exact edge is run in both directions, and costs half a run in the mean
        return self.pairs * (masked * (runs + self.verify) + gradient * 7)


_FRACTIONS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
PLANS = (
    Plan(pairs=32, fractions=_FRACTIONS, num_random=3, verify=24, num_edges=8),
    Plan(pairs=16, fractions=_FRACTIONS[::2], num_random=3, verify=16, num_edges=6),
    Plan(pairs=8, fractions=(0.005, 0.02, 0.05, 0.1, 0.2), num_random=2, verify=8, num_edges=4),
)
"""Largest first; the first that fits is taken."""
_DENSE = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
LAYER_PLANS = tuple(
    replace(plan, fractions=fractions)
    for plan, fractions in zip(
        PLANS, (_DENSE, _DENSE[::2], (0.1, 0.2, 0.3, 0.5, 0.75)), strict=True
    )
)
"""Without a residual stream few edges connect nothing, so that sizes begin higher."""


def circuits(ctx: Context) -> Section | None:
    """The circuit section, or None where there is nothing to explain or no time to."""
    if ctx.budget.left < LEAST_SECONDS:
        _skip(ctx, "the circuit section", f"{ctx.budget.left:.0f} s were left for it")
        return None
    broken = ctx.net.capture_error()
    if broken is not None:
        _skip(ctx, "the circuit section", broken.what, how=_BY_HAND)
        return None
    try:
        if ctx.material.kind is RowKind.TEXT and ctx.net.tokenizer is not None:
            return _of_behaviour(ctx)
        return _of_classes(ctx)
    except PatchclampError as e:
        _skip(ctx, "the circuit section", e.what, how=e.hint or _BY_HAND)
        return None


# ---- networks that read -------------------------------------------------------------


def _of_behaviour(ctx: Context) -> Section | None:
    tried = _tried(ctx)
    if not tried:
        return None
    able = sorted((p for p in tried if p.present), key=_strength, reverse=True)
    if not able:
        return Section(
            id="circuit",
            title="Circuits of behaviours",
            summary=f"{ctx.net.name} performs none of the behaviours that were measured, so there "
            "is nothing to explain.",
            blocks=(behaviours(tried),),
        )
    wiring = wire(ctx.net)
    shortest = 0  # prompts that were too long for the time
    for performance in able:
        task = shipped_task(
            ctx.net,
            performance.name,
            num=PLANS[0].pairs,
            num_held_out=PLANS[0].pairs,
            seed=ctx.seed,
        )
        length = max(p.clean.shape[1] for p in task.train)
        if shortest and length >= shortest:
            why = "its prompts are longer than those for which the time was too short"
            _skip(ctx, f"the circuit of '{performance.name}'", why, performance.name)
            continue
        pairs = contrasts_of(ctx.net, task.train)[0]
        plan = _affordable(ctx, wiring, pairs, performance.name, PLANS)
        if plan is not None:
            return _explained(ctx, wiring, performance.name, plan, tried)
        shortest = length
    return Section(
        id="circuit",
        title="Circuits of behaviours",
        summary=f"{ctx.net.name} performs {len(able)} of the {len(tried)} behaviours that were "
        "measured; the time was too short to explain one.",
        blocks=(behaviours(tried),),
    )


def _tried(ctx: Context) -> list[Performance]:
    """Shipped behaviours as far as a share of the time goes, on held-out pairs."""
    made: list[Performance] = []
    until = time.monotonic() + ctx.budget.share(_SHARE * _MEASURING)
    for name in BEHAVIOURS:
        if made and time.monotonic() > until:
            _skip(ctx, f"the behaviour '{name}'", "the time for behaviours was used up", name)
            continue
        try:
            task = shipped_task(ctx.net, name, num=1, num_held_out=16, seed=ctx.seed)
            made.append(performs(ctx.net, task.held_out, seed=ctx.seed))
        except PatchclampError as e:
            _skip(ctx, f"the behaviour '{name}'", e.what, how=e.hint or _BY_HAND)
    return made


def _strength(performance: Performance) -> float:
    """How far the accuracy is above chance at least, as a share of what is possible."""
    return (performance.accuracy_interval.low - performance.chance) / (1 - performance.chance)


def _explained(
    ctx: Context, wiring: Wiring, name: str, plan: Plan, tried: Sequence[Performance]
) -> Section:
    task = shipped_task(ctx.net, name, num=plan.pairs, num_held_out=plan.pairs, seed=ctx.seed)
    search = plan.search(ctx.seed)
    found = search.run(ctx.net, task, progress=ctx.progress)
    held_out = contrasts_of(ctx.net, task.held_out)
    measured = [found.performance if p.name == name else p for p in tried]
    return _section(ctx, found, search, plan, held_out, measured)


# ---- networks that classify ---------------------------------------------------------


def _of_classes(ctx: Context) -> Section | None:
    net, material = ctx.net, ctx.material
    if material.labels is None or ctx.score.name != "cross-entropy of the label":
        _skip(
            ctx,
            "the circuit section",
            "the network neither reads text nor classifies the data, so there are no pairs to "
            "explain a difference between",
            how=_BY_HAND,
        )
        return None
    layers = net.graph.attention
    if not layers:
        found = find_layers(net.graph.capture.graph)
        if len(found) < 2:
            _skip(
                ctx,
                "the circuit section",
                "fewer than two layers of the network can be taken apart into units, so there is "
                "nothing between its input and its output",
                how=_BY_HAND,
            )
            return None
        size = sum(x.num_in for x in found) * sum(x.num_out for x in found)
        if size > _MAX_EDGES:
            _skip(
                ctx,
                "the circuit section",
                f"{size:,} pairs of units or channels are too many to hold for every row",
                how=_BY_HAND,
            )
            return None
    logits = plain_output(net, material, batch_size=64)
    wiring = wire(net)
    pairs = class_pairs(net, material, logits, num=PLANS[0].pairs, seed=ctx.seed)
    plan = _affordable(ctx, wiring, pairs.train, pairs.name, PLANS if layers else LAYER_PLANS)
    if plan is None:
        return None
    if plan.pairs < pairs.train.num_rows:
        pairs = class_pairs(net, material, logits, num=plan.pairs, seed=ctx.seed)
    search = plan.search(ctx.seed)
    found_circuit = explain(wiring, pairs, search, progress=ctx.progress)
    return _section(ctx, found_circuit, search, plan, [pairs.held_out], ())


# ---- both ---------------------------------------------------------------------------


def _section(
    ctx: Context,
    found: Found,
    search: CircuitSearch,
    plan: Plan,
    held_out: Sequence[Contrast],
    tried: Sequence[Performance],
) -> Section:
    kind = kind_of(ctx.net)
    weighed = weigh(
        found.wiring,
        found.circuit,
        held_out,
        num_edges=plan.num_edges,
        num_random=plan.num_random,
        seed=ctx.seed,
        progress=ctx.progress,
    )
    section = circuit_section(
        found,
        ctx.net,
        search=search,
        weighed=weighed,
        groups=head_types(ctx) if tried else {},
        tried=tried,
        validation="" if kind is None else validation(recovered(kind)),
    )
    return replace(section, findings=tuple(ctx.signed(f) for f in section.findings))


def _affordable(
    ctx: Context, wiring: Wiring, contrast: Contrast, name: str, plans: Sequence[Plan]
) -> Plan | None:
    """The largest plan that fits a share of the time, by measuring one masked run."""
    few = contrast.batch(range(min(4, contrast.num_rows)))
    held = list(wiring.record(few.corrupt).values)
    cut = torch.from_numpy(wiring.possible.astype(np.float32))[None].to(held[0].dtype)
    with torch.no_grad():
        wiring.run(few.clean, held, cut)  # compiles
        started = time.monotonic()
        wiring.run(few.clean, held, cut)
    masked = (time.monotonic() - started) / few.num_rows
    started = time.monotonic()
    slopes = wiring.slopes(few.clean, few.metric, few.rows)
    wiring.products(held, slopes)
    gradient = (time.monotonic() - started) / few.num_rows
    allowed = ctx.budget.share(_SHARE)
    for plan in plans:
        if plan.seconds(masked, gradient) <= allowed:
            if plan is not plans[0]:
                _skip(
                    ctx,
                    f"a finer search for the circuit of '{name}'",
                    f"the time allowed {plan.pairs} pairs and {len(plan.fractions)} sizes",
                    name,
                )
            return plan
    _skip(
        ctx,
        f"the circuit of '{name}'",
        f"the smallest search would take about {plans[-1].seconds(masked, gradient):.0f} s, and "
        f"{allowed:.0f} s were left for it",
        name,
    )
    return None


def head_types(ctx: Context) -> dict[Node, str]:
    """A type for every head that has one, by where it looks rather than by what it copies."""
    rows = _TYPED_ROWS * _TYPED_LENGTH / max(1, _row_length(ctx))
    if 3 * rows * seconds_per_row(ctx.net, ctx.material) > ctx.budget.share(0.05):
        _skip(ctx, "types of heads", "one more pass over long rows was too much for the time")
        return {}
    try:
        table = HeadTyping(num_rows=_TYPED_ROWS, length=_TYPED_LENGTH, seed=ctx.seed).run(ctx.net)
    except PatchclampError as e:
        _skip(ctx, "types of heads", e.what, how=e.hint or _BY_HAND)
        return {}
    return {
        Node(f"attn.{layer}.z", head): min(kinds, key=lambda k: k is HeadKind.COPY)
        for (layer, head), kinds in kinds_of(table).items()
        if kinds
    }


def _row_length(ctx: Context) -> int:
    tokens = ctx.material.tokens
    return _TYPED_LENGTH if tokens is None else int(tokens.shape[1])


def _skip(ctx: Context, what: str, why: str, task: str = "", how: str = "") -> None:
    if not how:
        command = f"patchclamp circuit {ctx.net.name} --task '{task}'"
        how = command if task in BEHAVIOURS else "a larger --budget"
    ctx.budget.skip(what, why, how)

"""What units may be selective to: the labels, or the commonest tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.audit.choose import num_units, spread
from patchclamp.audit.context import Context
from patchclamp.core.errors import DataError
from patchclamp.methods.neurons.activity import SiteActivity
from patchclamp.methods.neurons.selectivity import Selectivity, SelectivityResult

MAX_UNITS = 6000
MAX_OBSERVATIONS = 1024
_NUM_TOKENS = 12
_SHARE = 0.15
"""Of the time that is left, for selectivity."""


@dataclass(frozen=True)
class Classes:
    """Names of the classes, and the class of every row, or of every token of every row."""

    names: tuple[str, ...]
    of: Int[Tensor, "row *position"]

    def fits(self, activity: SiteActivity) -> bool:
        """Whether the site has a value for everything that has a class."""
        return self.of.ndim == 1 or int(activity.position.max()) + 1 == self.of.shape[1]

    def observed(self, activity: SiteActivity) -> Int[Tensor, "observation"]:
        """The class of each observation (-1: of no class)."""
        if self.of.ndim == 1:
            return self.of[activity.group]
        return self.of[activity.group, activity.position]


@dataclass(frozen=True)
class Selected:
    """One site's units and what they answer to."""

    activity: SiteActivity
    result: SelectivityResult


def classes(ctx: Context) -> Classes | None:
    """Labels where there are any, else the 12 commonest tokens of a text; None for neither."""
    material = ctx.material
    if material.labels is not None:
        num = int(material.labels.max()) + 1
        given = material.class_names
        names = tuple(given[c] if c < len(given) else str(c) for c in range(num))
        return Classes(names, material.labels)
    tokens = material.tokens
    if tokens is None:
        return None
    common = torch.bincount(tokens.flatten()).argsort(descending=True)[:_NUM_TOKENS]
    tokenizer = ctx.net.tokenizer
    ids = [int(c) for c in common]
    pieces = [str(i) for i in ids] if tokenizer is None else tokenizer.pieces(ids)
    lookup = torch.full((int(tokens.max()) + 1,), -1)
    lookup[common] = torch.arange(common.numel())
    return Classes(tuple(f"token '{p}'" for p in pieces), lookup[tokens])


def selected(ctx: Context, known: Classes | None) -> list[Selected]:
    """Selectivity of as many sites as the limit on units allows, spread over the depth."""
    if known is None:
        ctx.budget.skip(
            "selectivity to classes", "the data has no labels and no tokens", "--data with labels"
        )
        return []
    sites = [a for a in ctx.activities if known.fits(a)]
    if len(sites) < len(ctx.activities):
        ctx.budget.skip(
            f"selectivity of {len(ctx.activities) - len(sites)} sites",
            "their values belong to no single token, and the texts have no labels",
            "--data with labels",
        )
    if not sites:
        return []
    chosen = _affordable(ctx, sites)
    shuffles = 200 if sum(num_units(a.tap) for a in chosen) < 2000 else 100
    method = Selectivity(shuffles=shuffles, seed=ctx.seed)
    made: list[Selected] = []
    refused: list[str] = []
    deadline = time.monotonic() + ctx.budget.share(_SHARE)
    ctx.progress.start("selectivity of units", len(chosen), "sites")
    for number, a in enumerate(chosen):
        if made and time.monotonic() > deadline:
            ctx.budget.skip(
                f"selectivity of {len(chosen) - number} more sites, from {a.tap.label}",
                "its share of the time was used up",
                "a larger --budget",
            )
            break
        at = torch.arange(min(a.values.shape[0], MAX_OBSERVATIONS))
        try:
            made.append(Selected(a, method.run(a.values[at], known.observed(a)[at], a.group[at])))
        except DataError as e:
            refused.append(str(e))
        ctx.progress.advance()
    ctx.progress.finish()
    if refused:
        ctx.budget.skip(f"selectivity of {len(refused)} sites", refused[0], "--data with more rows")
    return made


def _affordable(ctx: Context, sites: list[SiteActivity]) -> list[SiteActivity]:
    units = {a.tap.label: num_units(a.tap) for a in sites}
    for most in range(len(sites), 0, -1):
        kept = {t.label for t in spread([a.tap for a in sites], most)}
        if sum(units[label] for label in kept) <= MAX_UNITS or most == 1:
            break
    if len(kept) < len(sites):
        ctx.budget.skip(
            f"selectivity of {len(sites) - len(kept)} of {len(sites)} sites",
            f"an audit tests at most {MAX_UNITS:,} units; sites were spread over the depth",
            "the method Selectivity on the sites of interest",
        )
    return [a for a in sites if a.tap.label in kept]

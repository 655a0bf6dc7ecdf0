"""Maps that are measured, in the places of the value that they are about, and their control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.attribution.base import SPACE, Attribution
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.faithfulness.removal import Black, Blur, Mean, Removal
from patchclamp.methods.attribution.faithfulness.results import RANDOM
from patchclamp.methods.scoring import Scorer

Maps = Attribution | Tensor | Mapping[str, Attribution | Tensor]
"""A map of each example, or several by name: (num, *places) or (num, *site)."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Maps by name, the control last.

    Shapes: each map (num, *places), or (num, *site) where all of it was asked for.
    """

    maps: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.maps)


def measured_maps(scorer: Scorer, maps: Maps, *, whole: bool, seed: int) -> Measured:
    """Check maps against the value, and add the first of them at random places.

    Args:
        whole: channels stay apart, for measures that need them; otherwise they add up.

    Raises:
        InputError: no map, another shape, or NaN.
    """
    given = dict(maps) if isinstance(maps, Mapping) else {_name(maps): maps}
    if not given or RANDOM in given:
        raise InputError(
            f"give maps to measure, under names other than '{RANDOM}'", got=str(list(given))
        )
    made = {name: _fitted(scorer, name, x, whole=whole) for name, x in given.items()}
    first = next(iter(made.values()))
    made[RANDOM] = _misplaced(scorer, first, keys(scorer), seed)
    return Measured(made)


def places_of(scorer: Scorer) -> tuple[int, ...]:
    """Sizes of the axes that places lie along: the space, or all but the batch."""
    space = [n for a, n in zip(scorer.axes, scorer.value.shape, strict=True) if a in SPACE]
    return tuple(space) or tuple(scorer.value.shape[1:])


def removals_for(scorer: Scorer, asked: Sequence[Removal] | None) -> tuple[Removal, ...]:
    """At least two ways to remove something.

    Raises:
        OptionError: fewer, or the same twice.
    """
    if asked is None:
        space = any(a in SPACE for a in scorer.axes)
        return (Black(), Mean(), Blur()) if space else (Black(), Mean())
    if len({r.name for r in asked}) != len(asked) or len(asked) < 2:
        raise OptionError(
            "a measure of faithfulness needs at least two different removals",
            got=", ".join(r.name for r in asked) or "none",
            hint="the baseline alone can turn the verdict: removals=(Black(), Mean())",
        )
    return tuple(asked)


def _name(x: Attribution | Tensor) -> str:
    return x.method if isinstance(x, Attribution) else "map"


def _fitted(scorer: Scorer, name: str, given: Attribution | Tensor, *, whole: bool) -> Tensor:
    x = given.values if isinstance(given, Attribution) else given
    x = x.detach().to(scorer.value)
    site, places = tuple(scorer.value.shape), (scorer.num, *places_of(scorer))
    if tuple(x.shape) not in (site, places):
        raise InputError(
            f"the map '{name}' does not fit '{scorer.site}' of {scorer.net.name}",
            got=str(tuple(x.shape)),
            expected=f"{places} or {site}",
        )
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"the map '{name}' holds NaN or infinity")
    if tuple(x.shape) == site and not whole:
        rest = [i for i, a in enumerate(scorer.axes) if i > 0 and a not in SPACE]
        return x.sum(rest) if 0 < len(rest) < x.ndim - 1 else x
    if whole and tuple(x.shape) != site:
        raise InputError(
            f"the map '{name}' has one number a place, and slopes are one a channel and place",
            got=str(tuple(x.shape)),
            expected=str(site),
            hint="slopes=False takes maps as shares of the score",
        )
    return x


def _misplaced(scorer: Scorer, x: Tensor, found: Sequence[str], seed: int) -> Tensor:
    """Each example's map elsewhere: moved round by a random way, or shuffled without space.

    A map that is moved is as smooth as it was. Scattered places would not do as a control for
    smooth maps: to remove every second pixel destroys an image whatever they were.
    """
    space = [a for a in scorer.axes if a in SPACE]
    if x.ndim == scorer.value.ndim:
        along = [i for i, a in enumerate(scorer.axes[1:]) if a in SPACE]
    else:
        along = list(range(len(space)))
    made = []
    for row, key in zip(x, found, strict=True):
        source = generator(f"{key} misplaced", seed)
        if along:
            ways = [int(torch.randint(row.shape[i], (1,), generator=source)) for i in along]
            made.append(row.roll(ways, along))
        else:
            order = torch.randperm(row.numel(), generator=source).to(row.device)
            made.append(row.flatten()[order].reshape(row.shape))
    return torch.stack(made)


def removal_order(heat: Tensor, found: Sequence[str], seed: int) -> Tensor:
    """Rank of each place, 0 for the largest: (num, *places) int64; ties in random order.

    Maps with large flat parts would otherwise be removed row by row from the top.
    """
    ranks = []
    for row, key in zip(heat, found, strict=True):
        flat = row.flatten()
        mixed = torch.randperm(flat.numel(), generator=generator(f"{key} ties", seed))
        mixed = mixed.to(flat.device)
        order = mixed[flat[mixed].argsort(descending=True, stable=True)]
        ranks.append(torch.empty_like(order).scatter_(0, order, torch.arange(len(order))))
    return torch.stack(ranks).reshape(heat.shape)

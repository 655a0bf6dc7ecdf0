"""How a sweep cuts sites into cells: which sites have a name of their own, along which axes.

A cell is one edit: a site, and the rows of some of its axes. The result of a sweep has
an axis for what tells the sites apart and one for every axis that they were cut along.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from patchclamp.core.errors import OptionError, nearest
from patchclamp.core.sites import Tap
from patchclamp.model.inputs import BATCH

Groups: TypeAlias = "int | Sequence[Sequence[int]] | Mapping[str, Sequence[int]]"
"""How units are put together: a number of equal groups, or the members of each."""

STREAMS = {name: f"{name}.*" for name in ("resid_pre", "resid_mid", "resid_post")}
PARTS = {"attn_out": "attn.*.out", "mlp_out": "mlp.*.out"}
HEADS = {f"heads.{role}": f"attn.*.{role}" for role in ("z", "q", "k", "v", "pattern")}
OVER = {**STREAMS, **PARTS, "heads": HEADS["heads.z"], **HEADS}
"""What can be swept by name, and the sites that it means."""
_SAME_AXIS: dict[str, tuple[str, ...]] = {
    "head": ("kv_head",),
    "position": ("query",),
    "unit": ("channel",),
}


@dataclass(frozen=True)
class Cell:
    """One edit: a site, which rows of its axes, and its names along the axes of the result."""

    tap: Tap
    where: Mapping[str, Sequence[int]]
    names: tuple[object, ...]


def is_layered(over: str | Iterable[str]) -> bool:
    return isinstance(over, str) and over in OVER


def layer_of(tap: Tap) -> int:
    number = re.search(r"\.(\d+)(\.|$)", tap.label)
    return int(number[1]) if number else 0


@dataclass(frozen=True)
class Cutter:
    """How sites are cut into cells."""

    over: str | Iterable[str]
    by: Sequence[str] | None
    groups: Groups | None

    def axes(self, tap: Tap) -> tuple[str, ...]:
        """The axes of a site that cells are cut along."""
        if self.by is None:
            wanted: tuple[str, ...] = ()
            if isinstance(self.over, str) and (self.over in STREAMS or self.over in PARTS):
                wanted = ("position",)
            elif is_layered(self.over):
                wanted = ("head",)
            elif tap.unit_axis is not None:
                wanted = (tap.unit_axis,)
        else:
            wanted = (self.by,) if isinstance(self.by, str) else tuple(self.by)
        return tuple(self._axis(tap, name) for name in wanted)

    def _axis(self, tap: Tap, name: str) -> str:
        candidates: tuple[str, ...] = (name, *_SAME_AXIS.get(name, ()))
        for candidate in candidates:
            if candidate in tap.axes and candidate != BATCH:
                return candidate
        known = [a for a in tap.axes if a != BATCH]
        raise OptionError(
            f"site '{tap.label}' cannot be cut along '{name}'",
            expected=f"axes among {', '.join(known)}",
            nearest=nearest(name, known),
        )

    def cells(self, tap: Tap, shape: tuple[int, ...]) -> list[Cell]:
        """The cells of a site whose seen value has this shape."""
        axes = self.axes(tap)
        choices: list[list[tuple[object, list[int]]]] = []
        for n, axis in enumerate(axes):
            size = shape[tap.axes.index(axis)]
            if self.groups is not None and n == len(axes) - 1:
                choices.append(self._grouped(size, tap))
            else:
                choices.append([(i, [i]) for i in range(size)])
        if self.groups is not None and not axes:
            raise OptionError("groups need an axis to run along", hint='by=("unit",)')
        return [
            Cell(
                tap,
                {axis: rows for axis, (_, rows) in zip(axes, chosen, strict=True)},
                tuple(name for name, _ in chosen),
            )
            for chosen in itertools.product(*choices)
        ]

    def _grouped(self, size: int, tap: Tap) -> list[tuple[object, list[int]]]:
        groups = self.groups
        if isinstance(groups, int):
            if not 1 <= groups <= size:
                raise OptionError(
                    f"'{tap.label}' cannot be put into {groups} groups",
                    expected=f"1 to {size}",
                )
            parts = torch.arange(size).tensor_split(groups)
            return [(n, part.tolist()) for n, part in enumerate(parts)]
        assert groups is not None
        named = groups.items() if isinstance(groups, Mapping) else enumerate(groups)
        made: list[tuple[object, list[int]]] = []
        for name, members in named:
            rows = [int(i) for i in members]
            if not rows or min(rows) < 0 or max(rows) >= size:
                raise OptionError(
                    f"group '{name}' does not fit '{tap.label}'",
                    got=str(rows[:8]),
                    expected=f"at least one index from 0 to {size - 1}",
                )
            made.append((name, rows))
        return made

    def labels(
        self, cells: Sequence[Cell], *, layered: bool
    ) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, object]]:
        """Dimensions, shape and coordinates of the result."""
        sites = list({cell.tap.label: cell.tap for cell in cells}.values())
        grids = [[c.names for c in cells if c.tap.label == tap.label] for tap in sites]
        axes = list(self.axes(sites[0]))
        if self.groups is not None:
            axes[-1] = "group"
        first = "layer" if layered else "site"
        names = [layer_of(tap) if layered else tap.label for tap in sites]
        alike = all(grid == grids[0] for grid in grids)
        alike = alike and all(self.axes(tap) == self.axes(sites[0]) for tap in sites)
        if alike:
            each = [list(dict.fromkeys(n[i] for n in grids[0])) for i in range(len(axes))]
            coords: dict[str, object] = {first: names}
            coords.update(zip(axes, each, strict=True))
            return (first, *axes), (len(sites), *(len(e) for e in each)), coords
        flat: dict[str, object] = {"site": ("cell", [cell.tap.label for cell in cells])}
        for i, axis in enumerate(axes):
            flat[axis] = ("cell", [cell.names[i] for cell in cells])
        return ("cell",), (len(cells),), flat


ROWS = ("position", "query")
"""Axes that positions lie along."""


@dataclass(frozen=True)
class Difference:
    """Where an edit may change a site: bool, over the axes that cells are cut along and rows.

    Attributes:
        axes: their names.
        row: the one that positions lie along, or None.
    """

    moved: np.ndarray
    axes: tuple[str, ...]
    row: str | None

    @staticmethod
    def of(
        new: torch.Tensor, old: torch.Tensor, tap: Tap, kept: tuple[str, ...], row: str | None
    ) -> Difference:
        moved = new != old
        axes = tuple(a for a in tap.axes if a in kept or a == row)
        others = [i for i, a in enumerate(tap.axes) if a not in axes]
        if others:
            moved = moved.any(others)
        return Difference(moved.cpu().numpy(), axes, row)

    def first(self, where: Mapping[str, Sequence[int]]) -> int | None:
        """The first position that moves within a cell (0 without positions), or None."""
        part = self.moved
        for n, axis in enumerate(self.axes):
            if axis in where:
                part = part.take(list(where[axis]), n)
        if not part.any():
            return None
        if self.row is None:
            return 0
        n = self.axes.index(self.row)
        rows = np.moveaxis(part, n, 0).reshape(part.shape[n], -1).any(1)
        first = int(rows.argmax())
        return where[self.row][first] if self.row in where else first


def copy_rows(
    into: torch.Tensor, source: torch.Tensor, where: Sequence[tuple[int, Sequence[int]]]
) -> None:
    """Write the chosen rows of some axes; at most one of them lists rows that are apart."""
    listed: tuple[int, torch.Tensor] | None = None
    for axis, rows in where:
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            into = into.narrow(axis, rows[0], len(rows))
            source = source.narrow(axis, rows[0], len(rows))
        else:
            assert listed is None
            listed = axis, torch.tensor(rows, device=into.device)
    if listed is None:
        into.copy_(source)
    else:
        into.index_copy_(*listed, source.index_select(*listed))


def bytes_of(memory: int | str) -> int:
    """A size in bytes, also from "500MB" or "2GiB".

    Raises:
        OptionError: it is no such size.
    """
    units = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(memory), re.IGNORECASE)
    if match is None or isinstance(memory, bool):
        raise OptionError("memory is a number of bytes", got=repr(memory), expected='such as "2GB"')
    power = units[match[2].upper()]
    scale = 1 if not match[2] else 2**power if match[3] else 1000 ** (power // 10)
    size = int(float(match[1]) * scale)
    if size < 1:
        raise OptionError("memory must be at least one byte", got=repr(memory))
    return size

"""Site addresses: the one way to name a value inside a network.

An address is a module path and, where needed, the call, the operation and the
leaf of a structured value:

    layers.3.mlp            output of a module
    layers.3.mlp:input      its first tensor input
    lif@2                   output of its third call in one forward pass
    lstm[1]                 second tensor of a structured output
    layers.3.attn:softmax   an operation inside the module (graph engine)
    layers.3.attn:matmul#1  its second operation of that kind
    :output                 the network's own output

A *view* shows part of a raw value under its own axes: heads split out of a
projection, queries sliced out of a fused projection. Aliases such as
`attn.3.q` are a raw address plus a view, so one raw value serves both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patchclamp.core.errors import SiteError, nearest

if TYPE_CHECKING:
    import torch

UNIT_AXES = ("unit", "channel")
"""Axes along which units are counted, in the order of preference."""


@dataclass(frozen=True, slots=True)
class View:
    """Part of a raw value under other axes; `read` then `write` is the identity.

    Attributes:
        narrow: (axis, start, length) kept of the raw value, before splitting.
        split: (axis, outer, inner): that axis becomes two of these sizes; -1 infers one.
    """

    narrow: tuple[int, int, int] | None = None
    split: tuple[int, int, int] | None = None

    def read(self, raw: torch.Tensor) -> torch.Tensor:
        """The seen part (a view of `raw`, no copy)."""
        if self.narrow is not None:
            raw = raw.narrow(*self.narrow)
        if self.split is not None:
            axis, outer, inner = self.split
            raw = raw.unflatten(axis, (outer, inner))
        return raw

    def write(self, raw: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """`raw` with the seen part replaced (a new tensor; gradients flow to both)."""
        if self.split is not None:
            axis = self.split[0] % raw.ndim
            part = part.flatten(axis, axis + 1)
        if self.narrow is not None:
            axis, start, length = self.narrow
            return raw.slice_scatter(part, axis, start, start + length)
        return part

    def shape(self, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """The symbolic shape of the part, from that of the raw value."""
        dims = list(shape)
        if self.narrow is not None:
            dims[self.narrow[0]] = self.narrow[2]
        if self.split is not None:
            axis, outer, inner = self.split
            axis %= len(dims)
            first: int | str = outer if outer > 0 else _divided(dims[axis], inner)
            second: int | str = inner if inner > 0 else _divided(dims[axis], outer)
            dims[axis : axis + 1] = [first, second]
        return tuple(dims)


def _divided(size: int | str, by: int) -> int | str:
    if isinstance(size, int):
        return size // by
    match = re.fullmatch(r"(\d+)\*(\w+)", size)
    if match and int(match[1]) % by == 0:
        factor = int(match[1]) // by
        return match[2] if factor == 1 else f"{factor}*{match[2]}"
    return f"{size}/{by}"


WHOLE = View()


@dataclass(frozen=True, kw_only=True)
class Site:
    """A raw value in the network.

    Attributes:
        address: see the module docstring.
        module: path of the module that it belongs to ("" is the network itself).
        operation: "output", "input" or the operator's name.
        axes: names of its axes, as many as `shape` has.
        shape: sizes; a symbolic one is "batch", "length" or an expression of them.
        dtype: "float32", ...
        parameters: parameters of the module (0 for operations and inputs).
        engines: engines that can reach it.
        order: where in the forward pass it is computed.
    """

    address: str
    module: str
    operation: str
    axes: tuple[str, ...]
    shape: tuple[int | str, ...]
    dtype: str
    parameters: int = 0
    engines: frozenset[str] = frozenset()
    order: int = 0

    @property
    def unit_axis(self) -> str | None:
        """The axis along which units are counted, or None."""
        return unit_axis(self.axes)


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A standard name for a site or part of one."""

    name: str
    address: str
    axes: tuple[str, ...]
    view: View = WHOLE


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A name resolved: which raw site, seen how."""

    label: str
    site: Site
    view: View
    axes: tuple[str, ...]
    shape: tuple[int | str, ...]

    @property
    def unit_axis(self) -> str | None:
        """The axis along which units are counted, or None."""
        return unit_axis(self.axes)


def unit_axis(axes: Sequence[str]) -> str | None:
    """The axis along which units are counted: `unit`, else `channel`, else None."""
    return next((a for a in UNIT_AXES if a in axes), None)


def matches(pattern: str, name: str) -> bool:
    """Glob with `*` and `?` only: brackets are part of addresses, and neither crosses a colon,
    so that `layers.0.*` means modules and `layers.0.*:*` their operations."""
    parts = ("[^:]*" if c == "*" else "[^:]" if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), name) is not None


@dataclass(frozen=True)
class SiteTable:
    """All sites of a network, with its standard aliases. Prints as a tree.

    Attributes:
        network: the network's name, for messages.
        sites: raw sites by address, in the order of the forward pass.
        aliases: standard names.
        missing: raw addresses or aliases that exist but that no engine offers, with the reason.
    """

    network: str
    sites: Mapping[str, Site]
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def __contains__(self, name: object) -> bool:
        return name in self.sites or name in self.aliases

    def __getitem__(self, name: str) -> Tap:
        """Resolve one address or alias; raises SiteError with the nearest match."""
        if name in self.aliases:
            alias = self.aliases[name]
            site = self.sites[alias.address]
            shape = alias.view.shape(site.shape)
            return Tap(label=name, site=site, view=alias.view, axes=alias.axes, shape=shape)
        if name in self.sites:
            site = self.sites[name]
            return Tap(label=name, site=site, view=WHOLE, axes=site.axes, shape=site.shape)
        if name in self.missing:
            raise SiteError(
                f"site '{name}' of {self.network} is not available: {self.missing[name]}",
                hint="net.coverage() lists what each engine offers",
            )
        raise SiteError(
            f"no site '{name}' in {self.network} ({len(self.sites)} sites, "
            f"{len(self.aliases)} aliases)",
            nearest=nearest(name, [*self.aliases, *self.sites]),
            hint="patchclamp sites MODEL, or print(net.sites)",
        )

    def find(self, pattern: str) -> list[Tap]:
        """All aliases and addresses that match a glob (`*`, `?`); aliases win where they match.

        Raises:
            SiteError: nothing matches.
        """
        if "*" not in pattern and "?" not in pattern:
            return [self[pattern]]
        names = [a for a in self.aliases if matches(pattern, a)]
        names = names or [s for s in self.sites if matches(pattern, s)]
        if not names:
            raise SiteError(
                f"no site matches '{pattern}' in {self.network} ({len(self.sites)} sites)",
                nearest=nearest(pattern.strip("*?"), [*self.aliases, *self.sites]),
                hint="patchclamp sites MODEL, or print(net.sites)",
            )
        return [self[name] for name in names]

    def resolve(self, names: str | Iterable[str]) -> list[Tap]:
        """Every tap that a name, a glob, or several of them stand for, each once."""
        patterns = [names] if isinstance(names, str) else list(names)
        taps = {tap.label: tap for pattern in patterns for tap in self.find(pattern)}
        return list(taps.values())

    def aliases_of(self, address: str) -> list[str]:
        """Standard names that stand for (part of) a raw address."""
        return [name for name, alias in self.aliases.items() if alias.address == address]

    def __str__(self) -> str:
        return "\n".join(self.tree())

    def tree(self) -> list[str]:
        """One line a site, indented by module depth, aliases beside the raw address."""
        names: dict[str, list[str]] = {}
        for name, alias in self.aliases.items():
            names.setdefault(alias.address, []).append(name)
        lines = [f"{self.network}: {len(self.sites)} sites, {len(self.aliases)} aliases"]
        for site in sorted(self.sites.values(), key=_tree_key):
            depth = site.module.count(".") + 1 + (site.operation not in ("output",))
            dims = ", ".join(
                a if a == s else f"{a}={s}" for a, s in zip(site.axes, site.shape, strict=True)
            )
            text = f"{'  ' * depth}{site.address}  ({dims}) {site.dtype}"
            if site.parameters:
                text += f"  {site.parameters:,} parameters"
            if site.address in names:
                text += f"  = {', '.join(names[site.address])}"
            lines.append(text)
        return lines


def _tree_key(site: Site) -> tuple[list[tuple[int, int, str]], int, int]:
    """Parents before children, numbers as numbers, operations after the module's own values."""
    parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in site.module.split(".") if p]
    rank = {"input": 0, "output": 1}.get(site.operation, 2)
    return parts, rank, site.order

"""Standard names for the common anatomy, from data-only adapters.

An adapter is a TOML file in `adapters/`: the classes it is for, where the
layers are, and which raw value each standard name stands for. A value may be
split into heads, be a third of a fused projection, or be found by structure
(`attention = "pattern"`). A network without an adapter still gets `logits`
and the names of every attention that is found.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from torch import nn

from patchclamp.core.sites import Alias, Site, View


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one standard name stands for, before it is looked up in a network.

    Attributes:
        site: raw address with `{layer}` in it, or "".
        heads: "query" or "kv" where the last axis is split into heads.
        third: which third of a fused projection.
        attention: role of an attention found by structure.
        producer: address of a module's input; the name stands for the operation that makes
            it, so that an edit reaches everyone who reads that value (a residual stream in
            the middle of a layer is read by the norm *and* by the skip connection).
    """

    site: str = ""
    heads: str = ""
    third: int | None = None
    attention: str = ""
    producer: str = ""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One architecture family; see the module docstring."""

    family: str
    classes: tuple[str, ...]
    layers: str
    query_heads: str
    kv_heads: str
    once: Mapping[str, Part]
    layer: Mapping[str, Part]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The standard names of one network.

    Attributes:
        family: adapter used ("" for none).
        aliases: names that stand for values of modules.
        structural: names that need an attention found in the graph -> (layer path, role).
        producers: names that stand for the operation behind a module's input -> that input.
        missing: names whose raw value this network does not have.
        num_layers: how many layers were found.
        num_heads: query heads of a layer (None where the family has none).
    """

    family: str = ""
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    structural: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    producers: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    num_layers: int = 0
    num_heads: int | None = None

    @property
    def captured(self) -> tuple[str, ...]:
        """Names that only a captured graph can resolve."""
        return (*self.structural, *self.producers)


@cache
def adapters() -> tuple[Adapter, ...]:
    """All adapters that ship with the package."""
    folder = resources.files("patchclamp.model").joinpath("adapters")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return tuple(_read(f.name.removesuffix(".toml"), f.read_text("utf-8")) for f in files)


def _read(family: str, text: str) -> Adapter:
    data = tomllib.loads(text)

    def parts(table: Mapping[str, object]) -> dict[str, Part]:
        return {
            name: Part(site=value) if isinstance(value, str) else Part(**value)  # type: ignore[arg-type]  # the package's own files
            for name, value in table.items()
        }

    return Adapter(
        family=family,
        classes=tuple(data["classes"]),
        layers=data["layers"],
        query_heads=data["query_heads"],
        kv_heads=data["kv_heads"],
        once=parts(data["once"]),
        layer=parts(data["layer"]),
    )


def anatomy(module: nn.Module, sites: Mapping[str, Site]) -> Anatomy:
    """Standard names for this network.

    Args:
        module: the network.
        sites: its module values, by address.
    """
    name = type(module).__name__
    adapter = next((a for a in adapters() if name in a.classes), None)
    if adapter is None:
        return Anatomy(aliases=_plain_logits(sites))
    counts = {
        "query": _lookup(module, adapter.query_heads),
        "kv": _lookup(module, adapter.kv_heads),
    }
    aliases: dict[str, Alias] = {}
    structural: dict[str, tuple[str, str]] = {}
    producers: dict[str, str] = {}
    missing: dict[str, str] = {}
    num_layers = len(list(module.get_submodule(adapter.layers).children()))
    for alias, part, layer in _parts(adapter, num_layers):
        if part.attention:
            structural[alias] = (layer, part.attention)
            continue
        if part.producer:
            producers[alias] = part.producer.format(layer=layer)
            continue
        address = part.site.format(layer=layer)
        if address not in sites and f"{address}[0]" in sites:
            address = f"{address}[0]"
        if address not in sites:
            missing[alias] = f"this network has no value '{address}'"
            continue
        aliases[alias] = _alias(alias, sites[address], part, counts)
    if "logits" not in aliases:
        aliases.update(_plain_logits(sites))
    return Anatomy(
        family=adapter.family,
        aliases=aliases,
        structural=structural,
        producers=producers,
        missing=missing,
        num_layers=num_layers,
        num_heads=counts["query"],
    )


def _parts(adapter: Adapter, num_layers: int) -> Iterator[tuple[str, Part, str]]:
    for name, part in adapter.once.items():
        yield name, part, ""
    for n in range(num_layers):
        for name, part in adapter.layer.items():
            yield name.format(n=n), part, f"{adapter.layers}.{n}"


def _alias(name: str, site: Site, part: Part, counts: Mapping[str, int]) -> Alias:
    last = len(site.shape) - 1
    narrow, split = None, None
    axes = site.axes
    if part.third is not None:
        length = int(site.shape[last]) // 3
        narrow = (last, part.third * length, length)
    if part.heads:
        split = (last, counts[part.heads], -1)
        size = narrow[2] if narrow is not None else int(site.shape[last])
        split = (last, counts[part.heads], size // counts[part.heads])
        same = part.heads == "query" or counts["kv"] == counts["query"]
        axes = (*site.axes[:last], "head" if same else "kv_head", site.axes[last])
    return Alias(name=name, address=site.address, axes=axes, view=View(narrow=narrow, split=split))


def _lookup(module: nn.Module, path: str) -> int:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return int(value)  # type: ignore[call-overload,no-any-return]  # a count in the model's config


def _plain_logits(sites: Mapping[str, Site]) -> dict[str, Alias]:
    site = sites.get(":output")
    if site is None or not site.dtype.startswith(("float", "bfloat")) or len(site.shape) < 2:
        return {}
    return {"logits": Alias(name="logits", address=site.address, axes=site.axes)}

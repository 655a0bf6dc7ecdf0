"""What a store holds and which job made it: `manifest.json`, read and written canonically.

The file carries no time stamp and no machine's name and its keys are sorted, so
two finished stores of one job are equal byte for byte. Everything that is read
here is untrusted: types, sizes and shard names are checked before use. Imports
nothing heavy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar, cast

from patchclamp.core.errors import StoreError, nearest
from patchclamp.core.findings import Json

FORMAT = "patchclamp activation store"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
EXAMPLE_AXIS = "example"

DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""Stored dtypes: the name that numpy and torch share -> (safetensors code, bytes)."""

_SHARD_NAME = re.compile(r"shard-\d+\.safetensors", re.ASCII)
_T = TypeVar("_T")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_dtype(name: object, whose: str) -> None:
    if not isinstance(name, str) or name not in DTYPES:
        raise StoreError(
            f"{whose} cannot be stored with this dtype",
            got=repr(name),
            expected="one of " + ", ".join(DTYPES),
            nearest=nearest(str(name).removeprefix("torch."), DTYPES),
        )


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One recorded site.

    Attributes:
        name: the site's address or alias.
        axes: names of the axes after the leading example axis.
        shape: sizes of these axes, the same for every example.
        dtype: what is stored, a name in `DTYPES`.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "shape", tuple(self.shape))
        named = isinstance(self.name, str) and self.name not in ("", "__metadata__")
        if not named or self.name != self.name.encode("utf-8", "ignore").decode():
            raise StoreError(f"a site cannot be stored under the name {self.name!r}")
        if len(self.axes) != len(self.shape):
            raise StoreError(
                f"site '{self.name}' has {len(self.shape)} sizes and {len(self.axes)} axis names",
                got=f"shape {self.shape}, axes {self.axes}",
                expected="one name for each axis, the example axis left out",
            )
        words = all(isinstance(axis, str) and axis for axis in self.axes)
        if not words or len({EXAMPLE_AXIS, *self.axes}) != len(self.axes) + 1:
            raise StoreError(
                f"site '{self.name}' has axis names that cannot be told apart",
                got=repr(self.axes),
                expected=f"different names, none of them '{EXAMPLE_AXIS}'",
            )
        if not all(_is_count(size, 1) for size in self.shape):
            raise StoreError(
                f"site '{self.name}' has a size that is not a positive whole number",
                got=repr(self.shape),
            )
        _check_dtype(self.dtype, f"site '{self.name}'")

    @property
    def example_bytes(self) -> int:
        """Bytes that one example takes."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The job that a store belongs to: what is recorded, of which model, on which data.

    Attributes:
        sites: what is recorded; each site's own dtype says how it is stored.
        num_examples: examples in the finished store.
        shard_examples: examples in each shard but the last.
        dtype: the dtype that was asked for, for activations.
        versions: packages whose version can change the values.
        extra: further JSON that belongs to the job, such as the tokenizer's settings.
    """

    sites: tuple[SiteSpec, ...]
    num_examples: int
    shard_examples: int
    dtype: str
    model_name: str
    model_hash: str
    data_name: str
    data_hash: str
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        names = [site.name for site in self.sites]
        if not names or len(set(names)) != len(names):
            raise StoreError("a store needs at least one site, each of them once", got=repr(names))
        for name in ("num_examples", "shard_examples"):
            if not _is_count(getattr(self, name), 1):
                raise StoreError(
                    f"'{name}' of a store must be a positive whole number",
                    got=repr(getattr(self, name)),
                )
        _check_dtype(self.dtype, "the store")
        for name in ("model_name", "model_hash", "data_name", "data_hash"):
            if not isinstance(getattr(self, name), str):
                raise StoreError(f"'{name}' of a store must be text", got=repr(getattr(self, name)))
        for name in ("versions", "extra"):
            object.__setattr__(self, name, _as_json_object(name, getattr(self, name)))
        if not all(isinstance(version, str) for version in self.versions.values()):
            raise StoreError("'versions' of a store must be text", got=repr(self.versions))

    @property
    def num_shards(self) -> int:
        """How many shards the finished store has."""
        return -(-self.num_examples // self.shard_examples)

    def shard_count(self, index: int) -> int:
        """Examples in shard `index`; only the last shard may be short."""
        return min(self.shard_examples, self.num_examples - index * self.shard_examples)

    def differences(self, wanted: Manifest) -> tuple[str, ...]:
        """One clause for each field in which `wanted` is another job than this one."""
        found: list[str] = []
        for name in (f.name for f in fields(self)):
            here, there = getattr(self, name), getattr(wanted, name)
            if here == there:
                continue
            if name == "sites":
                found += _site_differences(self.sites, wanted.sites)
            else:
                found.append(f"{name} is {here!r} in the store and {there!r} now")
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a store: `count` examples from `first_example` on."""

    file: str
    first_example: int
    count: int
    sha256: str

    def to_json(self) -> dict[str, Json]:
        """Plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that `manifest.json` says.

    Attributes:
        manifest: the job.
        finished: whether every shard is there.
        shards: the shards, listed once the store is finished.
        nonfinite: for each site, how many stored values are NaN or infinite.
    """

    manifest: Manifest
    finished: bool = False
    shards: tuple[Shard, ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)


def shard_name(index: int) -> str:
    """File name of shard `index`."""
    return f"shard-{index:05d}.safetensors"


def canonical(data: Mapping[str, Json]) -> bytes:
    """JSON in the one form that stores use: sorted keys, ASCII, closing newline."""
    text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def to_bytes(contents: Contents) -> bytes:
    """`manifest.json` of `contents`."""
    manifest = contents.manifest
    data: dict[str, Json] = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    data["sites"] = [
        {"name": s.name, "axes": list(s.axes), "shape": list(s.shape), "dtype": s.dtype}
        for s in manifest.sites
    ]
    data["format"], data["schema_version"] = FORMAT, SCHEMA_VERSION
    data["finished"] = contents.finished
    data["shards"] = [shard.to_json() for shard in contents.shards]
    data["nonfinite"] = dict(contents.nonfinite)
    return canonical(data)


def read_object(path: Path) -> dict[str, Json]:
    """The JSON object in `path`.

    Raises: StoreError if it cannot be read or is something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"'{path}' cannot be read", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"'{path}' is damaged: it is not JSON", got=str(error)) from error
    if not isinstance(data, dict):
        raise StoreError(f"'{path}' is damaged: it is not a JSON object", got=type(data).__name__)
    return data


def read_contents(folder: Path) -> Contents:
    """Read and check `manifest.json` of `folder`.

    Raises: StoreError if there is none, it is damaged, newer than this version
        understands, or names a shard that is not a plain shard file.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise StoreError(f"'{folder}' is not an activation store: it has no {MANIFEST_NAME}")
    data = read_object(path)
    if data.pop("format", None) != FORMAT:
        raise StoreError(f"'{path}' is not the manifest of an activation store")
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"'{path}' has a schema version that this patchclamp does not read",
            got=repr(version),
            expected=str(SCHEMA_VERSION),
            hint="pip install --upgrade patchclamp",
        )
    try:
        finished = _take(data, "finished", bool)
        shards = tuple(shard_from_json(shard) for shard in _take(data, "shards", list))
        sites = tuple(_site_from_json(site) for site in _take(data, "sites", list))
        names = {site.name for site in sites} if finished else set()
        nonfinite = counts_from_json(data.pop("nonfinite", None), names)
        _only({f.name for f in fields(Manifest)} - {"sites"}, data)
        manifest = Manifest(sites=sites, **data)  # type: ignore[arg-type]  # checked by Manifest
        _check_shards(manifest, finished, shards)
    except StoreError as error:
        raise StoreError(f"'{path}' is damaged or was edited: {error}") from error
    return Contents(manifest=manifest, finished=finished, shards=shards, nonfinite=nonfinite)


def shard_from_json(data: Json) -> Shard:
    """A shard's record, checked.

    Raises: StoreError, above all for a file name that is not `shard-<digits>.safetensors`.
    """
    if not isinstance(data, dict):
        raise StoreError("a shard's record is not an object", got=type(data).__name__)
    _only({f.name for f in fields(Shard)}, data)
    file, sha256 = data["file"], data["sha256"]
    if not isinstance(file, str) or _SHARD_NAME.fullmatch(file) is None:
        raise StoreError("unsafe shard name", got=repr(file), expected="'shard-00000.safetensors'")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise StoreError(f"'{file}' has no sha256", got=repr(sha256))
    first, count = data["first_example"], data["count"]
    if not _is_count(first, 0) or not _is_count(count, 1):
        raise StoreError(f"'{file}' has no example range", got=f"{first!r}, {count!r}")
    return Shard(**data)  # type: ignore[arg-type]  # checked above


def counts_from_json(data: Json, names: set[str]) -> dict[str, int]:
    """Numbers of nonfinite values by site, checked."""
    if not isinstance(data, dict):
        raise StoreError("'nonfinite' is not an object", got=type(data).__name__)
    _only(names, data)
    for name, value in data.items():
        if not _is_count(value, 0):
            raise StoreError(f"'nonfinite' of '{name}' is not a count", got=repr(value))
    return cast(dict[str, int], dict(data))


def _check_shards(manifest: Manifest, finished: bool, shards: tuple[Shard, ...]) -> None:
    expected = manifest.num_shards if finished else 0
    if len(shards) != expected:
        raise StoreError(
            "the shard list has the wrong length", got=str(len(shards)), expected=str(expected)
        )
    for index, shard in enumerate(shards):
        check_place(manifest, index, shard)


def check_place(manifest: Manifest, index: int, shard: Shard) -> None:
    """Raise StoreError unless `shard` is exactly what must stand at `index`."""
    place = (shard_name(index), index * manifest.shard_examples, manifest.shard_count(index))
    if (shard.file, shard.first_example, shard.count) != place:
        raise StoreError(
            f"shard {index} is not what this store holds there",
            got=f"'{shard.file}' from example {shard.first_example}, {shard.count} examples",
            expected=f"'{place[0]}' from example {place[1]}, {place[2]} examples",
        )


def _site_from_json(data: Json) -> SiteSpec:
    if not isinstance(data, dict):
        raise StoreError("a site's record is not an object", got=type(data).__name__)
    _only({f.name for f in fields(SiteSpec)}, data)
    if not isinstance(data["axes"], list) or not isinstance(data["shape"], list):
        raise StoreError("a site's axes and shape must be lists", got=repr(data))
    return SiteSpec(**data)  # type: ignore[arg-type]  # SiteSpec checks what it is given


def _take(data: dict[str, Json], name: str, kind: type[_T]) -> _T:
    value = data.pop(name, None)
    if not isinstance(value, kind):
        raise StoreError(f"'{name}' is missing or of the wrong type", got=repr(value))
    return value


def _only(names: set[str], data: Mapping[str, object]) -> None:
    if set(data) != names:
        missing, unknown = sorted(names - set(data)), sorted(set(data) - names)
        raise StoreError("wrong fields", got=f"missing {missing}, unknown {unknown}")


def _as_json_object(name: str, value: object) -> dict[str, Json]:
    """A copy of `value` as JSON would give it back, so that equality survives the disk."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise StoreError(f"'{name}' of a store must map text to JSON", got=repr(value))
    try:
        data: dict[str, Json] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"'{name}' of a store is not JSON", got=str(error)) from error
    return data


def _site_differences(here: tuple[SiteSpec, ...], there: tuple[SiteSpec, ...]) -> list[str]:
    old, new = {s.name: s for s in here}, {s.name: s for s in there}
    found = [f"site '{name}' is in the store only" for name in old if name not in new]
    found += [f"site '{name}' is not in the store" for name in new if name not in old]
    for name in (name for name in old if name in new):
        for part in ("axes", "shape", "dtype"):
            a, b = getattr(old[name], part), getattr(new[name], part)
            if a != b:
                found.append(f"{part} of site '{name}' is {a!r} in the store and {b!r} now")
    return found or ["the sites are in another order"]

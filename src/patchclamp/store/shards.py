"""Shard files: plain safetensors, laid out so that the reader knows every offset.

The header is a function of the sites and the number of examples alone. The
reader computes it again and compares it with the file's, so that no offset is
ever taken from a file. Tensors are ordered by item size, then by name, and
start at a multiple of 64 bytes, which keeps every mapped array aligned.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from patchclamp.core.errors import StoreError
from patchclamp.store.manifest import DTYPES, SiteSpec

_ALIGN = 64
_BLOCK = 1 << 22
"""Bytes that are written and hashed at a time, so that they are still in the CPU's cache."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything is in a shard.

    Attributes:
        count: examples in the shard.
        header: the bytes before the first tensor.
        sites: the sites in the order of the file.
        offsets: first byte of each site.
        size: bytes of the whole file.
    """

    count: int
    header: bytes
    sites: tuple[SiteSpec, ...]
    offsets: Mapping[str, int]
    size: int


def layout(sites: Iterable[SiteSpec], count: int) -> Layout:
    """The layout of a shard of `count` examples."""
    ordered = tuple(sorted(sites, key=lambda site: (-DTYPES[site.dtype][1], site.name)))
    entries: dict[str, object] = {}
    starts: dict[str, int] = {}
    end = 0
    for site in ordered:
        starts[site.name], end = end, end + count * site.example_bytes
        entries[site.name] = {
            "dtype": DTYPES[site.dtype][0],
            "shape": [count, *site.shape],
            "data_offsets": [starts[site.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Layout(
        count=count, header=header, sites=ordered, offsets=offsets, size=len(header) + end
    )


def blocks(plan: Layout, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Iterator[memoryview]:
    """The bytes of a shard; arrays have shape (count, *site) and the stored dtype."""
    yield memoryview(plan.header)
    for site in plan.sites:
        array = arrays[site.name]
        assert array.shape == (plan.count, *site.shape)
        assert array.dtype == np.dtype(site.dtype)
        data = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]


def check_present(path: Path, plan: Layout) -> None:
    """Raise StoreError naming the shard unless it is a file of the right size."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise StoreError(f"shard '{path.name}' is missing", got=error.strerror) from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != plan.size:
        raise StoreError(
            f"shard '{path.name}' is damaged: wrong size",
            got=f"{status.st_size} bytes",
            expected=f"{plan.size} bytes",
            hint="record this store again, or copy the shard from a good copy",
        )


class MappedShard:
    """A shard mapped into memory, read-only; pages are read when they are touched."""

    def __init__(self, path: Path, plan: Layout) -> None:
        check_present(path, plan)
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), plan.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StoreError(f"shard '{path.name}' cannot be read", got=str(error)) from error
        if self._map[: len(plan.header)] != plan.header:
            raise StoreError(
                f"shard '{path.name}' is damaged: its header is not that of this store",
                hint="record this store again, or copy the shard from a good copy",
            )
        self._plan = plan

    def view(self, site: SiteSpec) -> npt.NDArray[np.generic]:
        """All rows of `site`, shape (count, *site), as a read-only view of the file."""
        shape = (self._plan.count, *site.shape)
        offset = self._plan.offsets[site.name]
        count = self._plan.count * site.example_bytes // np.dtype(site.dtype).itemsize
        flat = np.frombuffer(self._map, dtype=site.dtype, count=count, offset=offset)
        return flat.reshape(shape)

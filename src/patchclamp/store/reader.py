"""Read a store: labelled lazy arrays, fast batches, checks.

Nothing is read before it is asked for, and then only the rows that were asked
for: an array's examples are found by dividing by the shard size, its shard is
mapped, and its rows are copied out. The adapter for xarray is the one that
xarray documents for file formats: a `BackendArray` that answers basic and
outer indexing, inside a `LazilyIndexedArray`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from patchclamp.core.errors import OptionError, SiteError, StoreError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.store.files import sha256_of
from patchclamp.store.manifest import EXAMPLE_AXIS, Manifest, Shard, SiteSpec, read_contents
from patchclamp.store.shards import Layout, MappedShard, check_present, layout

_MAX_MAPPED = 64
"""Shards that are mapped at a time; each holds an open file."""

Array = npt.NDArray[np.generic]
Indices = npt.NDArray[np.int64]


def open_store(path: str | Path) -> Store:
    """Open a finished store. Reads the manifest and the sizes of the shards, no values.

    Raises: StoreError if it is missing, unfinished or damaged, naming the shard.
    """
    return Store(path)


class Store:
    """A finished store of activations; `store["site"]` is a lazy `xarray.DataArray`.

    Attributes:
        path: the folder.
        manifest: the job that made it.
        sites: the recorded sites by name, in the order of the job.
        shards: the files, with their checksums.
        nonfinite: for each site, how many values are NaN or infinite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        contents = read_contents(self.path)
        if not contents.finished:
            raise StoreError(
                f"'{self.path}' is not finished: its recording was interrupted",
                hint="run the same recording again; it goes on where it stopped",
            )
        self.manifest: Manifest = contents.manifest
        self.shards: tuple[Shard, ...] = contents.shards
        self.nonfinite: Mapping[str, int] = MappingProxyType(contents.nonfinite)
        self.sites: Mapping[str, SiteSpec] = MappingProxyType(
            {site.name: site for site in self.manifest.sites}
        )
        plans = {n: layout(self.manifest.sites, n) for n in {s.count for s in self.shards}}
        self._plans: Mapping[int, Layout] = plans
        for shard in self.shards:
            check_present(self.path / shard.file, plans[shard.count])
        self._mapped: OrderedDict[int, MappedShard] = OrderedDict()
        self._guard = threading.Lock()

    def __getitem__(self, site: str) -> xr.DataArray:
        """The site as a lazy array, dims ("example", *axes); slices stay lazy until read."""
        spec = self._spec(site)
        lazy = indexing.LazilyIndexedArray(_StoredSite(self, spec))
        manifest = self.manifest
        about = {
            "site": site,
            "model": manifest.model_name,
            "model_hash": manifest.model_hash,
            "data": manifest.data_name,
            "data_hash": manifest.data_hash,
            "num_nonfinite": self.nonfinite[site],
        }
        variable = xr.Variable((EXAMPLE_AXIS, *spec.axes), lazy, attrs=about)
        return xr.DataArray(variable, name=site)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        lines = [f"<Store '{self.path}': {self.manifest.num_examples} examples>"]
        for site in self.sites.values():
            axes = ", ".join(f"{a}: {n}" for a, n in zip(site.axes, site.shape, strict=True))
            lines.append(f"  {site.name}  ({axes})  {site.dtype}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        """Copies and other processes open the folder again; maps do not travel."""
        return Store, (self.path,)

    def batches(
        self, site: str, size: int, shuffle_seed: int | None = None, *, flatten: bool = False
    ) -> Iterator[torch.Tensor]:
        """Every row of `site` once, in batches; the last one may be short.

        With `flatten`, all axes but the last join the example axis: (example,
        position, unit) comes as rows of units, and `size` counts such rows.

        Shapes: (batch, *site), or (batch, last axis) with `flatten`.
        Randomness: `shuffle_seed` shuffles all rows of the store; the same seed
            gives the same order. None keeps the order of the store.
        Cost: one copy of each row; 8 bytes of memory per row when shuffled.
        """
        spec = self._spec(site)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise OptionError("a batch needs a positive size", got=repr(size))
        if flatten and not spec.shape:
            raise OptionError(f"site '{site}' has one value per example and nothing to flatten")
        return self._batches(spec, size, shuffle_seed, flatten)

    def _batches(
        self, spec: SiteSpec, size: int, seed: int | None, flatten: bool
    ) -> Iterator[torch.Tensor]:
        shape = spec.shape[-1:] if flatten else spec.shape
        per_example = int(np.prod(spec.shape[:-1])) if flatten else 1
        num_rows = self.manifest.num_examples * per_example
        per_shard = self.manifest.shard_examples * per_example
        order = None if seed is None else np.random.default_rng(seed).permutation(num_rows)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        for start in range(0, num_rows, size):
            stop = min(start + size, num_rows)
            batch = torch.empty((stop - start, *shape), dtype=dtype)
            into = batch.numpy()
            rows = slice(start, stop) if order is None else order[start:stop]
            for where, shard, inside in _by_shard(rows, per_shard):
                stored = self.rows(spec.name, shard).reshape(-1, *shape)
                if isinstance(inside, slice):
                    into[where] = stored[inside]
                else:
                    into[where] = stored.take(inside, axis=0)
            yield batch

    def rows(self, site: str, shard: int) -> Array:
        """One shard of a site as a read-only view of the file, shape (count, *site)."""
        spec = self._spec(site)
        with self._guard:
            mapped = self._mapped.pop(shard, None)
            if mapped is None:
                entry = self.shards[shard]
                mapped = MappedShard(self.path / entry.file, self._plans[entry.count])
            self._mapped[shard] = mapped
            if len(self._mapped) > _MAX_MAPPED:
                self._mapped.popitem(last=False)
        return mapped.view(spec)

    def verify(self, progress: Progress = SILENT) -> None:
        """Read all shards and compare their checksums.

        Raises: StoreError naming every shard that is missing or damaged.
        """
        damaged: list[str] = []
        progress.start("verifying shards", total=len(self.shards), unit="shards")
        for shard in self.shards:
            path = self.path / shard.file
            if not path.is_file() or sha256_of(path) != shard.sha256:
                damaged.append(f"'{shard.file}'")
            progress.advance()
        progress.finish()
        if damaged:
            raise StoreError(
                f"'{self.path}' is damaged: {', '.join(damaged)} "
                f"{'has' if len(damaged) == 1 else 'have'} not the bytes that were written",
                hint="record this store again, or copy the shard from a good copy",
            )

    def to_zarr(self, path: str | Path, progress: Progress = SILENT) -> None:
        """Export to a new Zarr group, one shard in memory at a time.

        Raises: MissingExtraError without the extra `zarr`; OutputError if `path`
            exists or cannot be written, and then nothing is left there.
        """
        from patchclamp.store.zarr_export import export

        export(self, Path(path), progress)

    def _spec(self, site: str) -> SiteSpec:
        if site not in self.sites:
            raise SiteError(
                f"no site {site!r} in '{self.path}' ({len(self.sites)} sites)",
                nearest=nearest(str(site), self.sites),
                hint="'store.sites' lists them",
            )
        return self.sites[site]


class _StoredSite(BackendArray):
    """One site as xarray sees it: a shape, a dtype and outer indexing."""

    def __init__(self, store: Store, spec: SiteSpec) -> None:
        self.shape = (store.manifest.num_examples, *spec.shape)
        self.dtype = np.dtype(spec.dtype)
        self._store, self._spec = store, spec

    def __getitem__(self, key: indexing.ExplicitIndexer) -> object:
        _check_bounds(key.tuple, self.shape)
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[int | np.integer | slice | Indices, ...]) -> Array:
        """Outer indexing: each entry picks along its own axis; whole numbers drop theirs."""
        # Numbers become slices of length one, so that at most one entry of the
        # index into the file is an array: the examples. Arrays along other axes follow.
        cuts = [_cut(k) for k in key]
        rows = _rows(cuts[0], self.shape[0])
        inner = tuple(k if isinstance(k, slice) else slice(None) for k in cuts[1:])
        num = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        sizes = (len(range(*k.indices(n))) for k, n in zip(inner, self.shape[1:], strict=True))
        found = np.empty((num, *sizes), dtype=self.dtype)
        for where, shard, inside in _by_shard(rows, self._store.manifest.shard_examples):
            found[where] = self._store.rows(self._spec.name, shard)[(inside, *inner)]
        for axis, k in enumerate(cuts[1:], start=1):
            if isinstance(k, np.ndarray):
                found = found.take(k, axis=axis)
        dropped = tuple(i for i, k in enumerate(key) if not isinstance(k, (slice, np.ndarray)))
        return found.squeeze(axis=dropped)


def _cut(key: int | np.integer | slice | Indices) -> slice | Indices:
    """`key` along an axis, with a slice of length one for a number."""
    if isinstance(key, (slice, np.ndarray)):
        return key
    return slice(int(key), int(key) + 1)


def _check_bounds(key: tuple[object, ...], shape: tuple[int, ...]) -> None:
    """Refuse positions outside the array.

    `LazilyIndexedArray` has made negative positions positive by now, so what is
    negative still was out of range; xarray would wrap it round a second time.
    """
    for part, size in zip(key, shape, strict=True):
        if isinstance(part, slice):
            continue
        places = np.asarray(part)
        outside = places[(places < 0) | (places >= size)]
        if outside.size:
            found = outside.flat[0] - (size if outside.flat[0] < 0 else 0)
            raise IndexError(f"index {found} is out of bounds for an axis of size {size}")


def _rows(key: slice | Indices, length: int) -> slice | Indices:
    """The examples that `key` picks: a plain slice where they are consecutive."""
    if isinstance(key, slice):
        start, stop, step = key.indices(length)
        if step == 1:
            return slice(start, max(start, stop))
        return np.arange(start, stop, step, dtype=np.int64)
    return key


def _by_shard(
    rows: slice | Indices, per_shard: int
) -> Iterator[tuple[slice | Indices, int, slice | Indices]]:
    """Split `rows` by shard: (places in the result, shard, rows inside the shard)."""
    if isinstance(rows, slice):
        start = rows.start
        while start < rows.stop:
            shard, first = divmod(start, per_shard)
            stop = min(rows.stop, start - first + per_shard)
            where = slice(start - rows.start, stop - rows.start)
            yield where, shard, slice(first, first + stop - start)
            start = stop
        return
    shards = rows // per_shard
    order = np.argsort(shards, kind="stable")
    if order.size:
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            shard = int(shards[places[0]])
            yield places, shard, rows[places] - shard * per_shard

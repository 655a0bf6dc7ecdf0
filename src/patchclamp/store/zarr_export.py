"""Export a store to a Zarr group that xarray opens as one dataset.

Zarr is the form that other tools read; it is slower to draw batches from than
the shards. A dataset wants one size for each axis name, while two sites may
both have an axis "unit" of their own size: where sizes differ, the axis name
carries its size ("unit_576"), and the attribute `axes` keeps the plain names.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from patchclamp.core.errors import MissingExtraError, OutputError
from patchclamp.core.progress import Progress
from patchclamp.store.files import beside, disk_errors
from patchclamp.store.manifest import EXAMPLE_AXIS, SiteSpec

if TYPE_CHECKING:
    from patchclamp.store.reader import Store

_CHUNK_BYTES = 1 << 24


def export(store: Store, path: Path, progress: Progress) -> None:
    """Write all sites of `store` to the new group `path`, beside it first."""
    zarr = _zarr()
    part = beside(path)
    with disk_errors(path):
        if path.exists():
            raise OutputError(f"'{path}' exists already", hint="remove it or choose another name")
        if part.exists():  # left by an export that was killed
            shutil.rmtree(part)
        try:
            _fill(zarr, store, part, progress)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _zarr() -> ModuleType:
    try:
        return importlib.import_module("zarr")
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise MissingExtraError(
            "exporting to Zarr needs the package 'zarr'",
            hint="pip install 'patchclamp[zarr]'",
        ) from error


def _fill(zarr: ModuleType, store: Store, part: Path, progress: Progress) -> None:
    manifest = store.manifest
    part.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(
        store=str(part),
        attributes={
            "model": manifest.model_name,
            "model_hash": manifest.model_hash,
            "data": manifest.data_name,
            "data_hash": manifest.data_hash,
            "versions": manifest.versions,
            "extra": manifest.extra,
        },
    )
    axes = _axis_names(manifest.sites)
    arrays = {
        site.name: group.create_array(
            name=array_name(site.name),
            shape=(manifest.num_examples, *site.shape),
            chunks=(_chunk_rows(site, manifest.shard_examples), *site.shape),
            dtype=site.dtype,
            dimension_names=(EXAMPLE_AXIS, *axes[site.name]),
            attributes={
                "site": site.name,
                "axes": list(site.axes),
                "num_nonfinite": store.nonfinite[site.name],
            },
        )
        for site in manifest.sites
    }
    progress.start("exporting to Zarr", total=manifest.num_examples, unit="examples")
    for index, shard in enumerate(store.shards):
        place = slice(shard.first_example, shard.first_example + shard.count)
        for name, array in arrays.items():
            array[place] = store.rows(name, index)
        progress.advance(shard.count)
    progress.finish()


def array_name(site: str) -> str:
    """The site's name as one step of a Zarr path: "/" is a folder there, dots alone are not."""
    if site.strip(".") == "":
        return site.replace(".", "%2E")
    return site.replace("%", "%25").replace("/", "%2F")


def _chunk_rows(site: SiteSpec, shard_examples: int) -> int:
    """Examples in a chunk: a divisor of the shard, so that no chunk is written twice."""
    most = max(1, min(shard_examples, _CHUNK_BYTES // site.example_bytes))
    return next(rows for rows in range(most, 0, -1) if shard_examples % rows == 0)


def _axis_names(sites: tuple[SiteSpec, ...]) -> dict[str, tuple[str, ...]]:
    """Axis names for each site, with the size added where sites disagree on it."""
    sizes: dict[str, set[int]] = {}
    for site in sites:
        for axis, size in zip(site.axes, site.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    return {
        site.name: tuple(
            axis if len(sizes[axis]) == 1 else f"{axis}_{size}"
            for axis, size in zip(site.axes, site.shape, strict=True)
        )
        for site in sites
    }

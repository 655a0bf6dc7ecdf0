"""Fill a store shard by shard; survive a kill at any moment.

A shard counts once its record, `shard-00003.json` with its checksum, stands
beside it. Shard first, then record, then the final manifest, then the records
go: whatever a kill leaves is one of these states, and each of them is resumed
to the same bytes. Which shard an example lands in depends on its number alone,
so batch sizes and kills leave no trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from patchclamp.core.errors import StoreError, nearest
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.store.files import (
    LOCK_NAME,
    FolderLock,
    disk_errors,
    sha256_of,
    sync_folder,
    write_whole,
)
from patchclamp.store.manifest import (
    MANIFEST_NAME,
    Contents,
    Manifest,
    Shard,
    SiteSpec,
    canonical,
    check_place,
    counts_from_json,
    read_contents,
    read_object,
    shard_from_json,
    shard_name,
    to_bytes,
)
from patchclamp.store.shards import blocks, check_present, layout

_PARTS = re.compile(r"\.(shard-\d+\.(safetensors|json)|manifest\.json)\.tmp", re.ASCII)


def record_name(index: int) -> str:
    """File name of the record that makes shard `index` count."""
    return f"shard-{index:05d}.json"


class StoreWriter:
    """Writes one store; use it as a context manager.

    Opens a new or empty folder, or an unfinished store of the same job, whose
    shards it checks first. A finished store of the same job is left as it is.

    Memory: one shard. Values are stored as they are, NaN included; how many
    are not finite is counted in the manifest. A value that the stored dtype
    cannot hold is refused.

    Raises: StoreError if the folder holds something else, another job, a
        damaged shard, or has another writer; OutputError if it cannot be written.
    """

    def __init__(self, path: str | Path, manifest: Manifest, progress: Progress = SILENT) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._progress = progress
        self._shards: list[Shard] = []
        self._nonfinite = dict.fromkeys((site.name for site in manifest.sites), 0)
        self._pending = dict(self._nonfinite)
        self._buffers: dict[str, torch.Tensor] = {}
        self._fill = 0
        self._broken = False
        self._refuse_foreign()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        try:
            self.finished = False
            self.finished = self._resume()
            left = manifest.num_examples - self.next_example
            self._progress.start("recording", total=left, unit="examples")
        except BaseException:
            self._lock.release()
            raise
        self._open = True

    @property
    def next_example(self) -> int:
        """Number of the example that the next `append` must begin with.

        Just after opening it is a multiple of `shard_examples`, or `num_examples`.
        """
        if self.finished:
            return self.manifest.num_examples
        return len(self._shards) * self.manifest.shard_examples + self._fill

    def append(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Add a batch, from example `next_example` on.

        Shapes: each array (batch, *site), any batch size, on any device. Floats
        are rounded to the stored dtype; whole numbers and booleans keep theirs
        or a narrower one that holds them.
        Raises: StoreError if sites, shapes or values do not fit, OutputError if
            the disk refuses. The store can be resumed after either.
        """
        if self.finished or not self._open or self._broken:
            state = "finished" if self.finished else "closed" if not self._open else "broken off"
            raise StoreError(
                f"'{self.path}' takes no more examples: the writer is {state}",
                hint="open a new StoreWriter on it to go on",
            )
        size = self._check_batch(arrays)
        self._broken = True
        start = 0
        while start < size:
            room = self.manifest.shard_count(len(self._shards)) - self._fill
            step = min(room, size - start)
            for site in self.manifest.sites:
                self._fill_buffer(site, arrays[site.name][start : start + step].detach())
            self._fill += step
            start += step
            if step == room:
                self._write_shard()
        self._broken = False
        self._progress.advance(size)

    def finish(self) -> None:
        """Write the final manifest, remove the temporaries and close.

        Raises: StoreError while examples are missing; OutputError.
        """
        if not self.finished:
            if not self._open or len(self._shards) != self.manifest.num_shards:
                raise StoreError(
                    f"'{self.path}' cannot be finished"
                    + ("" if self._open else ": the writer is closed"),
                    got=f"{len(self._shards)} whole shards",
                    expected=f"{self.manifest.num_shards}",
                    hint=f"append the examples up to {self.manifest.num_examples} first",
                )
            contents = Contents(
                manifest=self.manifest,
                finished=True,
                shards=tuple(self._shards),
                nonfinite=self._nonfinite,
            )
            write_whole(self.path / MANIFEST_NAME, [to_bytes(contents)])
            self.finished = True
            self._remove([record_name(index) for index in range(self.manifest.num_shards)])
        self.close()

    def close(self) -> None:
        """Let the folder go; what is buffered and not a whole shard is dropped."""
        if self._open:
            self._open = False
            self._buffers = {}
            self._progress.finish()
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- opening ---------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        """Refuse a folder with files of somebody else, before anything is written to it."""
        with disk_errors(self.path):
            if not self.path.exists():
                return
            if not self.path.is_dir():
                raise StoreError(f"'{self.path}' is a file", expected="a folder for the store")
            names = sorted(entry.name for entry in self.path.iterdir())
        if MANIFEST_NAME in names:
            return
        foreign = [name for name in names if name != LOCK_NAME and not _PARTS.fullmatch(name)]
        if foreign:
            raise StoreError(
                f"'{self.path}' holds other files and no store",
                got=f"'{foreign[0]}'" + (f" and {len(foreign) - 1} more" if foreign[1:] else ""),
                hint="choose a new or an empty folder",
            )

    def _resume(self) -> bool:
        """Take up what is there; returns whether the store is finished already."""
        with disk_errors(self.path):
            known = (self.path / MANIFEST_NAME).exists()
        if not known:
            write_whole(self.path / MANIFEST_NAME, [to_bytes(Contents(manifest=self.manifest))])
        found = read_contents(self.path)
        differences = found.manifest.differences(self.manifest)
        if differences:
            raise StoreError(
                f"'{self.path}' belongs to another job: " + "; ".join(differences),
                hint="choose another folder, or delete this one",
            )
        with disk_errors(self.path):
            names = {entry.name for entry in self.path.iterdir()}
        self._remove(name for name in names if _PARTS.fullmatch(name))
        if found.finished:
            self._remove(names & {record_name(index) for index in range(len(found.shards))})
            return True
        self._take_up_shards(names)
        return False

    def _take_up_shards(self, names: set[str]) -> None:
        total = self.manifest.num_shards
        recorded = {index for index in range(total) if record_name(index) in names}
        if not recorded:
            return
        self._progress.start("checking shards", total=len(recorded), unit="shards")
        for index in range(max(recorded) + 1):
            self._shards.append(self._checked_shard(index, index in recorded))
            self._progress.advance()
        self._progress.finish()
        self._progress.note(f"resuming at example {self.next_example}")

    def _checked_shard(self, index: int, recorded: bool) -> Shard:
        """The record of shard `index`, after its bytes were compared with it."""
        path = self.path / shard_name(index)
        way_out = f"delete '{path.name}' and every later shard-* file, then resume"
        try:
            if not recorded:
                raise StoreError(f"its record '{record_name(index)}' is missing")
            data = read_object(self.path / record_name(index))
            nonfinite = counts_from_json(data.pop("nonfinite", None), set(self._nonfinite))
            shard = shard_from_json(data)
            check_place(self.manifest, index, shard)
            check_present(path, layout(self.manifest.sites, shard.count))
            if sha256_of(path) != shard.sha256:
                raise StoreError("its bytes are not those that were written")
        except StoreError as error:
            raise StoreError(
                f"shard '{path.name}' of '{self.path}' is damaged: {error.what}",
                got=error.got,
                expected=error.expected,
                hint=way_out,
            ) from error
        for name, count in nonfinite.items():
            self._nonfinite[name] += count
        return shard

    def _remove(self, names: Iterable[str]) -> None:
        with disk_errors(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            sync_folder(self.path)

    # -- appending -------------------------------------------------------------

    def _check_batch(self, arrays: Mapping[str, torch.Tensor]) -> int:
        """Check names, shapes and kinds before anything is taken; returns the batch size."""
        specs = {site.name: site for site in self.manifest.sites}
        for name in arrays:
            if name not in specs:
                raise StoreError(
                    f"'{self.path}' has no site '{name}'", nearest=nearest(name, specs)
                )
        sizes: dict[str, int] = {}
        for name, site in specs.items():
            if name not in arrays:
                raise StoreError(f"site '{name}' is missing in this batch")
            array = arrays[name]
            if array.ndim == 0 or tuple(array.shape[1:]) != site.shape:
                raise StoreError(
                    f"site '{name}' has another shape than the store",
                    got=str(tuple(array.shape)),
                    expected=str(("batch", *site.shape)),
                )
            if _kind(array.dtype) != _kind(_torch_dtype(site)):
                raise StoreError(
                    f"site '{name}' cannot be stored as {site.dtype}",
                    got=str(array.dtype).removeprefix("torch."),
                    hint="name a dtype of the same kind in the site's SiteSpec",
                )
            sizes[name] = int(array.shape[0])
        if len(set(sizes.values())) != 1:
            raise StoreError("the sites of this batch have different sizes", got=repr(sizes))
        size = next(iter(sizes.values()))
        if self.next_example + size > self.manifest.num_examples:
            raise StoreError(
                f"more examples than the {self.manifest.num_examples} of this store",
                got=str(self.next_example + size),
            )
        return size

    def _fill_buffer(self, site: SiteSpec, rows: torch.Tensor) -> None:
        """Cast `rows` into the buffer; refuse what the stored dtype cannot hold."""
        if site.name not in self._buffers:
            size = min(self.manifest.shard_examples, self.manifest.num_examples)
            self._buffers[site.name] = torch.empty((size, *site.shape), dtype=_torch_dtype(site))
        target = self._buffers[site.name][self._fill : self._fill + rows.shape[0]]
        target.copy_(rows)
        if target.dtype.is_floating_point:
            odd = ~torch.isfinite(target)
            num_odd = int(odd.sum())
            if num_odd:
                lost = odd & torch.isfinite(rows).to("cpu")
                if bool(lost.any()):
                    self._refuse_value(site, rows, lost)
                self._pending[site.name] += num_odd
        elif target.dtype != rows.dtype:
            info, wide = torch.iinfo(target.dtype), rows.to("cpu", torch.int64)
            lost = (wide < info.min) | (wide > info.max)
            if bool(lost.any()):
                self._refuse_value(site, rows, lost)

    def _refuse_value(self, site: SiteSpec, rows: torch.Tensor, lost: torch.Tensor) -> None:
        where = tuple(int(i) for i in lost.nonzero()[0])
        wider = "float32" if site.dtype == "float16" else "float64"
        if not site.dtype.startswith("float"):
            wider = "int64"
        raise StoreError(
            f"site '{site.name}' has a value that {site.dtype} cannot hold, "
            f"at example {self.next_example + where[0]}, index {where[1:]}",
            got=repr(rows[where].item()),
            hint=f"record it in a new store with dtype {wider}",
        )

    def _write_shard(self) -> None:
        index = len(self._shards)
        arrays = {name: buffer[: self._fill].numpy() for name, buffer in self._buffers.items()}
        path = self.path / shard_name(index)
        digest = write_whole(path, blocks(layout(self.manifest.sites, self._fill), arrays))
        shard = Shard(
            file=path.name,
            first_example=index * self.manifest.shard_examples,
            count=self._fill,
            sha256=digest,
        )
        record: dict[str, Json] = {**shard.to_json(), "nonfinite": dict(self._pending)}
        write_whole(self.path / record_name(index), [canonical(record)])
        self._shards.append(shard)
        for name, count in self._pending.items():
            self._nonfinite[name] += count
            self._pending[name] = 0
        self._fill = 0


def _torch_dtype(site: SiteSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, site.dtype)
    return dtype


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    if dtype.is_complex or dtype in (torch.bool, torch.uint64):  # uint64 does not fit int64
        return str(dtype)
    return "int"

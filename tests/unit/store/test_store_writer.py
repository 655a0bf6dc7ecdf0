"""Writing: what is stored, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchclamp.core.errors import OutputError, StoreError
from patchclamp.store import Manifest, SiteSpec, StoreWriter, open_store

Make = Callable[..., Manifest]
Write = Callable[..., Path]
Arrays = dict[str, torch.Tensor]
Contents = Callable[[Path], dict[str, bytes]]


def one_site(manifest: Make, dtype: str, num: int = 4, shard: int = 2) -> Manifest:
    site = SiteSpec(name="site", axes=("unit",), shape=(3,), dtype=dtype)
    return manifest(sites=(site,), num_examples=num, shard_examples=shard, dtype=dtype)


def test_shards_are_plain_safetensors(write: Write, arrays: Arrays, tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        *(f"shard-{i:05d}.safetensors" for i in range(5)),
    ]
    for index, stop in enumerate([5, 10, 15, 20, 23]):
        found = load_file(folder / f"shard-{index:05d}.safetensors")
        assert set(found) == set(arrays)
        for name, array in found.items():
            assert torch.equal(array, arrays[name][index * 5 : stop].to(array.dtype)), name
    assert found["resid_post.0"].dtype == torch.float16
    assert found["label"].dtype == torch.int8


@pytest.mark.parametrize("batch", [1, 5, 7, 23])
def test_batch_size_leaves_no_trace(
    write: Write, contents: Contents, tmp_path: Path, batch: int
) -> None:
    assert contents(write(tmp_path / "a", batch)) == contents(write(tmp_path / "b", 4))


def test_resume_begins_at_a_whole_shard(
    manifest: Make, arrays: Arrays, write: Write, contents: Contents, tmp_path: Path
) -> None:
    whole = contents(write(tmp_path / "whole"))
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        writer.append({k: v[:13] for k, v in arrays.items()})
        assert writer.next_example == 13
    with pytest.raises(StoreError, match="interrupted"):
        open_store(tmp_path / "s")
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        assert writer.next_example == 10
        writer.append({k: v[10:] for k, v in arrays.items()})
        writer.finish()
    assert contents(tmp_path / "s") == whole


def test_a_finished_store_is_left_as_it_is(
    manifest: Make, arrays: Arrays, write: Write, contents: Contents, tmp_path: Path
) -> None:
    before = contents(write(tmp_path / "s"))
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        assert writer.finished
        assert writer.next_example == 23
        with pytest.raises(StoreError, match="finished"):
            writer.append(arrays)
        writer.finish()
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_hash": "other"}, "model_hash is 'mmmmmmmm' in the store and 'other' now"),
        ({"data_hash": "other"}, "data_hash"),
        ({"shard_examples": 6}, "shard_examples is 5 in the store and 6 now"),
        ({"num_examples": 24}, "num_examples"),
        ({"dtype": "float32"}, "dtype is 'float16' in the store and 'float32' now"),
        ({"versions": {"torch": "2"}}, "versions"),
        ({"extra": {}}, "extra"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_job_is_refused_by_name(
    manifest: Make,
    write: Write,
    contents: Contents,
    tmp_path: Path,
    change: dict[str, object],
    says: str,
    finished: bool,
) -> None:
    if finished:
        write(tmp_path / "s")
    else:
        StoreWriter(tmp_path / "s", manifest()).close()
    before = contents(tmp_path / "s")
    with pytest.raises(StoreError, match="another job") as caught:
        StoreWriter(tmp_path / "s", manifest(**change))
    assert says in str(caught.value)
    assert contents(tmp_path / "s") == before


def test_other_sites_are_refused_by_name(manifest: Make, tmp_path: Path) -> None:
    StoreWriter(tmp_path / "s", manifest()).close()
    sites = manifest().sites
    changed = SiteSpec(name="kept", axes=("position",), shape=(4,), dtype="bool")
    new = SiteSpec(name="new", axes=(), shape=(), dtype="bool")
    with pytest.raises(StoreError) as caught:
        StoreWriter(tmp_path / "s", manifest(sites=(*sites[:2], changed, sites[3], new)))
    text = str(caught.value)
    assert "site 'label' is in the store only" in text
    assert "site 'new' is not in the store" in text
    assert "shape of site 'kept' is (3,) in the store and (4,) now" in text
    with pytest.raises(StoreError, match="another order"):
        StoreWriter(tmp_path / "s", manifest(sites=sites[::-1]))


def unfinished(folder: Path, manifest: Make, arrays: Arrays) -> Path:
    with StoreWriter(folder, manifest()) as writer:
        writer.append({k: v[:16] for k, v in arrays.items()})
    return folder


def test_resume_names_a_flipped_byte(manifest: Make, arrays: Arrays, tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "s", manifest, arrays)
    shard = folder / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors.*damaged") as caught:
        StoreWriter(folder, manifest())
    for index in (1, 2):  # what the hint says
        (folder / f"shard-0000{index}.safetensors").unlink()
        (folder / f"shard-0000{index}.json").unlink()
    assert "every later shard" in str(caught.value)
    with StoreWriter(folder, manifest()) as writer:
        assert writer.next_example == 5


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.json"])
def test_resume_names_a_missing_file(
    manifest: Make, arrays: Arrays, tmp_path: Path, name: str
) -> None:
    folder = unfinished(tmp_path / "s", manifest, arrays)
    (folder / name).unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors.*missing"):
        StoreWriter(folder, manifest())


@pytest.mark.parametrize("text", ["", "{}", '{"nonfinite": {}}'])
def test_resume_names_a_damaged_record(
    manifest: Make, arrays: Arrays, tmp_path: Path, text: str
) -> None:
    folder = unfinished(tmp_path / "s", manifest, arrays)
    (folder / "shard-00002.json").write_text(text)
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors.*damaged"):
        StoreWriter(folder, manifest())


def test_nonfinite_values_are_kept_and_counted(manifest: Make, tmp_path: Path) -> None:
    values = torch.ones(4, 3)
    values[0, 1], values[1, 0], values[3, 2] = float("nan"), float("inf"), float("-inf")
    job = one_site(manifest, "float16")
    with StoreWriter(tmp_path / "s", job) as writer:
        writer.append({"site": values[:3]})
    with StoreWriter(tmp_path / "s", job) as writer:  # the count survives a resumption
        assert writer.next_example == 2
        writer.append({"site": values[2:]})
        writer.finish()
    store = open_store(tmp_path / "s")
    assert store.nonfinite == {"site": 3}
    np.testing.assert_array_equal(store["site"].values, values.half().numpy())


def test_overflow_is_refused_by_name(manifest: Make, tmp_path: Path) -> None:
    values = torch.full((4, 3), 65504.0)
    values[3, 1] = 70000.0
    with StoreWriter(tmp_path / "s", one_site(manifest, "float16")) as writer:
        with pytest.raises(StoreError) as caught:
            writer.append({"site": values})
        with pytest.raises(StoreError, match="broken off"):
            writer.append({"site": values[:1]})
        with pytest.raises(StoreError, match="cannot be finished"):
            writer.finish()
    text = str(caught.value)
    assert "'site'" in text
    assert "70000.0" in text
    assert "example 3, index (1,)" in text
    assert "float32" in text
    with StoreWriter(tmp_path / "s", one_site(manifest, "float16")) as writer:
        assert writer.next_example == 2


@pytest.mark.parametrize(
    ("stored", "given", "value"),
    [("int8", torch.int64, 128), ("int8", torch.uint8, 200), ("uint8", torch.int8, -1)],
)
def test_a_whole_number_that_does_not_fit_is_refused(
    manifest: Make, tmp_path: Path, stored: str, given: torch.dtype, value: int
) -> None:
    values = torch.zeros(4, 3, dtype=given)
    values[1, 2] = value
    with (
        StoreWriter(tmp_path / "s", one_site(manifest, stored)) as writer,
        pytest.raises(StoreError, match=rf"example 1, index \(2,\).*{value}"),
    ):
        writer.append({"site": values})


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("float32", torch.int64),
        ("int64", torch.float32),
        ("bool", torch.int8),
        ("int8", torch.bool),
        ("float32", torch.complex64),
        ("int64", torch.uint64),
    ],
)
def test_another_kind_of_number_is_refused(
    manifest: Make, tmp_path: Path, stored: str, given: torch.dtype
) -> None:
    with (
        StoreWriter(tmp_path / "s", one_site(manifest, stored)) as writer,
        pytest.raises(StoreError, match=f"cannot be stored as {stored}"),
    ):
        writer.append({"site": torch.zeros(4, 3, dtype=given)})


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({}, "'site' is missing"),
        ({"site": torch.zeros(1, 3), "sitee": torch.zeros(1)}, "nearest 'site'"),
        ({"site": torch.zeros(1, 4)}, r"got \(1, 4\)"),
        ({"site": torch.tensor(1.0)}, "another shape"),
        ({"site": torch.zeros(5, 3)}, "more examples than the 4"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_leaves_the_writer_usable(
    manifest: Make, tmp_path: Path, batch: Arrays, says: str
) -> None:
    with StoreWriter(tmp_path / "s", one_site(manifest, "float32")) as writer:
        with pytest.raises(StoreError, match=says):
            writer.append(batch)
        writer.append({"site": torch.zeros(4, 3, requires_grad=True)})
        writer.finish()


def test_different_batch_sizes_are_refused(manifest: Make, arrays: Arrays, tmp_path: Path) -> None:
    batch = {k: v[: 2 if k == "kept" else 3] for k, v in arrays.items()}
    with (
        StoreWriter(tmp_path / "s", manifest()) as writer,
        pytest.raises(StoreError, match="different sizes"),
    ):
        writer.append(batch)


def test_finish_too_early_is_refused(manifest: Make, arrays: Arrays, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        writer.append({k: v[:13] for k, v in arrays.items()})
        with pytest.raises(StoreError, match="2 whole shards"):
            writer.finish()
    with pytest.raises(StoreError, match="closed"):
        writer.finish()


def test_a_foreign_folder_is_not_touched(
    manifest: Make, contents: Contents, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, manifest())
    assert list(contents(tmp_path)) == ["thesis.tex"]
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter(tmp_path / "thesis.tex", manifest())


def test_a_second_writer_is_refused(manifest: Make, tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "s", manifest()),
        pytest.raises(StoreError, match="another process"),
    ):
        StoreWriter(tmp_path / "s", manifest())
    StoreWriter(tmp_path / "s", manifest()).close()


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
@pytest.mark.parametrize("at", [1, 4, 9, 12])
def test_a_full_disk_leaves_a_store_that_resumes(
    manifest: Make,
    arrays: Arrays,
    write: Write,
    contents: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    at: int,
) -> None:
    whole = contents(write(tmp_path / "whole"))
    plain, calls = getattr(os, operation), 0

    def full(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(OutputError, match="no space left"):
            write(tmp_path / "s")
        assert calls >= at
    assert not [name for name in contents(tmp_path / "s") if name.endswith((".tmp", ".lock"))]
    assert contents(write(tmp_path / "s")) == whole


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(
    manifest: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    for name in ("mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OutputError, match="read-only"):
                StoreWriter(tmp_path / name, manifest())


def test_under_a_file(manifest: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        StoreWriter(tmp_path / "file" / "store", manifest())


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
        self.seen.append(("start", task, total, unit))

    def advance(self, amount: int = 1) -> None:
        self.seen.append(("advance", amount))

    def finish(self) -> None:
        self.seen.append(("finish",))

    def note(self, text: str) -> None:
        self.seen.append(("note", text))


def test_progress_counts_what_is_left(manifest: Make, arrays: Arrays, tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "s", manifest, arrays)
    watcher = Watcher()
    with StoreWriter(folder, manifest(), progress=watcher) as writer:
        writer.append({k: v[15:] for k, v in arrays.items()})
        writer.finish()
    assert watcher.seen == [
        ("start", "checking shards", 3, "shards"),
        ("advance", 1),
        ("advance", 1),
        ("advance", 1),
        ("finish",),
        ("note", "resuming at example 15"),
        ("start", "recording", 8, "examples"),
        ("advance", 8),
        ("finish",),
    ]

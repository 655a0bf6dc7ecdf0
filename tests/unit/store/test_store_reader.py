"""Reading: equal to what was written, lazy, checked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import patchclamp.store.reader as reader
from patchclamp.core.errors import OptionError, SiteError, StoreError
from patchclamp.store import Manifest, Store, open_store

Write = Callable[..., Path]
Arrays = dict[str, torch.Tensor]

STORED = {
    "resid_post.0": torch.float16,
    "layers.0:softmax": torch.float32,
    "kept": torch.bool,
    "token": torch.int64,
    "label": torch.int8,
}


@pytest.fixture
def store(write: Write, tmp_path: Path) -> Store:
    return open_store(write(tmp_path / "s"))


def test_every_site_comes_back(store: Store, arrays: Arrays) -> None:
    assert list(store) == list(store.sites) == list(arrays)
    assert len(store) == 5
    for name, dtype in STORED.items():
        found = store[name]
        expected = arrays[name].to(dtype).numpy()
        assert found.dtype == expected.dtype
        assert found.dims == ("example", *store.sites[name].axes)
        np.testing.assert_array_equal(found.values, expected)
    assert store["token"].attrs["model_hash"] == "mmmmmmmm"
    assert store["token"].name == "token"


KEYS: list[dict[str, object]] = [
    {"example": 7},
    {"example": -1},
    {"example": slice(4, 11)},
    {"example": slice(None, None, -3)},
    {"example": slice(20, 3, -4)},
    {"example": slice(9, 9)},
    {"example": [22, 0, 0, 14, -2]},
    {"example": []},
    {"example": np.arange(23) % 2 == 0},
    {"position": 1},
    {"position": -1, "unit": -2},
    {"unit": [3, 0, -1]},
    {"unit": slice(None, None, -1)},
    {"example": [9, 3], "position": [2, 2, 0], "unit": slice(1, 3)},
    {"example": 3, "position": [0], "unit": -1},
    {"example": slice(3, 18, 2), "position": slice(0, 0)},
    {"example": 22, "position": 2, "unit": 3},
    {
        "example": xr.DataArray([1, 21, 6], dims="draw"),
        "unit": xr.DataArray([3, 0, -1], dims="draw"),
    },
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_that_of_xarray_in_memory(
    store: Store, arrays: Arrays, key: dict[str, object]
) -> None:
    lazy = store["resid_post.0"]
    eager = xr.DataArray(arrays["resid_post.0"].half().numpy(), dims=lazy.dims)
    xr.testing.assert_equal(lazy.isel(key), eager.isel(key))
    later = lazy.isel(unit=[2, 1, 0, 3])[3:20].isel(example=[0, 16, 5])
    xr.testing.assert_equal(later, eager.isel(unit=[2, 1, 0, 3])[3:20].isel(example=[0, 16, 5]))


@pytest.mark.parametrize("key", [23, -24, [0, 23], [-24], [0, -30]])
def test_an_example_out_of_range(store: Store, key: object) -> None:
    with pytest.raises(IndexError):
        store["resid_post.0"].isel(example=key).load()


def test_a_slice_touches_only_its_shard(store: Store, arrays: Arrays) -> None:
    part = store["resid_post.0"][10:15]
    for index in (0, 1, 3, 4):
        path = store.path / f"shard-0000{index}.safetensors"
        path.write_bytes(b"\xff" * path.stat().st_size)
    (store.path / "shard-00004.safetensors").unlink()
    np.testing.assert_array_equal(part.values, arrays["resid_post.0"][10:15].half().numpy())
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors"):
        store["resid_post.0"][9:15].load()
    with pytest.raises(StoreError, match=r"shard-00004\.safetensors.*missing"):
        store["resid_post.0"].isel(example=[11, 22]).load()


def test_results_are_copies(store: Store) -> None:
    first = store["token"][:5].values
    first[:] = 0
    assert store["token"][1].item() == 10**12
    with pytest.raises(ValueError, match="read-only"):
        store.rows("token", 0)[0] = 1


def test_more_shards_than_are_mapped_at_a_time(
    store: Store, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MAX_MAPPED", 2)
    for _ in range(2):
        found = torch.cat(list(store.batches("token", 3)))
        assert torch.equal(found, arrays["token"])
    assert len(store._mapped) == 2


@pytest.mark.parametrize("size", [1, 4, 5, 23, 100])
def test_batches_in_order(store: Store, arrays: Arrays, size: int) -> None:
    for name, dtype in STORED.items():
        found = list(store.batches(name, size))
        assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
        assert torch.equal(torch.cat(found), arrays[name].to(dtype))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_shuffled_batches_cover_every_row_once(store: Store, arrays: Arrays, size: int) -> None:
    found = torch.cat(list(store.batches("token", size, shuffle_seed=1)))
    assert not torch.equal(found, arrays["token"])
    assert torch.equal(found.sort().values, arrays["token"])
    again = torch.cat(list(store.batches("token", 7, shuffle_seed=1)))
    assert torch.equal(found, again)
    other = torch.cat(list(store.batches("token", size, shuffle_seed=2)))
    assert not torch.equal(found, other)


def test_shuffled_batches_of_two_sites_stay_together(store: Store) -> None:
    pairs = zip(store.batches("token", 4, 5), store.batches("label", 4, 5), strict=True)
    for token, label in pairs:
        assert torch.equal(token // 10**12 - 11, label.long())


def test_flattened_rows(store: Store, arrays: Arrays) -> None:
    rows = arrays["resid_post.0"].half().reshape(-1, 4)
    found = torch.cat(list(store.batches("resid_post.0", 10, flatten=True)))
    assert torch.equal(found, rows)
    mixed = torch.cat(list(store.batches("resid_post.0", 10, 0, flatten=True)))
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, rows.tolist()))
    assert not torch.equal(mixed, rows)


def test_bad_options_of_batches_are_refused_at_the_call(store: Store) -> None:
    for size in (0, -1, 2.0, True):
        with pytest.raises(OptionError):
            store.batches("token", size)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="flatten"):
        store.batches("token", 1, flatten=True)
    with pytest.raises(SiteError, match="nearest 'token'"):
        store.batches("tokn", 1)


def test_an_unknown_site(store: Store) -> None:
    assert "token" in store
    assert "nothing" not in store
    with pytest.raises(SiteError, match=r"nearest 'resid_post\.0'"):
        store["resid_post.9"]


def test_verify_names_the_shards_with_a_flipped_byte(store: Store) -> None:
    store.verify()
    for index in (1, 3):
        path = store.path / f"shard-0000{index}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x80
        path.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        open_store(store.path).verify()
    assert "'shard-00001.safetensors', 'shard-00003.safetensors' have" in str(caught.value)
    assert "shard-00002" not in str(caught.value)


def test_open_names_a_missing_or_short_shard(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    path = folder / "shard-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors.*wrong size"):
        open_store(folder)
    path.unlink()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors.*missing"):
        open_store(folder)
    path.mkdir()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors.*damaged"):
        open_store(folder)


def test_a_shard_with_another_header_is_refused(store: Store) -> None:
    path = store.path / "shard-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"kept"', b'"tpek"'))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors.*header"):
        store["token"][0].load()


def test_lazy_arrays_copy_and_travel(store: Store, arrays: Arrays) -> None:
    lazy = store["token"][3:6]
    for other in (lazy.copy(deep=True), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        np.testing.assert_array_equal(other.values, arrays["token"][3:6].numpy())


def test_computation_on_a_lazy_array(store: Store, arrays: Arrays) -> None:
    mean = store["layers.0:softmax"].mean("example")
    assert mean.dims == ("head", "unit")
    expected = arrays["layers.0:softmax"].float().mean(0).numpy()
    np.testing.assert_allclose(mean.values, expected, atol=1e-6)


def test_one_example_and_one_shard(
    manifest: Callable[..., Manifest], write: Write, tmp_path: Path, arrays: Arrays
) -> None:
    store = open_store(write(tmp_path / "one", shard_examples=100))
    assert len(store.shards) == 1
    assert torch.equal(torch.cat(list(store.batches("token", 5, 0))).sort().values, arrays["token"])
    store = open_store(write(tmp_path / "each", shard_examples=1))
    assert len(store.shards) == 23
    np.testing.assert_array_equal(store["token"].values, arrays["token"].numpy())


def test_repr_lists_the_sites(store: Store) -> None:
    assert "resid_post.0  (position: 3, unit: 4)  float16" in repr(store)

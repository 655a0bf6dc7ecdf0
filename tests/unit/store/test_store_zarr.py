"""The Zarr export holds the same values under the same labels."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from patchclamp.core.errors import MissingExtraError, OutputError
from patchclamp.store import Manifest, SiteSpec, StoreWriter, open_store

Write = Callable[..., Path]


def test_without_zarr_the_install_line_is_given(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    store = open_store(write(tmp_path / "s"))
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtraError) as caught:
        store.to_zarr(tmp_path / "z")
    assert caught.value.hint == "pip install 'patchclamp[zarr]'"
    assert not (tmp_path / "z").exists()


def test_export_is_equal(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="the extra 'zarr' is not installed")
    store = open_store(write(tmp_path / "s"))
    store.to_zarr(tmp_path / "deep" / "z.zarr")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["z.zarr"]
    found = xr.open_zarr(tmp_path / "deep" / "z.zarr", chunks=None, consolidated=False)
    assert set(found) == set(store)
    assert found.attrs["model_hash"] == "mmmmmmmm"
    for name in store:
        np.testing.assert_array_equal(found[name].values, store[name].values)
        assert found[name].dtype == store[name].dtype
    # "unit" has size 4 at one site and 5 at the other; "position" agrees.
    assert found["resid_post.0"].dims == ("example", "position", "unit_4")
    assert found["layers.0:softmax"].dims == ("example", "head", "unit_5")
    assert found["layers.0:softmax"].attrs["axes"] == ["head", "unit"]


def test_names_that_are_paths_stay_inside(
    manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    pytest.importorskip("zarr", reason="the extra 'zarr' is not installed")
    names = ("/conv/Relu", "..", "a%2Fb")
    sites = tuple(SiteSpec(name=n, axes=(), shape=(), dtype="int64") for n in names)
    with StoreWriter(tmp_path / "s", manifest(sites=sites, num_examples=2)) as writer:
        writer.append({name: torch.arange(2) + i for i, name in enumerate(names)})
        writer.finish()
    open_store(tmp_path / "s").to_zarr(tmp_path / "z")
    found = xr.open_zarr(tmp_path / "z", chunks=None, consolidated=False)
    assert {array.attrs["site"]: array.values.tolist() for array in found.values()} == {
        name: [i, i + 1] for i, name in enumerate(names)
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "z"]


def test_an_existing_target_is_not_touched(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="the extra 'zarr' is not installed")
    store = open_store(write(tmp_path / "s"))
    (tmp_path / "z").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        store.to_zarr(tmp_path / "z")
    assert list((tmp_path / "z").iterdir()) == []


def test_a_full_disk_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr", reason="the extra 'zarr' is not installed")
    store = open_store(write(tmp_path / "s"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "rows", full)
        with pytest.raises(OutputError, match="no space left"):
            store.to_zarr(tmp_path / "z")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    (tmp_path / ".z.tmp").mkdir()  # as an export that was killed leaves it
    (tmp_path / ".z.tmp" / "zarr.json").write_text("{")
    store.to_zarr(tmp_path / "z")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "z"]

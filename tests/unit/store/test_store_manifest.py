"""The manifest: canonical, checked, and never trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from patchclamp.core.errors import StoreError
from patchclamp.store import Manifest, SiteSpec, open_store
from patchclamp.store.manifest import Contents, read_contents, to_bytes

Make = Callable[..., Manifest]
Write = Callable[..., Path]


def test_bytes_do_not_depend_on_the_order_of_keys(manifest: Make) -> None:
    one = manifest(versions={"a": "1", "b": "2"}, extra={"x": [1, 2], "y": None})
    two = manifest(versions={"b": "2", "a": "1"}, extra={"y": None, "x": (1, 2)})
    assert one == two
    assert to_bytes(Contents(manifest=one)) == to_bytes(Contents(manifest=two))
    data = json.loads(to_bytes(Contents(manifest=one)))
    assert list(data) == sorted(data)
    assert data["finished"] is False


def test_manifest_comes_back_equal(manifest: Make, write: Write, tmp_path: Path) -> None:
    found = read_contents(write(tmp_path / "s"))
    assert found.manifest == manifest()
    assert [shard.count for shard in found.shards] == [5, 5, 5, 5, 3]
    assert [shard.first_example for shard in found.shards] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sites", ()),
        ("num_examples", 0),
        ("num_examples", True),
        ("shard_examples", -1),
        ("shard_examples", 2.0),
        ("dtype", "bfloat16"),
        ("model_hash", None),
        ("extra", {"x": object()}),
        ("extra", {"x": float("nan")}),
        ("extra", {1: 2}),
        ("versions", {"torch": 2}),
    ],
)
def test_a_wrong_field_is_refused(manifest: Make, field: str, value: object) -> None:
    with pytest.raises(StoreError):
        manifest(**{field: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "name"),
        ({"name": "__metadata__"}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"axes": ("a",)}, "1 axis names"),
        ({"axes": ("a", "a")}, "told apart"),
        ({"axes": ("example", "a")}, "told apart"),
        ({"shape": (2, 0)}, "positive whole"),
        ({"dtype": "torch.float32"}, "nearest 'float32'"),
    ],
)
def test_a_wrong_site_is_refused(changes: dict[str, object], says: str) -> None:
    good: dict[str, object] = {"name": "s", "axes": ("a", "b"), "shape": (2, 3), "dtype": "float32"}
    SiteSpec(**good)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=says):
        SiteSpec(**{**good, **changes})  # type: ignore[arg-type]


def test_a_site_twice_is_refused(manifest: Make) -> None:
    site = SiteSpec(name="s", axes=(), shape=(), dtype="bool")
    with pytest.raises(StoreError, match="once"):
        manifest(sites=(site, site))


HOSTILE = [
    "../shard-00000.safetensors",
    "/etc/shard-00000.safetensors",
    "shard-00000.safetensors/../x",
    "shard-00000.safetensors\n",
    "shard-0000\u0660.safetensors",
    "shard-.safetensors",
    "shard-00000.pkl",
    "shard-00001.safetensors",
    7,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_name_is_refused(write: Write, tmp_path: Path, name: object) -> None:
    path = write(tmp_path / "s") / "manifest.json"
    data = json.loads(path.read_text())
    data["shards"][0]["file"] = name
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"unsafe shard name|not what this store holds"):
        open_store(path.parent)


def damage(data: dict[str, object], change: str) -> object:
    if change == "list":
        return [data]
    if change == "newer":
        return {**data, "schema_version": 2}
    if change == "unknown":
        return {**data, "surprise": 1}
    if change == "foreign":
        return {**data, "format": "other"}
    if change == "fewer":
        return {**data, "shards": data["shards"][:-1]}  # type: ignore[index]
    if change == "sha":
        data["shards"][2]["sha256"] = "x"  # type: ignore[index]
    if change == "gap":
        data["shards"][2]["first_example"] = 11  # type: ignore[index]
    if change == "site":
        data["sites"][0]["axes"] = "ab"  # type: ignore[index]
    if change == "site fields":
        del data["sites"][0]["dtype"]  # type: ignore[attr-defined]
    if change == "nonfinite":
        data["nonfinite"]["token"] = -1  # type: ignore[index]
    if change == "missing":
        del data["model_hash"]
    if change == "examples":
        data["num_examples"] = "23"
    return data


@pytest.mark.parametrize(
    "change",
    [
        "list",
        "newer",
        "unknown",
        "foreign",
        "fewer",
        "sha",
        "gap",
        "site",
        "site fields",
        "nonfinite",
        "missing",
        "examples",
    ],
)
def test_a_damaged_manifest_is_one_clear_error(write: Write, tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "s") / "manifest.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()), change)))
    with pytest.raises(StoreError, match=r"manifest\.json"):
        open_store(path.parent)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_not_json(write: Write, tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "s") / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(StoreError, match="not JSON"):
        open_store(path.parent)


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not an activation store"):
        open_store(tmp_path / "nowhere")

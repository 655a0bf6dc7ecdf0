"""A small store with sites of every kind, and the arrays that belong in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from patchclamp.core.findings import Json
from patchclamp.store import Manifest, SiteSpec, StoreWriter

NUM_EXAMPLES = 23
SHARD_EXAMPLES = 5
SITES = (
    SiteSpec(name="resid_post.0", axes=("position", "unit"), shape=(3, 4), dtype="float16"),
    SiteSpec(name="layers.0:softmax", axes=("head", "unit"), shape=(2, 5), dtype="float32"),
    SiteSpec(name="kept", axes=("position",), shape=(3,), dtype="bool"),
    SiteSpec(name="token", axes=(), shape=(), dtype="int64"),
    SiteSpec(name="label", axes=(), shape=(), dtype="int8"),
)


def make_manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "sites": SITES,
        "num_examples": NUM_EXAMPLES,
        "shard_examples": SHARD_EXAMPLES,
        "dtype": "float16",
        "model_name": "toy",
        "model_hash": "m" * 8,
        "data_name": "numbers",
        "data_hash": "d" * 8,
        "versions": {"torch": "1"},
        "extra": {"seed": 3},
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def manifest() -> Callable[..., Manifest]:
    return make_manifest


@pytest.fixture
def arrays() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    n = NUM_EXAMPLES
    return {
        "resid_post.0": torch.randn(n, 3, 4, generator=draw),
        "layers.0:softmax": torch.randn(n, 2, 5, generator=draw, dtype=torch.float64),
        "kept": torch.rand(n, 3, generator=draw) > 0.5,
        "token": torch.arange(n) * 10**12,
        "label": torch.arange(n) - 11,
    }


@pytest.fixture
def write(arrays: dict[str, torch.Tensor]) -> Callable[..., Path]:
    """Write a whole store in batches of `batch`; keyword arguments change the manifest."""

    def fill(path: Path, batch: int = 4, **changes: Json) -> Path:
        with StoreWriter(path, make_manifest(**changes)) as writer:
            for start in range(writer.next_example, NUM_EXAMPLES, batch):
                writer.append({k: v[start : start + batch] for k, v in arrays.items()})
            writer.finish()
        return path

    return fill


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files of a folder by name."""
    return lambda folder: {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

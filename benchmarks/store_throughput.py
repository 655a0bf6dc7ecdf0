"""Rows of 576 units read from a store, per CPU-second, next to what one would use instead.

    python benchmarks/store_throughput.py

Every contender reads the same rows in batches of 4,096 in one process, in
turns, from files that are in the page cache; figures are medians over rounds of
process time (all threads count). Quality stands beside speed: each contender's
rows are summed in float64 and must agree. Writes results/store_throughput.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from safetensors import safe_open

from patchclamp.store import Manifest, SiteSpec, Store, StoreWriter, open_store

NUM_ROWS, WIDTH, SHARD_ROWS, BATCH, ROUNDS = 131_072, 576, 8_192, 4_096, 5
SITE = "resid_post.15"
RESULT = Path(__file__).parent / "results" / "store_throughput.json"


def write_store(folder: Path, dtype: str, values: torch.Tensor) -> float:
    """Write `values` as a store; returns CPU-seconds."""
    manifest = Manifest(
        sites=(SiteSpec(name=SITE, axes=("unit",), shape=(WIDTH,), dtype=dtype),),
        num_examples=NUM_ROWS,
        shard_examples=SHARD_ROWS,
        dtype=dtype,
        model_name="random",
        model_hash="",
        data_name="normal",
        data_hash="",
    )
    began = time.process_time()
    with StoreWriter(folder, manifest) as writer:
        for start in range(0, NUM_ROWS, BATCH):
            writer.append({SITE: values[start : start + BATCH]})
        writer.finish()
    return time.process_time() - began


def safetensors_slices(store: Store) -> Iterator[torch.Tensor]:
    """What the safetensors library itself gives: slices of each file."""
    for shard in store.shards:
        with safe_open(store.path / shard.file, framework="pt") as file:
            rows = file.get_slice(SITE)
            for start in range(0, shard.count, BATCH):
                yield rows[start : start + BATCH].clone()


def memmap_shuffled(path: Path, dtype: str) -> Iterator[torch.Tensor]:
    """One flat file as a numpy memmap, rows drawn in shuffled order."""
    rows = np.memmap(path, dtype=dtype, mode="r", shape=(NUM_ROWS, WIDTH))
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    for start in range(0, NUM_ROWS, BATCH):
        yield torch.from_numpy(np.asarray(rows[order[start : start + BATCH]]))


def lazy_slices(array: xr.DataArray) -> Iterator[torch.Tensor]:
    """Slices through xarray."""
    for start in range(0, NUM_ROWS, BATCH):
        yield torch.from_numpy(array[start : start + BATCH].values)


def measure(
    contenders: dict[str, Callable[[], Iterator[torch.Tensor]]], total: float
) -> dict[str, dict[str, float]]:
    """Rows per CPU-second: median, lowest and highest over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for name, batches in contenders.items():  # warm up, and check what is read
        found = sum(float(batch.double().sum()) for batch in batches())
        if abs(found - total) > 1e-6 * NUM_ROWS:
            raise RuntimeError(f"{name} read other values: {found} instead of {total}")
    for _ in range(ROUNDS):
        for name, batches in contenders.items():
            began = time.process_time()
            rows = sum(len(batch) for batch in batches())
            rates[name].append(rows / (time.process_time() - began))
    return {
        name: {
            "median": round(statistics.median(found)),
            "low": round(min(found)),
            "high": round(max(found)),
        }
        for name, found in rates.items()
    }


def run(dtype: str, folder: Path) -> dict[str, object]:
    """All contenders at one stored dtype."""
    values = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    write_cpu = write_store(folder / "store", dtype, values)
    stored = values.to(getattr(torch, dtype))
    total = sum(float(part.double().sum()) for part in stored.split(BATCH))
    stored.numpy().tofile(folder / "flat.bin")
    del values, stored
    store = open_store(folder / "store")
    began = time.process_time()
    store.verify()
    verify_cpu = time.process_time() - began
    began = time.process_time()
    store.to_zarr(folder / "zarr")
    export_cpu = time.process_time() - began
    exported = xr.open_zarr(folder / "zarr", chunks=None, consolidated=False)[SITE]
    rates = measure(
        {
            "store_slices": lambda: store.batches(SITE, BATCH),
            "store_shuffled": lambda: store.batches(SITE, BATCH, shuffle_seed=0),
            "store_xarray_slices": lambda: lazy_slices(store[SITE]),
            "safetensors_slices": lambda: safetensors_slices(store),
            "memmap_shuffled": lambda: memmap_shuffled(folder / "flat.bin", dtype),
            "zarr_slices": lambda: lazy_slices(exported),
        },
        total,
    )
    return {
        "rows_per_cpu_second": rates,
        "written_rows_per_cpu_second": round(NUM_ROWS / write_cpu),
        "verified_rows_per_cpu_second": round(NUM_ROWS / verify_cpu),
        "exported_rows_per_cpu_second": round(NUM_ROWS / export_cpu),
        "slices_over_safetensors": ratio(rates, "store_slices", "safetensors_slices"),
        "shuffled_over_memmap": ratio(rates, "store_shuffled", "memmap_shuffled"),
        "slices_over_zarr": ratio(rates, "store_slices", "zarr_slices"),
    }


def ratio(rates: dict[str, dict[str, float]], one: str, other: str) -> float:
    return round(rates[one]["median"] / rates[other]["median"], 2)


def hardware() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "xarray", "safetensors", "zarr")},
    }


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    results: dict[str, object] = {}
    for dtype in ("float16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            results[dtype] = run(dtype, Path(folder))
    report = {
        "benchmark": "store_throughput",
        "rows": NUM_ROWS,
        "width": WIDTH,
        "shard_rows": SHARD_ROWS,
        "batch": BATCH,
        "rounds": ROUNDS,
        "results": results,
        "wall_seconds": round(time.perf_counter() - began, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "hardware": hardware(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    part = RESULT.with_suffix(".json.tmp")
    part.write_text(json.dumps(report, indent=2) + "\n")
    part.replace(RESULT)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

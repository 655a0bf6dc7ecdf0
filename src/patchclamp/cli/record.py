"""`patchclamp record`: activations of a dataset, streamed into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from patchclamp.cli.options import AllowPickle, AsJson
from patchclamp.cli.progress import watch
from patchclamp.cli.terminal import data, data_json, message
from patchclamp.cli.values import at_least


def record(
    model: str,
    *,
    data_source: Annotated[str, Parameter(name="--data")],
    sites: Annotated[list[str], Parameter(consume_multiple=True, negative="")],
    out: Path,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 32,
    shard_examples: int = 256,
    limit: int | None = None,
    max_length: int | None = None,
    split: Literal["train", "validation", "test"] = "test",
    engine: Literal["auto", "hooks", "graph"] = "auto",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Stream activations of a dataset into a store on disk.

    A recording that was interrupted goes on when the same command is given again.

    Args:
        model: a name that `patchclamp models` lists, a folder or a file.
        data_source: a name that `patchclamp data` lists, or a file.
        sites: names and globs, such as 'resid_post.*'.
        out: the folder of the store: a new one, or one to go on with.
        dtype: how floats are stored.
        batch_size: examples that run at a time.
        shard_examples: examples in each file of the store.
        limit: record this many examples, each class keeping its share; all without it.
        max_length: cut texts to this many tokens.
        split: which part of a bundled dataset.
        engine: which engine runs the network.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print what was recorded as JSON.
    """
    at_least("--batch-size", batch_size, 1)
    at_least("--shard-examples", shard_examples, 1)
    for option, value in (("--limit", limit), ("--max-length", max_length)):
        if value is not None:
            at_least(option, value, 1)
    import patchclamp

    with watch() as progress:
        dataset = patchclamp.load_data(data_source, split=split)
        if limit is not None:
            dataset = dataset.subset(limit)
        net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
        store = net.record_to(
            out,
            dataset,
            sites,
            dtype=dtype,
            batch_size=batch_size,
            shard_examples=shard_examples,
            engine=engine,
            max_length=max_length,
            progress=progress,
        )
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    message(
        f"{store.manifest.num_examples:,} examples of {store.manifest.data_name} at "
        f"{len(store)} sites, {len(store.shards)} shards, {size / 1e6:,.1f} MB"
    )
    if as_json:
        data_json(
            {
                "path": str(store.path),
                "examples": store.manifest.num_examples,
                "shards": len(store.shards),
                "bytes": size,
                "dtype": store.manifest.dtype,
                "sites": [
                    {"name": s.name, "axes": list(s.axes), "shape": list(s.shape), "dtype": s.dtype}
                    for s in store.sites.values()
                ],
                "nonfinite": dict(store.nonfinite),
                "model_hash": store.manifest.model_hash,
                "data_hash": store.manifest.data_hash,
            }
        )
    else:
        data(str(store.path))

"""`patchclamp verify-store`: is a store what was written?"""

from __future__ import annotations

from pathlib import Path

from patchclamp.cli.options import AsJson
from patchclamp.cli.progress import watch
from patchclamp.cli.terminal import data, data_json


def verify_store(folder: Path, *, as_json: AsJson = False) -> None:
    """Compare a store with its checksums; a damaged shard is named.

    Args:
        folder: the store.
        as_json: print JSON.
    """
    from patchclamp.store import open_store

    store = open_store(folder)
    with watch() as progress:
        store.verify(progress)
    if as_json:
        data_json(
            {
                "path": str(store.path),
                "whole": True,
                "shards": len(store.shards),
                "examples": store.manifest.num_examples,
                "sites": list(store),
            }
        )
    else:
        data(
            f"{store.path}: whole, {len(store.shards)} shards, "
            f"{store.manifest.num_examples:,} examples"
        )

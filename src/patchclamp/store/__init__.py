"""Activations on disk: safetensors shards, a manifest of named axes, lazy xarray.

A store is a folder with `manifest.json` and `shard-00000.safetensors`, ... .
`StoreWriter` fills it and goes on after a kill; `open_store` reads it.
"""

from patchclamp.store.manifest import Manifest, Shard, SiteSpec
from patchclamp.store.reader import Store, open_store
from patchclamp.store.writer import StoreWriter

__all__ = ["Manifest", "Shard", "SiteSpec", "Store", "StoreWriter", "open_store"]

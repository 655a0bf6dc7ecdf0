"""Random draws that belong to an example: the same whatever else is in the batch.

The generator of a draw is seeded from the bits of the example's own inputs, the method's seed
and the number of the sample. So a map depends neither on how many rows run at a time, nor on
the order of the examples, nor on which others come with them. Equal examples get equal draws.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from patchclamp.methods.scoring import Scorer


def keys(scorer: Scorer) -> list[str]:
    """A digest of the inputs of each example."""
    dims = scorer.net.call_dims(scorer.call)
    found = []
    for row in range(scorer.num):
        digest = hashlib.sha256()
        for x in scorer.call.rows(slice(row, row + 1), dims).tensors():
            digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
            digest.update(_bits(x))
        found.append(digest.hexdigest())
    return found


def generator(key: str, seed: int, sample: int = 0) -> torch.Generator:
    """A generator of its own for one sample of one example; it lives on the CPU."""
    digest = hashlib.sha256(f"{key} {seed} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _bits(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Masks over edges: running them, and what can be read off them without running.

Shape suffixes: K masks, N examples of all contrasts, R readers, W writers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.core.circuit import Node
from patchclamp.core.errors import EngineError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import measured
from patchclamp.methods.circuits.network.ablation import References
from patchclamp.methods.circuits.network.contrast import Contrast
from patchclamp.methods.circuits.network.wiring import Wiring


def metric_rows(
    wiring: Wiring,
    contrasts: Sequence[Contrast],
    kept: Sequence[Bool[np.ndarray, "R W"]],
    references: References,
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> Float[Tensor, "K N"]:
    """The metric of every example under every mask, edges that are not kept being cut."""
    cuts = [torch.from_numpy((wiring.possible & ~k).astype(np.float32))[None] for k in kept]
    columns = []
    for contrast in contrasts:
        for batch in contrast.batches(batch_size):
            held = references.of(wiring, batch)
            with torch.no_grad():
                rows = []
                for cut in cuts:
                    output = wiring.run(batch.clean, held, cut.to(held[0].dtype))
                    rows.append(measured(batch.metric, output, batch.rows))
                    progress.advance()
            columns.append(torch.stack(rows))
    return torch.cat(columns, 1)


def of_nodes(wiring: Wiring, nodes: Iterable[Node]) -> Bool[np.ndarray, "R W"]:
    """The mask that keeps every edge of these writers, and no other.

    Raises:
        EngineError: a node is no writer of the network.
    """
    wanted = set(nodes)
    unknown = wanted - set(wiring.writers)
    if unknown:
        name = str(sorted(unknown, key=str)[0])
        raise EngineError(
            f"{wiring.net.name} has no writer '{name}'",
            nearest=nearest(name, [str(w) for w in wiring.writers]),
        )
    column = np.array([w in wanted for w in wiring.writers])
    mask: np.ndarray = wiring.possible & column[None]
    return mask


def connected(wiring: Wiring, kept: Bool[np.ndarray, "R W"]) -> Bool[np.ndarray, "R W"]:
    """The kept edges that lie on a kept way from a root to the output.

    The others change nothing where references are the values of another whole run: a writer
    all of whose inputs are cut writes its reference anyway.
    """
    rooted = ~np.any(wiring.feeds, axis=0, keepdims=True)
    ends = ~np.any(wiring.feeds, axis=1, keepdims=True)
    kept = kept & wiring.possible
    while True:
        informed = np.any(kept, axis=1, keepdims=True)
        used = np.any(kept, axis=0, keepdims=True)
        alive = rooted | np.any(informed & wiring.feeds, axis=0, keepdims=True)
        heard = ends | np.any(used & wiring.feeds, axis=1, keepdims=True)
        fewer = kept & alive & heard
        if (fewer == kept).all():
            return kept
        kept = fewer

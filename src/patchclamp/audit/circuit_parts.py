"""What is lost without a circuit, and without each of its largest edges, with intervals and nulls.

Completeness and minimality as of Wang et al. 2022. Two matched nulls: the network
without as many edges drawn at random, for the network without the circuit; and the circuit with
one random edge from outside put in, for the circuit with one edge taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp.core.circuit import Circuit, Edge
from patchclamp.core.errors import OptionError
from patchclamp.core.findings import Interval
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.circuits.checking.evaluation import Evaluation, on_scale
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Contrast
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import Wiring, index_of


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A faithfulness, or a fall of it, with its interval over examples."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """What a circuit and its parts are worth.

    Attributes:
        complement: faithfulness of all edges but the circuit's.
        random_complements: the same for random circuits of as many edges.
        losses: fall of the circuit's faithfulness without each of its largest edges.
        random_additions: size of the change when a random edge from outside is put in.
    """

    complement: Weight
    random_complements: tuple[float, ...]
    losses: dict[Edge, Weight]
    random_additions: tuple[float, ...]


def weigh(
    wiring: Wiring,
    circuit: Circuit,
    held_out: Sequence[Contrast],
    references: References | None = None,
    *,
    num_edges: int = 8,
    num_random: int = 5,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Weighed | None:
    """Measure complement, largest edges and nulls; None where the circuit is the whole network.

    Args:
        references: what cut edges carry; the corrupt values where None.
        num_edges: how many edges are taken away, one at a time.
        num_random: draws of each null.

    Randomness: the nulls and the bootstrap, from `seed`.
    Cost: (3 + num_edges + 2 x num_random) masked runs of all held-out pairs.
    Raises: TargetError where whole and empty network do not differ.
    """
    if num_random < 1:
        raise OptionError("a null needs at least one draw", got=str(num_random))
    outside = np.argwhere(circuit.possible & ~circuit.kept)
    if not len(outside) or not circuit.num_edges:
        return None
    edges = circuit.edges()[:num_edges]
    generator = np.random.default_rng([seed, circuit.num_edges])
    masks = [np.zeros_like(circuit.possible), circuit.possible, circuit.kept]
    masks.append(circuit.possible & ~circuit.kept)
    masks += [_changed(circuit.kept, [index_of(wiring, e)], False) for e in edges]
    everywhere = np.argwhere(circuit.possible)
    for _ in range(num_random):
        drawn = everywhere[generator.permutation(len(everywhere))[: circuit.num_edges]]
        masks.append(_changed(circuit.possible, drawn, False))
    for i in generator.integers(len(outside), size=num_random):
        masks.append(_changed(circuit.kept, outside[i : i + 1], True))
    references = references or References(kind=Ablation.RESAMPLE)
    progress.start("parts of the circuit", len(masks), "runs")
    rows = metric_rows(
        wiring, held_out, masks, references, batch_size=batch_size, progress=progress
    )
    progress.finish()
    scale = on_scale(rows, rows[0], rows[1])
    first, last = 4 + len(edges), 4 + len(edges) + num_random
    bounds = _Bounds(rows[0], rows[1], seed)
    return Weighed(
        complement=Weight(value=float(scale[3]), interval=bounds.of(rows[3])),
        random_complements=tuple(scale[first:last].tolist()),
        losses={
            edge: Weight(value=float(scale[2] - scale[4 + i]), interval=bounds.fall(rows, 4 + i))
            for i, edge in enumerate(edges)
        },
        random_additions=tuple((scale[last:] - scale[2]).abs().tolist()),
    )


def _changed(
    mask: np.ndarray, where: Sequence[tuple[int, int]] | np.ndarray, on: bool
) -> np.ndarray:
    """The mask with these (reader, writer) set."""
    changed = mask.copy()
    index = np.asarray(where)
    changed[index[:, 0], index[:, 1]] = on
    return changed


@dataclass(frozen=True)
class _Bounds:
    """Bootstrap intervals on the scale from the empty to the whole network."""

    nothing: Tensor
    whole: Tensor
    seed: int

    def of(self, values: Tensor) -> Interval:
        return Evaluation(seed=self.seed).interval(values, self.nothing, self.whole)

    def fall(self, rows: Tensor, index: int) -> Interval:
        """Of the circuit's faithfulness less that of row `index`: the scale's zero cancels."""
        difference = rows[2] - rows[index] + self.nothing
        return self.of(torch.as_tensor(difference))

"""What every head does for a behaviour, pair by pair: the numbers that checkpoints are compared by.

Each head's output `attn.N.z` is patched alone, exactly, through the sweep. Noising puts the
corrupt value into the clean run and asks what is lost; denoising puts the clean value into the
corrupt run and asks what comes back. Both are positive for a head that works for the right
answer. A head that another one backs up shows in denoising only, one that needs another in
noising only; their mean shows both.

Sources: Vig et al. 2020; Heimersheim and Nanda 2024 (the directions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.data.behaviours.pairs import TokenPairs
from patchclamp.engine.protocol import EngineName
from patchclamp.methods.circuits.checking.metrics import metric_for
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectsOfHeads:
    """What `HeadEffects` measured.

    Attributes:
        effects: of every head on every pair, shortest prompts first.
        heads: (layer, head) of the rows.
    """

    effects: Float[Tensor, "head example"]
    heads: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class HeadEffects:
    """The exact effect of each head on each pair.

    Shapes: pairs hold (example, position); effects (head, example).
    Units: those of the behaviour's metric; positive where the head promotes the right answer.
    Randomness: none.
    Cost: one sweep over all heads of all pairs, two with both directions.
    Raises: DataError for no pairs; SiteError where no adapter names the heads; EngineError or
        CaptureError where there is no graph engine for the network.
    Fails when: heads only matter together.
    Source: see the module docstring.

    Attributes:
        direction: see the module docstring; "both" is the mean of the two.
        batch_size: pairs in one sweep.
    """

    direction: Direction = Direction.BOTH
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.direction not in set(Direction):
            raise OptionError(
                f"no direction '{self.direction}'",
                expected=f"one of {', '.join(Direction)}",
                nearest=nearest(str(self.direction), Direction),
            )
        object.__setattr__(self, "direction", Direction(self.direction))
        if self.batch_size < 1:
            raise OptionError("batch_size must be at least 1", got=str(self.batch_size))

    def run(
        self, net: Net, pairs: Sequence[TokenPairs], *, progress: Progress = SILENT
    ) -> EffectsOfHeads:
        """Measure all heads on all pairs."""
        if not pairs:
            raise DataError("there are no pairs to measure heads on")
        both = self.direction is Direction.BOTH
        directions = [Direction.NOISING, Direction.DENOISING] if both else [self.direction]
        measured: list[Tensor] = []
        heads: tuple[tuple[int, int], ...] = ()
        for bucket in pairs:
            for rows in torch.arange(len(bucket)).split(self.batch_size):
                found = []
                for direction in directions:
                    effects, heads = _swept(net, bucket.rows(rows), direction, progress)
                    found.append(effects)
                measured.append(torch.stack(found).mean(0))
        return EffectsOfHeads(effects=torch.cat(measured, 1), heads=heads)


def _swept(
    net: Net, pairs: TokenPairs, direction: Direction, progress: Progress
) -> tuple[Float[Tensor, "head example"], tuple[tuple[int, int], ...]]:
    """Effects in one direction, and which head each row is."""
    metric = metric_for(pairs)
    array = net.sweep(
        pairs.clean,
        pairs.corrupt,
        metric,
        over="heads",
        direction=str(direction),
        per_example=True,
        progress=progress,
    )
    start = pairs.clean if direction is Direction.NOISING else pairs.corrupt
    # The engine of the sweep, so that a head that changes nothing has exactly no effect.
    output = net.run(start, engine=EngineName.GRAPH).output[:, pairs.position]
    base = metric(output.detach(), torch.arange(len(pairs))).double()
    heads = tuple(
        (int(layer), int(head))
        for layer in array.coords["layer"].values
        for head in array.coords["head"].values
    )
    change = torch.from_numpy(array.values).double().flatten(0, 1) - base
    return (-change if direction is Direction.NOISING else change), heads

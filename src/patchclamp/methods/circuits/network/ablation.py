"""What an edge carries when it is cut: reference values for every source.

Cutting an edge is never neutral: the reader must see something. `resample` shows it the
value from the other run of the pair, which keeps it on the data; `mean` and
`positional mean` take away what differs between examples; `zero` and `noise` leave the
data; `optimal` is the constant that hurts least, learned for one circuit, so that
what is lost is not blamed on the reference.

Sources: Chan et al. 2022 (resample); Wang et al. 2022 (mean); Li & Janson 2024 (optimal).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import measured
from patchclamp.methods.circuits.network.contrast import Batch, Contrast
from patchclamp.methods.circuits.network.wiring import Wiring


class Ablation(StrEnum):
    """Kinds of reference; see the module docstring."""

    RESAMPLE = "resample"
    MEAN = "mean"
    POSITIONAL_MEAN = "positional mean"
    ZERO = "zero"
    NOISE = "noise"
    OPTIMAL = "optimal"


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference values of every source; `of` gives them for a batch.

    Attributes:
        kind: see `Ablation`.
        fixed: one tensor a source, for kinds that do not depend on the batch.
        spread: standard deviation of every source's units, for noise.
        seed: of the noise.
    """

    kind: Ablation
    fixed: tuple[Tensor, ...] = ()
    spread: tuple[Tensor, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _known(self.kind))

    def of(self, wiring: Wiring, batch: Batch) -> list[Tensor]:
        """References for the rows of a batch, which is run on its clean inputs."""
        if self.kind is Ablation.RESAMPLE:
            return list(wiring.record(batch.corrupt).values)
        if self.kind is not Ablation.NOISE:
            return list(self.fixed)
        noisy = []
        for x, std in zip(wiring.record(batch.clean).values, self.spread, strict=True):
            made = torch.stack([_noise(x.shape[1:], self.seed, int(r)) for r in batch.rows])
            noisy.append(x + made.to(x.dtype) * std)
        return noisy


def _noise(shape: Sequence[int], seed: int, row: int) -> Tensor:
    """Noise that belongs to an example, so that batches of any size draw the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    return torch.randn(tuple(shape), generator=generator)


def references(
    wiring: Wiring,
    contrasts: Sequence[Contrast],
    kind: Ablation | str,
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> References:
    """References learned from the corrupt inputs of the contrasts.

    Raises:
        OptionError: unknown kind, a positional mean over rows of several lengths, or
            `optimal`, which is learned for a circuit by `OptimalAblation`.
    """
    kind = _known(kind)
    if kind is Ablation.OPTIMAL:
        raise OptionError(
            "optimal constants are learned for one circuit", hint="OptimalAblation().fit(...)"
        )
    if kind is Ablation.RESAMPLE:
        return References(kind=kind)
    sums, squares, num = _moments(wiring, contrasts, batch_size, kind)
    if kind is Ablation.NOISE:
        pairs = zip(sums, squares, strict=True)
        spread = [((q / num) - (s / num) ** 2).clamp(min=0).sqrt() for s, q in pairs]
        return References(kind=kind, spread=tuple(x.float() for x in spread), seed=seed)
    dtype = wiring.record(contrasts[0].batch([0]).clean).values[0].dtype
    means = [s / num for s in sums]
    if kind is Ablation.ZERO:
        means = [torch.zeros_like(m) for m in means]
    return References(kind=kind, fixed=tuple(m.to(dtype) for m in means))


def _known(kind: str) -> Ablation:
    if kind not in set(Ablation):
        raise OptionError(
            f"no ablation '{kind}'",
            expected=f"one of {', '.join(Ablation)}",
            nearest=nearest(kind, Ablation),
        )
    return Ablation(kind)


def _moments(
    wiring: Wiring, contrasts: Sequence[Contrast], batch_size: int, kind: Ablation
) -> tuple[list[Tensor], list[Tensor], float]:
    """Sums and sums of squares of all sources over examples, and over positions too unless the
    mean is positional."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    num = 0
    for contrast in contrasts:
        for batch in contrast.batches(batch_size):
            num += batch.num_rows
            for i, x in enumerate(wiring.record(batch.corrupt).values):
                first, second = x.double(), x.double() ** 2
                if kind is not Ablation.POSITIONAL_MEAN:
                    first, second = (wiring.position_means(i, y) for y in (first, second))
                if len(sums) <= i:
                    sums.append(torch.zeros_like(first[:1]))
                    squares.append(torch.zeros_like(first[:1]))
                if sums[i].shape[1:] != first.shape[1:]:
                    raise OptionError(
                        "a positional mean needs rows of one length",
                        got=f"shapes {tuple(sums[i].shape[1:])} and {tuple(first.shape[1:])}",
                        hint="use ablation='mean' or 'resample'",
                    )
                sums[i] += first.sum(0, keepdim=True)
                squares[i] += second.sum(0, keepdim=True)
    return sums, squares, float(num)


@dataclass(frozen=True, kw_only=True)
class OptimalAblation:
    """The constant for every source that hurts the metric least when edges are cut.

    Learned by Adam from the means, one constant per unit, the same at all positions and
    for all examples. The loss is the squared difference of the metric from its value
    in the whole network.

    Shapes: constants broadcast to each source's value.
    Units: the loss is in squared units of the metric.
    Randomness: none.  Cost: steps x (forward + backward) of the masked network.
    Raises: nothing of its own.
    Fails when: the number of examples is small against the number of constants: compare on
        held-out pairs.
    Source: Li & Janson 2024, "Optimal ablation for interpretability".
    """

    steps: int = 50
    rate: float = 0.05
    batch_size: int = 16

    def fit(
        self,
        wiring: Wiring,
        contrasts: Sequence[Contrast],
        cut: Tensor,
        *,
        progress: Progress = SILENT,
    ) -> References:
        """Learn the constants for a circuit given by its cut edges, (1, reader, writer)."""
        start = references(wiring, contrasts, Ablation.MEAN, batch_size=self.batch_size).fixed
        scale = [float(x.std()) if x.numel() > 1 else 1.0 for x in start]
        leaves = [torch.zeros_like(x).requires_grad_(True) for x in start]
        optimiser = torch.optim.Adam(leaves, lr=self.rate)
        batches = [b for c in contrasts for b in c.batches(self.batch_size)]
        with torch.no_grad():
            whole = [
                measured(b.metric, wiring.record(b.clean).output, b.rows).detach() for b in batches
            ]
        progress.start("learning constants", self.steps, "steps")
        for step in range(self.steps):
            batch, aim = batches[step % len(batches)], whole[step % len(batches)]
            held = [x + s * y for x, s, y in zip(start, scale, leaves, strict=True)]
            found = measured(batch.metric, wiring.run(batch.clean, held, cut), batch.rows)
            optimiser.zero_grad()
            torch.autograd.backward(((found - aim) ** 2).mean(), inputs=leaves)
            optimiser.step()
            progress.advance()
        progress.finish()
        made = [(x + s * y).detach() for x, s, y in zip(start, scale, leaves, strict=True)]
        return References(kind=Ablation.OPTIMAL, fixed=tuple(made))

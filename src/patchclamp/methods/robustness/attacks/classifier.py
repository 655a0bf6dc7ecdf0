"""A network as attacks see it: logits of rows, slopes of a loss, the limits of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, TargetError
from patchclamp.methods.robustness.attacks.balls import Limits
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


class Seen(NamedTuple):
    """Of some points: their logits (n, class), losses (n,) and slopes of these (n, *feature)."""

    logits: Tensor
    losses: Tensor
    slopes: Tensor


@dataclass
class _Highest:
    """The highest logit, which checks that there are logits."""

    network: str
    num_classes: int = 0
    name: str = "highest logit"
    position: int | None = None

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[1] < 2 or not output.is_floating_point():
            raise TargetError(
                f"{self.network} is no classifier",
                got=f"an output of shape {tuple(output.shape)}, {output.dtype}",
                expected="two or more logits for each row: (row, class)",
            )
        self.num_classes = output.shape[1]
        return output.amax(1)


@dataclass(eq=False)
class Classifier(Scorer):
    """A network that gives one row of logits for each row; make one with `Classifier.open`.

    Shapes: points (n, *feature); logits (n, class); `rows` (n,) says which example's other
        inputs each point goes with.

    Attributes:
        within: limits of the inputs that exist, each of the shape of one input, or None.
        num_classes: how many logits there are.
    """

    within: Limits | None = field(default=None, kw_only=True)
    num_classes: int = field(default=0, kw_only=True)

    @classmethod
    def open(
        cls,
        net: Net,
        inputs: object,
        *,
        within: tuple[Tensor | float, Tensor | float] | None = None,
        at: str | None = None,
        memory: int = 64 << 20,
    ) -> Classifier:
        """Look at a network as a classifier of the value at its input, or at a site.

        Args:
            within: the smallest and the largest value that an input may have, in the units of
                the network's input (after normalisation): numbers, or tensors that broadcast to
                one input, such as (channel, 1, 1).
            at: as for `Scorer.of`.
            memory: see `Scorer`.

        Raises:
            InputError: inputs that the network cannot take; limits of another shape, NaN, or
                the wrong way round.
            TargetError: the network does not put out one row of two or more logits for each
                row; no real numbers at the site.
        """
        highest = _Highest(net.name)
        scorer = Scorer.of(net, inputs, highest, at=at, memory=memory)
        held = {f.name: getattr(scorer, f.name) for f in fields(Scorer)}
        limits = _limits(within, scorer.value)
        return cls(**held, within=limits, num_classes=highest.num_classes)

    @property
    def points(self) -> Tensor:
        """The rows that it was opened with."""
        return self.value

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """All rows in one pass, differentiable where gradients are on: (n, class).

        Raises:
            TargetError: logits that are not finite.
        """
        made = self.outputs(x, rows)
        if not bool(torch.isfinite(made).all()):
            raise TargetError(
                f"{self.net.name} gives logits that are not finite",
                hint="narrower limits: within=(low, high)",
            )
        return made

    def answers(self, x: Tensor, rows: Tensor, *, at_once: int | None = None) -> Tensor:
        """Logits, as many rows at a time as is fastest, or as many as asked for: (n, class)."""
        with torch.no_grad():
            if at_once is not None:
                parts = zip(x.split(at_once), rows.split(at_once), strict=True)
                return torch.cat([self.logits(a, b) for a, b in parts])
            pieces = self._pieces(x, rows, backwards=False)
            return torch.cat([self.logits(part, rows[at]) for at, part in pieces])

    def slopes(
        self, x: Tensor, rows: Tensor, loss: Loss, labels: Tensor, aims: Tensor | None
    ) -> Seen:
        """Logits, losses and their slopes, as many rows at a time as is fastest.

        Raises:
            TargetError: no gradient reaches the site, or one that is not finite.
        """
        found: list[Seen] = []
        for at, part in self._pieces(x, rows, backwards=True):
            leaf = part.detach().clone().requires_grad_()
            with torch.enable_grad():
                made = self.logits(leaf, rows[at])
                values = loss.values(made, labels[at], None if aims is None else aims[at])
                slopes = self._slopes(values, leaf)
            self.passes.backwards += len(part)
            found.append(Seen(made.detach(), values.detach(), slopes))
        return Seen(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _slopes(self, values: Tensor, leaf: Tensor) -> Tensor:
        slopes = None
        if values.requires_grad:
            (slopes,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if slopes is None:
            raise TargetError(
                f"no gradient of {self.net.name} reaches '{self.site}'",
                hint="an attack without gradients: Square, SparseSearch or Boundary",
            )
        if not bool(torch.isfinite(slopes).all()):
            raise TargetError(
                f"a gradient of {self.net.name} is not finite",
                hint="an attack without gradients: Square, SparseSearch or Boundary",
            )
        return slopes


def _limits(within: tuple[Tensor | float, Tensor | float] | None, value: Tensor) -> Limits | None:
    if within is None:
        return None
    shape = value.shape[1:]
    sides = [torch.as_tensor(side, dtype=value.dtype, device=value.device) for side in within]
    try:
        low, high = (side.expand(shape) for side in sides)
    except RuntimeError:
        raise InputError(
            "limits do not fit the input",
            got=" and ".join(str(tuple(side.shape)) for side in sides),
            expected=f"numbers, or tensors that broadcast to {tuple(shape)}",
        ) from None
    if not bool((low <= high).all()):
        raise InputError(
            "limits are the smallest value, then the largest",
            got=f"{float(low.max()):g} and {float(high.min()):g}",
        )
    return low, high

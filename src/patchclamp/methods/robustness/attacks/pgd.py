"""Projected gradient descent: many small steps, each brought back into the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task
from patchclamp.methods.robustness.attacks.losses import Loss


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent from random points; a row that is broken is left alone.

    Options: `num_steps`; `step`, as a share of the radius, 2.5 / num_steps by default (at most
    1); `num_restarts`, the worst of which counts; `random_start`, else from the row itself;
    `momentum`, how much of the earlier gradients, each scaled to a mean of 1, is kept;
    `loss`; `seed`.

    For L0 this is a sparse search: each step leaves the row and sets to a limit the k elements
    that by the gradient gain most (see `Ball.step`). Steps see the network at different points
    of the ball, and `momentum` averages over them; without it they may go round in circles.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input.
    Randomness: the starts, by `seed`; the same for any number of rows at a time.
    Cost: num_restarts x num_steps forwards and backwards a row, and 3 forwards.
    Raises: as `Attack.run`; TargetError where no gradient reaches the input.
    Fails when: gradients vanish (saturated losses, rounding), mislead, or are noise: see
        `masking`.
    Source: Madry et al. 2018, arXiv 1706.06083; momentum of Dong et al. 2018, arXiv 1710.06081.
    """

    name: ClassVar[str] = "pgd"
    source: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.LINF, Norm.L2, Norm.L0)

    num_steps: int = 10
    step: float | None = None
    num_restarts: int = 1
    random_start: bool = True
    momentum: float = 0.0
    loss: Loss = Loss.CE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_restarts < 1:
            raise OptionError("PGD needs a step and a start", got=f"{self}")
        if self.num_restarts > 1 and not self.random_start:
            raise OptionError("restarts from the row itself would all be the same")
        if self.step is not None and not 0 < self.step < float("inf"):
            raise OptionError("a step is a share of the radius above 0", got=str(self.step))
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum is from 0 to less than 1", got=str(self.momentum))

    def check(self, task: Task) -> None:
        """See `Attack.check`."""
        super().check(task)
        self.loss.check(task.classifier.num_classes, aimed=task.targets is not None)

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        generator = torch.Generator().manual_seed(self.seed)
        best = Best.of(task) if self.random_start else Best.unseen(task)
        for number in range(self.num_restarts):
            start = task.points.clone()
            if self.random_start:
                start = task.start(generator, first=number == 0)
            self._descend(task, start, best)
        return best

    def _descend(self, task: Task, x: Tensor, best: Best) -> None:
        average = torch.zeros_like(x)
        size = min(1.0, 2.5 / self.num_steps) if self.step is None else self.step
        for _ in range(self.num_steps):
            todo = best.todo
            if not len(todo):
                return
            rest, here = task.pick(todo), x[todo]
            seen = rest.slopes(here, self.loss, None)
            best.see(todo, here, rest.margins(seen.logits))
            way = seen.slopes
            if self.momentum:
                average[todo] = way = self.momentum * average[todo] + unit_mean(way)
            sizes = torch.full((len(todo),), size, dtype=torch.float64)
            x[todo] = rest.ball.step(here, way, sizes)
        todo = best.todo
        if len(todo):
            best.see(todo, x[todo], task.pick(todo).tried(x[todo]))


def unit_mean(slopes: Tensor) -> Tensor:
    """Slopes scaled to a mean absolute value of 1 in each row; zeros stay zeros."""
    flat = slopes.flatten(1).abs()
    largest = flat.amax(1).clamp(min=torch.finfo(slopes.dtype).tiny)
    shape = (-1, *(1,) * (slopes.ndim - 1))
    scaled = slopes / largest.reshape(shape)
    mean = scaled.flatten(1).abs().mean(1)
    return scaled / torch.where(mean > 0, mean, 1.0).reshape(shape)

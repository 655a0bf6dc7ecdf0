"""One step of the whole radius along the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task
from patchclamp.methods.robustness.attacks.losses import Loss


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """The fast gradient sign method; for L2 along the gradient, for L0 the k best elements.

    Options: `loss`, driven up (down for the target of a targeted attack).

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input.
    Randomness: none.  Cost: a forward and a backward pass a row, and two forwards.
    Raises: as `Attack.run`.
    Fails when: the network is not nearly linear within the radius. Exact on linear networks of
        two classes for L-inf and L0, and for L2 without limits.
    Source: Goodfellow et al. 2015, arXiv 1412.6572.
    """

    name: ClassVar[str] = "fgsm"
    source: ClassVar[str] = "Goodfellow et al. 2015, arXiv 1412.6572"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.LINF, Norm.L2, Norm.L0)

    loss: Loss = Loss.CE

    def check(self, task: Task) -> None:
        """See `Attack.check`."""
        super().check(task)
        self.loss.check(task.classifier.num_classes, aimed=task.targets is not None)

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        best = Best.unseen(task)
        seen = task.slopes(task.points, self.loss, None)
        best.see(torch.arange(task.num), task.points, task.margins(seen.logits))
        todo = best.todo
        if len(todo):
            rest = task.pick(todo)
            whole = torch.ones(len(todo), dtype=torch.float64)
            x = rest.ball.step(rest.points, seen.slopes[todo], whole)
            best.see(todo, x, rest.tried(x))
        return best

"""Auto-PGD: the step is halved where it no longer helps, and the search goes back to its best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task
from patchclamp.methods.robustness.attacks.classifier import Seen
from patchclamp.methods.robustness.attacks.losses import Loss

_OLD = 0.25
"""How much of the last move is kept."""
_ENOUGH = 0.75
"""The share of steps that must have raised the loss."""


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD, without a step to choose; on CE, DLR, or DLR aimed at one class after another.

    The step begins at twice the radius. At checkpoints that come ever closer it is halved where
    fewer than .75 of the steps raised the loss, or neither step nor best loss changed since the
    last checkpoint; then the search goes on from its best point.

    Options: `num_steps`; `num_restarts`; `loss`; `num_targets`, 0, or how many other classes
    (the likeliest first) are aimed at in turn, each with all restarts, where any class will do;
    `seed`.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input.
    Randomness: the starts, by `seed`; the same for any number of rows at a time.
    Cost: num_restarts x max(1, num_targets) x num_steps forwards and backwards a row, 2 forwards.
    Raises: as `Attack.run`; OptionError for DLR with too few classes.
    Fails when: as `PGD`; DLR does not saturate with the scale of the logits.
    Source: Croce & Hein 2020, arXiv 2003.01690, algorithm 1 (rho .75, alpha .75).
    """

    name: ClassVar[str] = "apgd"
    source: ClassVar[str] = "Croce & Hein 2020, arXiv 2003.01690"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.LINF, Norm.L2)

    num_steps: int = 50
    num_restarts: int = 1
    loss: Loss = Loss.CE
    num_targets: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 2 or self.num_restarts < 1 or self.num_targets < 0:
            raise OptionError("APGD needs two steps and a start", got=f"{self}")

    def check(self, task: Task) -> None:
        """See `Attack.check`."""
        super().check(task)
        if task.targets is not None and self.num_targets:
            raise OptionError("an attack with targets aims at those", hint="num_targets=0")
        aimed = task.targets is not None or self.num_targets > 0
        self.loss.check(task.classifier.num_classes, aimed=aimed)

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = task.classifier.answers(task.points, task.rows)
        best = Best(task.points.clone(), task.margins(logits))
        aims: list[Tensor | None] = [None]
        if self.num_targets:
            others = logits.scatter(1, task.labels[:, None], -math.inf)
            num = min(self.num_targets, task.classifier.num_classes - 1)
            aims = list(others.topk(num, 1).indices.unbind(1))
        for aim in aims:
            for number in range(self.num_restarts):
                start = task.start(generator, first=number == 0)
                _Climb(task, best, self.loss, aim, start).run(self.num_steps)
        return best


def checkpoints(num_steps: int) -> list[int]:
    """The steps after which the step size is looked at."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * num_steps, 9)) for share in shares[1:] if share <= 1]


@dataclass(eq=False)
class _Climb:
    """One climb of all rows; those that are broken drop out. All tensors have a row for each."""

    task: Task
    best: Best
    loss: Loss
    aims: Tensor | None
    x: Tensor
    old: Tensor = field(init=False)
    slopes: Tensor = field(init=False)
    top: Tensor = field(init=False)
    top_x: Tensor = field(init=False)
    top_slopes: Tensor = field(init=False)
    losses: Tensor = field(init=False)
    size: Tensor = field(init=False)
    rises: Tensor = field(init=False)
    marked_top: Tensor = field(init=False)
    marked_size: Tensor = field(init=False)

    def run(self, num_steps: int) -> None:
        n, like = self.task.num, self.x
        self.old, self.top_x = like.clone(), like.clone()
        self.slopes, self.top_slopes = torch.zeros_like(like), torch.zeros_like(like)
        self.top = torch.full((n,), -math.inf, dtype=like.dtype, device=like.device)
        self.losses, self.marked_top = self.top.clone(), self.top.clone()
        self.size = torch.full((n,), 2.0, dtype=torch.float64, device=like.device)
        self.marked_size = self.size.clone()
        self.rises = torch.zeros(n, device=like.device)
        todo = self.best.todo
        if len(todo):
            self._see(todo)
        self.marked_top = self.top.clone()
        marks, last = set(checkpoints(num_steps)), 0
        for number in range(1, num_steps):
            todo = self.best.todo
            if not len(todo):
                return
            self._step(todo, first=number == 1)
            self._see(todo)
            if number in marks:
                self._mark(todo, number - last)
                last = number

    def _step(self, todo: Tensor, *, first: bool) -> None:
        ball, x = self.task.ball.pick(todo), self.x[todo]
        moved = ball.step(x, self.slopes[todo], self.size[todo])
        if not first:
            ahead = (1 - _OLD) * (moved - x) + _OLD * (x - self.old[todo])
            moved = ball.project(x + ahead)
        self.old[todo], self.x[todo] = x, moved

    def _see(self, todo: Tensor) -> None:
        rest, x = self.task.pick(todo), self.x[todo]
        seen: Seen = rest.slopes(x, self.loss, None if self.aims is None else self.aims[todo])
        self.best.see(todo, x, rest.margins(seen.logits))
        self.rises[todo] += (seen.losses > self.losses[todo]).float()
        self.losses[todo], self.slopes[todo] = seen.losses, seen.slopes
        is_top = seen.losses > self.top[todo]
        new = todo[is_top]
        self.top[new], self.top_x[new] = seen.losses[is_top], x[is_top]
        self.top_slopes[new] = seen.slopes[is_top]

    def _mark(self, todo: Tensor, num: int) -> None:
        is_slow = self.rises[todo] < _ENOUGH * num
        is_same = self.size[todo] == self.marked_size[todo]
        is_stuck = is_same & (self.top[todo] == self.marked_top[todo])
        self.marked_top[todo], self.marked_size[todo] = self.top[todo], self.size[todo]
        self.rises[todo] = 0
        back = todo[is_slow | is_stuck]
        self.size[back] /= 2
        self.x[back], self.old[back] = self.top_x[back], self.top_x[back]
        self.losses[back], self.slopes[back] = self.top[back], self.top_slopes[back]

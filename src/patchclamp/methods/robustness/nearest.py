"""The attacked radius of every row: how near an ensemble of attacks finds another class.

An upper bound of the true distance, row by row; that nothing was found within a radius proves
nothing.

Source: bisection over the radius of fixed-radius attacks (Croce & Hein 2020, arXiv 2003.01690).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import Ball, Norm
from patchclamp.methods.robustness.attacks.base import Best, Task, judge, task_of
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.ensemble import Ensemble
from patchclamp.methods.scoring import Passes

_NUM_CUTS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """The nearest points of another class that were found.

    Attributes:
        norm: of the distances; max_radius: how far was looked.
        radius: (n,) float64, distances of the points; 0 where the row itself is of another
            class, infinite where nothing was found.
        points: (n, *feature); the row itself where nothing was found.
        passes: rows that went through the network.
    """

    norm: Norm
    max_radius: float
    radius: Tensor
    points: Tensor
    passes: Passes

    def accuracy(self, radius: float) -> float:
        """The share of rows that are right with nothing found within the radius."""
        return float((self.radius > radius).double().mean())


@dataclass(frozen=True, kw_only=True)
class NearestPoint:
    """Bisects the radius of an ensemble, row by row, each search from the nearest point so far.

    What was found is drawn towards its row along a line (for L0: elements are put back) before
    the next radius is chosen, between what failed and what was found. Points are confirmed by
    fresh runs, as for every attack.

    Options: `max_radius`, how far is looked; `tolerance`, as a share of what was found, at
    which a row is done; `num_rounds` at most; `ensemble`, by default the standard one with
    `num_steps`, `num_queries` and `seed`.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input; for L0 a number of elements.
    Randomness: of the attacks, by `seed`.
    Cost: num_rounds ensembles and line searches of 20 forwards, on the rows that are left.
    Raises: as `Attack.run`.
    Fails when: attacks do: the distance is then too large, never too small.
    Source: see the module.
    """

    max_radius: float
    tolerance: float = 0.02
    num_rounds: int = 8
    num_steps: int = 20
    num_queries: int = 100
    seed: int = 0
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_radius < math.inf or not 0 < self.tolerance < 1:
            raise OptionError("a largest radius above 0, and a tolerance below 1", got=f"{self}")

    def run(
        self,
        classifier: Classifier,
        points: Tensor,
        labels: Tensor,
        *,
        norm: Norm = Norm.LINF,
        rows: Tensor | None = None,
        progress: Progress = SILENT,
    ) -> Nearest:
        """Attack rows; arguments as in `Attack.run`."""
        task = task_of(
            classifier, points, labels, self.max_radius, norm=norm, targets=None, rows=rows
        )
        ensemble = self.ensemble or Ensemble.standard(
            norm,
            classifier.num_classes,
            num_steps=self.num_steps,
            num_queries=self.num_queries,
            seed=self.seed,
        )
        passes = classifier.passes
        before = Passes(passes.forwards, passes.backwards)
        work = _Work(task, ensemble)
        progress.start("nearest points", self.num_rounds, "rounds")
        try:
            with torch.no_grad():
                for number in range(self.num_rounds):
                    todo = work.todo(self.tolerance)
                    if not len(todo):
                        break
                    work.halve(todo, first=number == 0)
                    progress.advance()
        finally:
            progress.finish()
        return Nearest(
            norm=norm,
            max_radius=self.max_radius,
            radius=work.high,
            points=work.points,
            passes=Passes(passes.forwards - before.forwards, passes.backwards - before.backwards),
        )


@dataclass(eq=False)
class _Work:
    """Per row: what failed, what was found, and where."""

    task: Task
    ensemble: Ensemble
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    points: Tensor = field(init=False)
    is_open: Tensor = field(init=False)

    def __post_init__(self) -> None:
        task = self.task
        self.points = task.points.clone()
        self.low = torch.zeros_like(task.ball.radius)
        self.high = torch.full_like(self.low, math.inf)
        with torch.no_grad():
            clean = judge(task, Best.of(task))
        self.high[clean.margins < 0] = 0.0
        self.is_open = torch.ones_like(self.high, dtype=torch.bool)

    def todo(self, tolerance: float) -> Tensor:
        """Rows whose two radii are still apart."""
        gap = self.high - self.low
        is_apart = gap > tolerance * self.high
        if self.task.ball.norm is Norm.L0:
            is_apart = gap > 1
        return (self.is_open & (is_apart | self.high.isinf())).nonzero().flatten()

    def halve(self, todo: Tensor, *, first: bool) -> None:
        """At the largest radius first, then half-way between what failed and what was found."""
        task = self.task.pick(todo)
        if first:
            radius = task.ball.radius
        else:
            radius = (self.low[todo] + self.high[todo]) / 2
            radius = radius.floor() if task.ball.norm is Norm.L0 else radius
        classifier = self.task.classifier
        ball = Ball.of(task.ball.norm, task.points, radius, classifier.within)
        starts = None if first else self.points[todo]
        aimed = dataclasses.replace(task, ball=ball, starts=starts)
        found = self.ensemble.judged(aimed)
        is_broken = found.is_broken.to(todo.device)
        failed, hit = todo[~is_broken], todo[is_broken]
        self.low[failed] = radius[~is_broken]
        if first:  # nothing within the largest radius
            self.is_open[failed] = False
        if len(hit):
            self._draw_near(hit, found.points[is_broken])

    def _draw_near(self, hit: Tensor, x: Tensor) -> None:
        task = self.task.pick(hit)
        is_sparse = task.ball.norm is Norm.L0
        near = Best(x.clone(), task.tried(x))
        near.points = _put_back(task, x) if is_sparse else _cut(task, x)
        judged = judge(task, near)
        kept = (judged.margins < 0).reshape(-1, *(1,) * (x.ndim - 1))
        points = torch.where(kept, near.points, x)
        distance = task.ball.distance(points)
        is_nearer = distance < self.high[hit]
        chosen = hit[is_nearer]
        self.points[chosen], self.high[chosen] = points[is_nearer], distance[is_nearer]


def _cut(task: Task, x: Tensor) -> Tensor:
    """Towards each row along a line, as near as halving finds another class."""
    shape = (-1, *(1,) * (x.ndim - 1))
    low = torch.zeros(task.num, dtype=x.dtype, device=x.device)
    high, held = torch.ones_like(low), x.clone()
    for _ in range(_NUM_CUTS):
        middle = (low + high) / 2
        here = task.ball.clamped(task.points + (x - task.points) * middle.reshape(shape))
        is_other = task.tried(here) < 0
        held[is_other] = here[is_other]
        high, low = torch.where(is_other, middle, high), torch.where(is_other, low, middle)
    return held


def _put_back(task: Task, x: Tensor) -> Tensor:
    """Elements put back in turn, those that moved least first, where the class stays another."""
    flat, centre = x.flatten(1).clone(), task.points.flatten(1)
    moved = (flat - centre).abs()
    most = int((moved > 0).sum(1).max())
    order = torch.where(moved > 0, moved, math.inf).argsort(1)
    at = torch.arange(task.num, device=x.device)
    for number in range(min(most, _NUM_CUTS)):
        tried = flat.clone()
        tried[at, order[:, number]] = centre[at, order[:, number]]
        is_other = task.tried(tried.reshape(x.shape)) < 0
        flat[is_other] = tried[is_other]
    return flat.reshape(x.shape)

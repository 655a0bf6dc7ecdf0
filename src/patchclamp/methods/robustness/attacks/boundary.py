"""A walk along the boundary of another class, closer and closer: no gradients and no scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Ball, Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task

_NUM_HALVINGS = 12
_EVERY = 10
_TURNED = 0.5
"""The share of sideways steps that should stay in the other class, and ..."""
_CAME = 0.25
"""... of steps towards the row: their sizes grow above it and shrink below."""


@dataclass(frozen=True, kw_only=True)
class Boundary(Attack):
    """From a point of another class, random steps on the sphere around the row and towards it.

    Only which class the network gives is used, so that nothing done to its scores or gradients
    hides anything. A row counts as broken where the walk comes within the radius.

    Options: `num_steps`; `num_starts`, random points that are tried where no other row is of
    another class (of the target); `sideways` and `towards`, the first steps as shares of the
    distance; `seed`.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input.
    Randomness: starts and steps, by `seed`; the same for any number of rows at a time.
    Cost: at most 2 num_steps + num_starts + 15 forwards a row; no backward passes.
    Raises: as `Attack.run`; never for want of a gradient.
    Fails when: there is no point of another class to start from: no limits, and the network is
        (all but) constant; or there are too few steps for the number of elements.
    Source: Brendel et al. 2018, arXiv 1712.04248.
    """

    name: ClassVar[str] = "boundary"
    source: ClassVar[str] = "Brendel et al. 2018, arXiv 1712.04248"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.L2,)
    needs_gradient: ClassVar[bool] = False

    num_steps: int = 500
    num_starts: int = 50
    sideways: float = 0.1
    towards: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.sideways, self.towards)
        if self.num_steps < 1 or self.num_starts < 1 or not all(0 < s < 1 for s in sizes):
            raise OptionError("steps are counted, and their sizes shares", got=f"{self}")

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        generator = torch.Generator().manual_seed(self.seed)
        best = Best.of(task)
        x, is_started = self._starts(task, best, generator)
        walk = _Walk(task, x, self.sideways, self.towards)
        for number in range(self.num_steps):
            is_far = task.ball.distance(walk.x) > task.ball.radius
            todo = (is_started & is_far & (best.margins >= 0)).nonzero().flatten()
            if not len(todo):
                break
            walk.step(todo, generator)
            if (number + 1) % _EVERY == 0:
                walk.adapt()
        todo = (is_started & (best.margins >= 0)).nonzero().flatten()
        if len(todo):
            rest = task.pick(todo)
            near = rest.ball.project(walk.x[todo])
            best.see(todo, near, rest.tried(near))
        return best

    def _starts(self, task: Task, best: Best, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A point of another class for each row, as near as a line takes it, and whether found.

        The nearest of the other rows; else a random point, uniform within the limits, or
        without limits the row and noise that grows to many times the largest input.
        """
        points = task.points
        logits = task.classifier.answers(points, task.rows)
        answers = logits.argmax(1)
        wanted = task.targets
        is_other = (
            answers[None] != task.labels[:, None]
            if wanted is None
            else answers[None] == wanted[:, None]
        )
        apart = torch.cdist(points.double().flatten(1), points.double().flatten(1))
        chosen = torch.where(is_other, apart, math.inf).argmin(1)
        is_found = is_other.any(1)
        x = torch.where(_column(is_found, points), points[chosen], points)
        # A row's other inputs differ from its neighbour's: what the network says here counts.
        is_found &= task.tried(x) < 0
        for number in range(self.num_starts):
            drawn = self._drawn(task.ball, (number + 1) / self.num_starts, generator)
            todo = (~is_found & (best.margins >= 0)).nonzero().flatten()
            if not len(todo):
                break
            hit = todo[task.pick(todo).tried(drawn[todo]) < 0]
            x[hit], is_found[hit] = drawn[hit], True
        return self._drawn_near(task, x, is_found), is_found

    def _drawn(self, ball: Ball, share: float, generator: torch.Generator) -> Tensor:
        centre = ball.centre
        if bool(torch.isfinite(ball.lower).all() & torch.isfinite(ball.upper).all()):
            part = torch.rand(tuple(centre.shape), generator=generator).to(centre)
            return ball.clamped(ball.lower + (ball.upper - ball.lower) * part)
        scale = 10 * share * float(centre.abs().max().clamp(min=1.0))
        noise = torch.randn(tuple(centre.shape), generator=generator).to(centre)
        return ball.clamped(centre + scale * noise)

    def _drawn_near(self, task: Task, x: Tensor, is_found: Tensor) -> Tensor:
        """On the line from each row to its start, nearly the nearest of the other class."""
        todo = is_found.nonzero().flatten()
        if not len(todo):
            return x
        rest, far = task.pick(todo), x[todo].clone()
        low = torch.zeros(len(todo), dtype=x.dtype, device=x.device)
        high = torch.ones_like(low)
        for _ in range(_NUM_HALVINGS):
            middle = (low + high) / 2
            here = rest.ball.clamped(rest.points + (far - rest.points) * _column(middle, x))
            is_other = rest.tried(here) < 0
            x[todo[is_other]] = here[is_other]
            high, low = torch.where(is_other, middle, high), torch.where(is_other, low, middle)
        return x


@dataclass(eq=False)
class _Walk:
    """Points of other classes (n, *feature), and sizes of steps of their own, (n,)."""

    task: Task
    x: Tensor
    sideways: float
    towards: float
    side: Tensor = field(init=False)
    near: Tensor = field(init=False)
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, device = self.task.num, self.x.device
        self.side = torch.full((n,), self.sideways, dtype=torch.float64, device=device)
        self.near = torch.full((n,), self.towards, dtype=torch.float64, device=device)
        # of steps: sideways tried and good, towards tried and good
        self.counts = torch.zeros(4, n, device=device)

    def step(self, todo: Tensor, generator: torch.Generator) -> None:
        """One step of some rows; the draw is made for all."""
        drawn = torch.randn(tuple(self.x.shape), generator=generator)[todo].to(self.x).double()
        rest = self.task.pick(todo)
        centre, x = rest.points.double(), self.x[todo].double()
        way = x - centre
        far = way.flatten(1).norm(dim=1)
        unit = way / _column(far, way)
        drawn = drawn - unit * _column((drawn * unit).flatten(1).sum(1), way)
        drawn = drawn / _column(drawn.flatten(1).norm(dim=1).clamp(min=1e-30), way)
        moved = x + drawn * _column(self.side[todo] * far, way)
        onto = moved - centre  # back onto the sphere
        onto = onto * _column(far / onto.flatten(1).norm(dim=1), way)
        around = rest.ball.clamped((centre + onto).to(self.x.dtype))
        is_good = rest.tried(around) < 0
        self.counts[0, todo] += 1
        self.counts[1, todo] += is_good.float()
        if not bool(is_good.any()):
            return
        kept = is_good.nonzero().flatten()
        left, index = rest.pick(kept), todo[kept]
        pull = _column(1 - self.near[index], way)
        closer = left.points.double() + (around[kept].double() - left.points.double()) * pull
        closer = left.ball.clamped(closer.to(self.x.dtype))
        is_near = left.tried(closer) < 0
        self.counts[2, index] += 1
        self.counts[3, index] += is_near.float()
        self.x[index] = torch.where(
            _column(is_near, way), closer, self._shorter(around, kept, index)
        )

    def _shorter(self, around: Tensor, kept: Tensor, index: Tensor) -> Tensor:
        """Sideways steps are kept where limits or rounding did not lead them away."""
        ball = self.task.ball.pick(index)
        is_shorter = ball.distance(around[kept]) <= ball.distance(self.x[index])
        return torch.where(_column(is_shorter, self.x), around[kept], self.x[index])

    def adapt(self) -> None:
        """Larger steps where they often succeed, smaller where they seldom do."""
        sideways, good, towards, near = self.counts
        self.side *= _factor(good / sideways.clamp(min=1), sideways, _TURNED)
        self.near *= _factor(near / towards.clamp(min=1), towards, _CAME)
        self.side.clamp_(1e-6, 0.9)
        self.near.clamp_(1e-6, 0.9)
        self.counts.zero_()


def _factor(share: Tensor, num: Tensor, wanted: float) -> Tensor:
    grown = torch.where(share > wanted, 1.5, torch.where(share < wanted / 2, 1 / 1.5, 1.0))
    return torch.where(num > 0, grown, 1.0).double()


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *(1,) * (like.ndim - 1))

"""The nearest input of another class that gradient descent can find.

Source: Madry et al. 2018 (projected gradient descent from random points); the radius is
halved between what failed and the nearest point so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.methods.bounds.margins import Classifier
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.rules.base import Interval

Logits = Callable[[Tensor], Tensor]
"""(B, *shape) -> (B, K), differentiable."""

_MAX_ELEMENTS = 1 << 22
"""Of all samples together."""


@dataclass(frozen=True, kw_only=True)
class NearestAttack:
    """Projected gradient descent in L-inf balls that shrink around what was found.

    A point counts if another class is proved to stand above at it, in float64 rounded
    outwards, and if the live network gives another class: then no radius that reaches it
    can be proved. Its distance is rounded up.

    Shapes: points (N, *shape); classes (N,); distances (N,), infinite where nothing was found.
    Units: those of the input.
    Randomness: the starting points, by `seed`.
    Cost: at most num_rounds x num_restarts x num_steps passes forwards and backwards a row,
        and num_rounds x num_samples forwards.
    Raises: nothing of its own.
    Fails when: gradients vanish or mislead; a distance is only an upper bound of the nearest.
    Source: Madry et al. 2018, arXiv 1706.06083.
    """

    num_samples: int = 64
    num_restarts: int = 5
    num_steps: int = 20
    num_rounds: int = 10
    seed: int = 0

    def run(
        self,
        network: Classifier,
        points: Tensor,
        classes: Tensor,
        max_radius: float,
        within: Interval | None,
        limits: Limits,
    ) -> tuple[Tensor, Tensor]:
        """Distances and the points found, in the precision of `points`; until the time is up."""
        generator = torch.Generator().manual_seed(self.seed)
        low = torch.zeros(len(points), dtype=torch.float64)
        best = torch.full_like(low, math.inf)
        held = points.clone()
        for number in range(self.num_rounds):
            todo = (torch.isinf(best) | (best - low > 0.005 * best)).nonzero().flatten()
            if limits.left <= 0 or len(todo) == 0:
                break
            near = best[todo]
            radius = torch.where(
                torch.isinf(near), max_radius / 4.0**number, (low[todo] + near) / 2
            )
            x, c = points[todo], classes[todo]
            found = self.descend(
                network.logits, x, c, radius, within, generator, limits, held[todo]
            )
            drawn = _drawn_near(network.logits, x, found, c)
            is_drawn = network.is_other(drawn, c)
            hit = is_drawn | network.is_other(found, c)
            found = torch.where(is_drawn.reshape(-1, *(1,) * (x.ndim - 1)), drawn, found)
            distance = _distances(x, found)
            better = hit & (distance < near)
            held[todo[better]] = found[better]
            best[todo[better]] = distance[better]
            failed = ~hit & torch.isfinite(near)
            low[todo[failed]] = radius[failed]
        return best, held

    def descend(
        self,
        logits: Logits,
        points: Tensor,
        classes: Tensor,
        radius: Tensor,
        within: Interval | None,
        generator: torch.Generator,
        limits: Limits,
        start: Tensor | None = None,
    ) -> Tensor:
        """Per row the point within the radius at which its class stands lowest: (N, *shape).

        The first restart begins at `start` and goes against the best other class, the others
        each from one of the worst of many random points against one class, the likeliest first.
        """
        num, K = self.num_restarts, int(logits(points[:1]).shape[1])
        box = _inner(points, radius, within)
        x = self._sampled(logits, classes, box, generator)
        lower, upper = (side.repeat_interleave(num, 0) for side in box)
        first = points if start is None else start
        x[::num] = 0.9 * first.to(x) + 0.1 * x[::num]
        own = classes.repeat_interleave(num)
        target = self._targets(logits, points, classes, min(num, K) - 1)
        step = (upper - lower) / 4
        best, lowest = x, torch.full((len(x),), math.inf)
        for _ in range(self.num_steps + 1):
            x = torch.minimum(torch.maximum(x, lower), upper).detach().requires_grad_()
            with torch.enable_grad():
                y = logits(x)
                margin, aimed = _margins(y, own, target)
                (slope,) = torch.autograd.grad(aimed.sum(), x)
            found = margin.detach() < lowest
            lowest = torch.where(found, margin.detach(), lowest)
            best = torch.where(found.reshape(-1, *(1,) * (x.ndim - 1)), x.detach(), best)
            done = (lowest.reshape(-1, num) < 0).any(1)
            if limits.left <= 0 or bool(done.all()):
                break
            x = x.detach() - step * slope.sign()
            step = step * 0.9
        pick = lowest.reshape(-1, num).argmin(1) + num * torch.arange(len(points))
        return best[pick].to(points)

    def _sampled(
        self, logits: Logits, classes: Tensor, box: Interval, generator: torch.Generator
    ) -> Tensor:
        """Per row the num_restarts random points at which its class stands lowest."""
        rows, shape = len(box.lower), box.lower.shape[1:]
        room = _MAX_ELEMENTS // box.lower.numel()
        num = max(self.num_restarts, min(self.num_samples, room))
        share = torch.rand((rows, num, *shape), generator=generator).to(box.lower)
        x = box.lower[:, None] + (box.upper - box.lower)[:, None] * share
        if num > self.num_restarts:
            own = classes.repeat_interleave(num)
            with torch.no_grad():
                y = logits(x.flatten(0, 1))
            margin = _margins(y, own, torch.full_like(own, -1))[0].reshape(rows, num)
            kept = margin.topk(self.num_restarts, largest=False).indices
            x = x[torch.arange(rows)[:, None], kept]
        return x.flatten(0, 1)

    def _targets(self, logits: Logits, points: Tensor, classes: Tensor, num: int) -> Tensor:
        """(N * num_restarts,) the class that each restart aims at; -1 for the best other."""
        with torch.no_grad():
            y = logits(points).scatter(1, classes[:, None], -math.inf)
        rest = torch.full((len(points), self.num_restarts - num), -1)
        return torch.cat([rest, y.topk(num, 1).indices], 1).flatten()


def _margins(y: Tensor, own: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest margin, and the margin that is aimed at: (B,) each."""
    mine = y.gather(1, own[:, None])[:, 0]
    margin = mine - y.scatter(1, own[:, None], -math.inf).amax(1)
    aimed = mine - y.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return margin, torch.where(target < 0, margin, aimed)


def _inner(points: Tensor, radius: Tensor, within: Interval | None) -> Interval:
    """The ball and the limits in the precision of the points."""
    r = radius.to(points.dtype).reshape(-1, *(1,) * (points.ndim - 1))
    lower, upper = points - r, points + r
    if within is None:
        return Interval(lower, upper)
    return Interval(
        torch.maximum(lower, within.lower.to(points.dtype)),
        torch.minimum(upper, within.upper.to(points.dtype)),
    )


def _drawn_near(logits: Logits, points: Tensor, found: Tensor, classes: Tensor) -> Tensor:
    """On the line from each point to what was found, the nearest of another class."""
    low, high = torch.zeros(len(points)), torch.ones(len(points))
    shape = (-1, *(1,) * (points.ndim - 1))
    for _ in range(16):
        middle = (low + high) / 2
        x = points + (found - points) * middle.reshape(shape).to(points)
        with torch.no_grad():
            y = logits(x)
        other = _margins(y, classes, torch.full_like(classes, -1))[0] < 0
        high, low = torch.where(other, middle, high), torch.where(other, low, middle)
    x = points + (found - points) * high.reshape(shape).to(points)
    return torch.minimum(
        torch.maximum(x, torch.minimum(points, found)), torch.maximum(points, found)
    )


def _distances(points: Tensor, found: Tensor) -> Tensor:
    """L-inf, rounded up."""
    d = (found.double() - points.double()).abs().flatten(1).amax(1)
    return torch.nextafter(d, torch.full_like(d, math.inf))

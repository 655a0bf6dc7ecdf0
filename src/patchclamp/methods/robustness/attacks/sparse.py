"""Random search over sets of a few elements: the L0 attack without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task


@dataclass(frozen=True, kw_only=True)
class SparseSearch(Attack):
    """k elements at limits; some are exchanged for others at random, kept where the margin falls.

    Options: `num_queries`; `share`, of the k elements that is exchanged at first, less and less
    later; `seed`.

    Shapes: points (n, *feature), labels (n,). Elements are those of the input, not pixels.
    Units: those of the input.
    Randomness: elements and limits, by `seed`; the same for any number of rows at a time.
    Cost: num_queries + 2 forwards a row, those that are broken drop out; no backward passes.
    Raises: as `Attack.run`; never for want of a gradient.
    Fails when: there are too few queries for the number of elements, or values between the
        limits would do and those at them do not.
    Source: Croce et al. 2022, arXiv 2006.12834 (Sparse-RS), for elements in place of pixels.
    """

    name: ClassVar[str] = "sparse_search"
    source: ClassVar[str] = "Croce et al. 2022, arXiv 2006.12834"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.L0,)
    needs_gradient: ClassVar[bool] = False

    num_queries: int = 1000
    share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_queries < 1 or not 0 < self.share <= 1:
            raise OptionError("SparseSearch needs a query and a share from 0 to 1", got=f"{self}")

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        generator = torch.Generator().manual_seed(self.seed)
        best = Best.of(task)
        ball = task.ball
        held = ball.drawn(generator)
        lowest = torch.full_like(best.margins, math.inf)
        for number in range(self.num_queries):
            todo = best.todo
            if not len(todo) or bool((ball.radius[todo] == 0).all()):
                break
            share = self.share * (1 - number / self.num_queries)
            tried = held if number == 0 else self._exchanged(task, held, share, generator)
            tried = tried[todo]
            found = task.pick(todo).tried(tried)
            best.see(todo, tried, found)
            is_lower = found < lowest[todo]
            held[todo[is_lower]], lowest[todo[is_lower]] = tried[is_lower], found[is_lower]
        return best

    def _exchanged(
        self, task: Task, held: Tensor, share: float, generator: torch.Generator
    ) -> Tensor:
        """Some of the elements of each row put back, and as many others set to a limit."""
        ball = task.ball
        flat, centre = held.flatten(1), ball.centre.flatten(1)
        draws = torch.rand((2, *flat.shape), generator=generator).to(held)
        is_set = flat != centre
        k = ball.radius[:, None].clamp(max=flat.shape[1])
        num = (share * k).ceil()
        # A random order in which the set elements come first; and one of the others.
        leaving = _rank(draws[0] - is_set.to(held) * 2) < num
        kept = is_set & ~leaving
        free = k - kept.sum(1, keepdim=True)
        joining = _rank(draws[0] + is_set.to(held) * 2) < free
        corner = torch.where(draws[1] < 0.5, ball.lower.flatten(1), ball.upper.flatten(1))
        made = torch.where(joining & ~kept, corner, torch.where(kept, flat, centre))
        return made.reshape(held.shape)


def _rank(x: Tensor) -> Tensor:
    return x.argsort(1).argsort(1)

"""Search for a counterexample by gradient descent on the property's margin.

Source: Madry et al. 2018 (projected gradient descent); Dong et al. 2018 (momentum, here Adam).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.methods.bounds.search.goal import Goal
from patchclamp.methods.bounds.search.limits import Limits

MAX_NUMBERS = 1 << 21
CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Random points, the best of them improved by gradient steps within the box.

    A third of the coordinates of half of the points are put on a side of the box: a network
    that is nearly linear has its extremes there, and few points get there otherwise.

    Attributes:
        num_samples: points drawn first, fewer where they have many coordinates.
        num_starts: how many of them are improved.
        num_steps: of signed gradients, each smaller than the last.
        first_step: as a share of the box.
        seed: of the points.
    """

    num_samples: int = 100_000
    num_starts: int = 32
    num_steps: int = 40
    first_step: float = 0.25
    seed: int = 0

    def run(self, network: Lowered, goal: Goal, limits: Limits) -> Tensor | None:
        """A point (num_inputs,) whose computed margin is at most 0, or None."""
        dtype = network.dtype
        lower = torch.as_tensor(goal.lower).to(dtype)[None]
        upper = torch.as_tensor(goal.upper).to(dtype)[None]
        generator = torch.Generator().manual_seed(self.seed)
        num = min(self.num_samples, max(self.num_starts, MAX_NUMBERS // lower.numel()))
        with torch.no_grad():
            share = torch.rand(num, lower.shape[1], generator=generator)
            side = torch.rand(num, lower.shape[1], generator=generator)
            share[::2] = share[::2].masked_fill(side[::2] < 1 / 6, 0.0)
            share[::2] = share[::2].masked_fill(side[::2] > 5 / 6, 1.0)
            x = torch.minimum(lower + (upper - lower) * share.to(dtype), upper)
            found = torch.cat([margins(network, goal, part) for part in x.split(CHUNK)])
            x = x[found.argsort()[: self.num_starts]]
        return self.improve(network, goal, x, lower, upper, limits)

    def improve(
        self,
        network: Lowered,
        goal: Goal,
        x: Tensor,
        lower: Tensor,
        upper: Tensor,
        limits: Limits,
    ) -> Tensor | None:
        """Steps from points (B, num_inputs) within boxes (B or 1, num_inputs).

        The points go against the margin of all cases and against single cases in turn, so that
        one hopeless case does not hide another; with first steps of three sizes in turn.
        """
        sizes = torch.tensor([1.0, 0.2, 0.04], dtype=x.dtype)[torch.arange(len(x)) % 3]
        step = (upper - lower) * self.first_step * sizes[:, None]
        pick = torch.arange(len(x)) % (goal.num_cases + 1)
        for _ in range(self.num_steps):
            limits.check()
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                y = outputs(network, x)
                values = y @ goal.matrix(y.dtype)[0].T + goal.shifts(y.dtype)
                by_case = goal.best(values)[0]
                worst = by_case.amin(1)
                own = by_case.gather(1, pick.clamp(max=goal.num_cases - 1)[:, None])[:, 0]
                wanted = torch.where(pick == goal.num_cases, worst, own)
                (slope,) = torch.autograd.grad(wanted.sum(), x)
            hit = (worst <= 0).nonzero()
            if len(hit):
                return x[hit[0, 0]].detach()
            with torch.no_grad():
                x = torch.minimum(torch.maximum(x - step * slope.sign(), lower), upper)
            step = step * 0.9
        with torch.no_grad():
            worst = margins(network, goal, x)
        hit = (worst <= 0).nonzero()
        return x[hit[0, 0]].detach() if len(hit) else None


def outputs(network: Lowered, x: Tensor) -> Tensor:
    """Flat outputs at flat inputs: (B, num_inputs) -> (B, num_outputs)."""
    ((name, leaf),) = network.leaves.items()
    return network.forward({name: x.reshape(len(x), *leaf.shape)}).flatten(1)


def margins(network: Lowered, goal: Goal, x: Tensor) -> Tensor:
    """The goal's margin at flat inputs, (B,)."""
    return goal.margin(outputs(network, x))

"""Search for inputs that follow a pattern and are misclassified all the same.

Descent on the margin of the class plus a penalty for every unit that is outside its state;
each step moves an input within the domain.

Source: the penalty method (Courant 1943), with the steps of Kingma & Ba 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.methods.bounds.patterns.network import Constrained, Domain
from patchclamp.methods.bounds.search.limits import Limits


@dataclass(frozen=True, kw_only=True)
class PatternAttack:
    """Options of the descent.

    Attributes:
        num_starts: for each goal: inputs that were given, and random ones for the rest.
        num_steps: of Adam.
        rate: of its first step, as a share of the domain's width; decay: of it at each step.
        spare: how far inside, in units of the typical size, a descent aims.
        seed: of the random starts.
    """

    num_starts: int = 32
    num_steps: int = 150
    rate: float = 0.05
    decay: float = 0.985
    spare: float = 1e-4
    seed: int = 0

    def run(
        self,
        constrained: Constrained,
        goals: Tensor,
        domain: Domain,
        limits: Limits,
        starts: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """For goals that were met, by number: an input (num_inputs,) that meets one.

        Args:
            goals: (G, R, num_classes): goal g is met where the pattern is followed over the
                reals and goals[g] @ y <= 0 in every row.
            starts: inputs (row, ...) to start from; they are moved into the domain.
        """
        first = self._first(domain, starts)
        u = first.repeat(len(goals), 1)
        owner = torch.arange(len(goals)).repeat_interleave(len(first))
        width = domain.upper - domain.lower
        u.requires_grad_()
        adam = torch.optim.Adam([u], lr=self.rate)
        found: dict[int, Tensor] = {}
        for _ in range(self.num_steps + 1):
            limits.check()
            with torch.enable_grad():
                x = torch.minimum(domain.lower + u * width, domain.upper)
                y, inside = constrained.run(x)
                above = torch.einsum("brc,bc->br", goals[owner], y)
                loss = self._loss(above, inside)
            met = (above <= 0).all(1) & (inside >= 0).all(1)
            self._take(met.nonzero().flatten(), x.detach(), owner, goals, constrained, found)
            if len(found) == len(goals):
                break
            (u.grad,) = torch.autograd.grad(loss, [u])
            adam.step()
            with torch.no_grad():
                u.clamp_(0, 1)
            for group in adam.param_groups:
                group["lr"] *= self.decay
        return found

    def _loss(self, above: Tensor, inside: Tensor) -> Tensor:
        """0 where everything is met with something to spare; terms of about the same size."""
        total = above.new_zeros(())
        for wrong in (above, -inside):
            if wrong.numel():
                size = wrong.detach().abs().mean().clamp(min=1e-9)
                total = total + (wrong / size + self.spare).clamp(min=0).sum()
        return total

    def _first(self, domain: Domain, starts: Tensor | None) -> Tensor:
        """Starting points as shares of the domain's width, (num_starts, num_inputs)."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(
            self.num_starts, len(domain.lower), generator=generator, dtype=torch.float64
        )
        if starts is None or not len(starts):
            return drawn
        given = domain.clamped(starts)
        if len(given) > self.num_starts // 2:
            pick = torch.randperm(len(given), generator=generator)[: self.num_starts // 2]
            given = given[pick]
        width = (domain.upper - domain.lower).clamp(min=torch.finfo(torch.float64).tiny)
        shares = ((given - domain.lower) / width).clamp(0, 1)
        return torch.cat([shares, drawn[len(given) :]])

    @staticmethod
    def _take(
        met: Tensor,
        x: Tensor,
        owner: Tensor,
        goals: Tensor,
        constrained: Constrained,
        found: dict[int, Tensor],
    ) -> None:
        """Keep one certain input for each goal that has none yet."""
        for i in met.tolist():
            goal = int(owner[i])
            if goal not in found and constrained.certainly(x[i], goals[goal]):
                found[goal] = x[i].clone()

"""Networks trained so that a known counterexample lies where attacks do not find it.

A verifier that is wrong says `unsat` where a counterexample exists. Where attacks find one it is
caught at once; where none is known nothing is learnt. So a counterexample is planted: for some
inputs one point on a face of the box around the input is trained to be of another class by a
margin, while the worst points that attacks find in the box are trained to keep the right class.
Attacks of earlier rounds are kept in a window and trained on again, or the network would forget
them. Beside these inputs there are clean ones, trained in the same way but for the planted
point. Nobody knows whether a clean box has a counterexample; a planted one has.

Added to the source's recipe, so that seconds on one core are enough: points around a planted one
are trained on as well (`NUM_AROUND`), and first weights start large (`SHARPNESS`).

Shapes: points (B, *input); outputs (B, num_classes).
Source: Zhou et al. 2024, arXiv 2412.03154 (SoundnessBench). Their sizes: windows of 300 rounds,
margin 0.01, radii 0.2 and 0.5, 10 planted and 10 clean inputs for each network, thousands of
rounds with 75 attacks each.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from patchclamp.core.errors import EngineError, OptionError
from patchclamp.truth.hidden_counterexamples.anatomy import Anatomy

TRIES = 10_000
"""How often an input is drawn before it is said that there is no place for another box."""

REACH, INNER = 0.98, 0.1
"""A planted point is moved by at least REACH radii in one number, by at most INNER in the others.
Steps along signs end at corners, so that a point on a face is the harder to come to."""

NEAREST = 1 - 1e-4
"""Radii that a planted point is moved at most: rounding may not take it out of its box."""

SHARPNESS = 1.0
"""First weights are drawn larger by this over the radius: where a network is smooth there is no
room for a point that differs from all around it."""

NUM_AROUND, CLEARING = 8, 0.15
"""Points trained on around each planted point in each round, and how many radii at least they
keep from it: what attacks have not found yet is to lead nowhere either."""

RATE, RISING = 5e-3, 0.2
"""Adam's largest rate, and the share of the rounds in which it rises to that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Instance:
    """One box, with the counterexample that was planted in it or none.

    Attributes:
        module: the network, in float32 and eval mode; shared by the instances of a network.
        x: (1, *input), the middle of the box.
        eps: radius of the box in every input.
        label: the class of x.
        planted: (1, *input) a point of the box of class `target`; None in a clean instance.
        target: None in a clean instance.
    """

    module: nn.Module
    x: Tensor
    eps: float
    label: int
    planted: Tensor | None = None
    target: int | None = None

    @property
    def lower(self) -> Tensor:
        """The box's lower side, (1, *input) float32; this and no other rounding of it."""
        return self.x - self.eps

    @property
    def upper(self) -> Tensor:
        """The box's upper side, (1, *input) float32."""
        return self.x + self.eps

    def margin(self, points: Tensor) -> Tensor:
        """By how much another class is ahead of the label, (B,); computed in float64."""
        exact = copy.deepcopy(self.module).double()
        with torch.no_grad():
            return _ahead(exact(points.double()), torch.tensor([self.label]))

    def is_counterexample(self, point: Tensor) -> bool:
        """Whether a point lies in the box and has another class, by float64 arithmetic."""
        inside = bool(((point >= self.lower) & (point <= self.upper)).all())
        return inside and float(self.margin(point)) > 0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The attack that a counterexample is hidden from: signed gradient steps, restarted.

    Half of the starts are drawn in the box, the others at its corners.

    Attributes:
        num_restarts, num_steps: of every input.
        step: of the first step, as a share of the radius; it shrinks to a tenth of it.
    """

    num_restarts: int = 8
    num_steps: int = 8
    step: float = 0.5

    def run(
        self, module: nn.Module, x: Tensor, labels: Tensor, eps: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The worst point found for each input, (B, *input), and its margin, (B,).

        A margin is positive where the point has another class than its label.
        """
        num, shape = len(x), x.shape[1:]
        noise = 2 * torch.rand(self.num_restarts, num, *shape, generator=generator) - 1
        noise[::2] = noise[::2].sign()
        delta = (eps * noise).flatten(0, 1)
        middle, wanted = (
            x.repeat(self.num_restarts, *[1] * len(shape)),
            labels.repeat(self.num_restarts),
        )
        best, margin = middle, torch.full((len(middle),), -torch.inf)
        for n in range(self.num_steps + 1):
            point = (middle + delta).requires_grad_()
            with torch.enable_grad():
                ahead = _ahead(module(point), wanted)
                (slope,) = torch.autograd.grad(ahead.sum(), point)
            point, ahead = point.detach(), ahead.detach()
            better = ahead > margin
            margin = torch.where(better, ahead, margin)
            best = torch.where(better.reshape(-1, *[1] * len(shape)), point, best)
            size = eps * self.step * 0.1 ** (n / max(1, self.num_steps - 1))
            delta = (delta + size * slope.sign()).clamp(-eps, eps)
        worst, place = margin.reshape(self.num_restarts, num).max(0)
        rows = best.reshape(self.num_restarts, num, *shape)
        return rows[place, torch.arange(num)], worst


@dataclass(frozen=True, kw_only=True, eq=False)
class Hidden:
    """A network and its instances.

    Attributes:
        module: the network.
        planted: instances whose planted point is a counterexample, by float64 arithmetic, and
            whose middle has the right class.
        clean: instances without a planted point whose middle has the right class.
        num_lost: inputs that were asked for and are in neither, because training failed on them.
        num_rounds: trained.
    """

    module: nn.Sequential
    planted: tuple[Instance, ...]
    clean: tuple[Instance, ...]
    num_lost: int
    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class HiddenCounterexamples:
    """A recipe for one network.

    Shapes: inputs (1, *anatomy.shape).
    Units: eps, spread and margin in those of the input and of the output.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: num_rounds x (attacks on all inputs, and a step on (num_planted + num_clean) x window
        points); about 10 s on one core for dense layers of 64 units at the default sizes.
    Raises: OptionError for options that cannot be; EngineError if no planted point became a
        counterexample.
    Fails when: inputs have so few numbers that random starts come near every point of the box, or
        neighbours of another class are closer than a radius or two; attacks then find a
        counterexample, and the instance tells no more than any other. A `Probe` with many
        restarts measures it.
    Source: Zhou et al. 2024, arXiv 2412.03154.

    Attributes:
        anatomy: of the network.
        eps: radius of the boxes.
        spread: inputs are drawn from [-spread, spread]; boxes do not overlap.
        num_planted, num_clean: inputs with a planted counterexample and without.
        margin: by which the planted class is to be ahead.
        window: rounds of attacks that are trained on.
        probe: the attack of every round.
        num_rounds: of training.
        seed: of inputs, weights and attacks.
    """

    anatomy: Anatomy = field(default_factory=Anatomy)
    eps: float = 0.2
    spread: float = 1.0
    num_planted: int = 4
    num_clean: int = 4
    margin: float = 0.01
    window: int = 100
    probe: Probe = field(default_factory=Probe)
    num_rounds: int = 1500
    seed: int = 0

    def run(self) -> Hidden:
        """Draw, train, and keep what came out as it should."""
        self._require()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.anatomy.build()
        self._sharpen(module)
        generator = torch.Generator().manual_seed(self.seed)
        x = self._inputs(generator)
        labels = torch.randint(self.anatomy.num_classes, (len(x),), generator=generator)
        shift = torch.randint(1, self.anatomy.num_classes, (self.num_planted,), generator=generator)
        targets = (labels[: self.num_planted] + shift) % self.anatomy.num_classes
        planted = x[: self.num_planted] + self.eps * self._moves(generator)
        self._train(module, x, labels, planted, targets, generator)
        return self._kept(module, x, labels, planted, targets)

    def _require(self) -> None:
        if not (self.eps > 0 and self.spread > 0 and self.margin > 0):
            raise OptionError(
                "eps, spread and margin are positive",
                got=f"eps={self.eps:g}, spread={self.spread:g}, margin={self.margin:g}",
            )
        if min(self.num_planted, self.window, self.num_rounds) < 1 or self.num_clean < 0:
            raise OptionError(
                "num_planted, window and num_rounds are at least 1 and num_clean at least 0",
                got=f"{self.num_planted}, {self.window}, {self.num_rounds}, {self.num_clean}",
            )

    def _inputs(self, generator: torch.Generator) -> Tensor:
        """Middles of boxes that do not overlap, (num_planted + num_clean, *input)."""
        made: list[Tensor] = []
        for _ in range(TRIES):
            x = self.spread * (2 * torch.rand(self.anatomy.shape, generator=generator) - 1)
            if all(float((x - other).abs().max()) > 2 * self.eps for other in made):
                made.append(x)
            if len(made) == self.num_planted + self.num_clean:
                return torch.stack(made)
        raise OptionError(
            "the boxes do not all fit without overlapping",
            got=f"{len(made)} of {self.num_planted + self.num_clean} after {TRIES:,} tries",
            hint="a smaller eps, a larger spread or fewer inputs",
        )

    def _sharpen(self, module: nn.Sequential) -> None:
        """Let the first layer see differences of the size of a box."""
        first = next(p for p in module if isinstance(p, (nn.Linear, nn.Conv2d)))
        with torch.no_grad():
            for p in first.parameters():
                p.mul_(SHARPNESS / self.eps)

    def _moves(self, generator: torch.Generator) -> Tensor:
        """From a middle to its planted point, as shares of the radius: (num_planted, *input)."""
        shape = (self.num_planted, math.prod(self.anatomy.shape))
        size = torch.rand(shape, generator=generator)
        sign = 2.0 * torch.randint(2, shape, generator=generator) - 1
        far = REACH + (NEAREST - REACH) * size
        number = torch.randint(shape[1], (shape[0], 1), generator=generator)
        on_face = torch.arange(shape[1]) == number
        moves = sign * torch.where(on_face, far, INNER * size)
        return moves.reshape(self.num_planted, *self.anatomy.shape)

    def _train(
        self,
        module: nn.Sequential,
        x: Tensor,
        labels: Tensor,
        planted: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> None:
        optimiser = torch.optim.Adam(module.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, RATE, total_steps=self.num_rounds, pct_start=RISING
        )
        own = labels[: self.num_planted]
        pick = torch.arange(self.num_planted)
        points, wanted = x, labels
        keep = self.window * len(x)
        for _ in range(self.num_rounds):
            module.requires_grad_(False)
            worst, _ = self.probe.run(module, x, labels, self.eps, generator)
            module.requires_grad_(True)
            points, wanted = torch.cat([points, worst])[-keep:], torch.cat([wanted, labels])[-keep:]
            with torch.enable_grad():
                around = self._around(x[: self.num_planted], planted, generator)
                output = module(torch.cat([x, points, around, planted]))
                kept, there = output[: -len(planted)], output[-len(planted) :]
                loss = cross_entropy(kept, torch.cat([labels, wanted, own.repeat(NUM_AROUND)]))
                behind = there[pick, own] + self.margin - there[pick, targets]
                loss = loss + behind.clamp(min=0).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimiser.step()
                schedule.step()
        module.eval().requires_grad_(False)

    def _around(self, x: Tensor, planted: Tensor, generator: torch.Generator) -> Tensor:
        """Points of the boxes near planted ones, but not next to them; point by point."""
        shape = (NUM_AROUND, *planted.shape)
        ones = (NUM_AROUND, len(planted), *[1] * (planted.ndim - 1))
        way = 2 * torch.rand(shape, generator=generator) - 1
        way = way / way.flatten(2).abs().amax(2).reshape(ones)
        far = CLEARING + (1 - CLEARING) * torch.rand(ones, generator=generator)
        moved = planted + self.eps * far * way
        return torch.maximum(torch.minimum(moved, x + self.eps), x - self.eps).flatten(0, 1)

    def _kept(
        self,
        module: nn.Sequential,
        x: Tensor,
        labels: Tensor,
        planted: Tensor,
        targets: Tensor,
    ) -> Hidden:
        made = [
            Instance(
                module=module,
                x=x[[n]],
                eps=self.eps,
                label=int(labels[n]),
                planted=planted[[n]] if n < self.num_planted else None,
                target=int(targets[n]) if n < self.num_planted else None,
            )
            for n in range(len(x))
        ]
        right = [i for i in made if float(i.margin(i.x)) < 0]
        held = tuple(i for i in right if i.planted is not None and i.is_counterexample(i.planted))
        clean = tuple(i for i in right if i.planted is None)
        if not held:
            raise EngineError(
                "no planted point became a counterexample",
                got=f"{self.num_rounds} rounds, {self.num_planted} points",
                hint="more rounds, wider layers or a smaller eps",
            )
        return Hidden(
            module=module,
            planted=held,
            clean=clean,
            num_lost=len(made) - len(held) - len(clean),
            num_rounds=self.num_rounds,
        )


def _ahead(output: Tensor, labels: Tensor) -> Tensor:
    """The largest output of another class less that of the label, (B,)."""
    own = torch.zeros_like(output, dtype=torch.bool)
    own[torch.arange(len(output)), labels.expand(len(output))] = True
    return output.masked_fill(own, -torch.inf).amax(1) - output[own]

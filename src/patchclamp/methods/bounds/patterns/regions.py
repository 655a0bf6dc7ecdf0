"""How much a pattern specifies, beside a ball around a reference input.

The largest ball that verifies is found with and without the pattern; then how many held-out
examples of the class each specification covers, and how much of the inputs.

Source: Geng et al. 2023, arXiv 2210.16114, section 4 (the verifiable bound with and without a
pattern; recall of test data).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.bounds.patterns.mining import Share
from patchclamp.methods.bounds.patterns.network import Constrained, Domain
from patchclamp.methods.bounds.patterns.pattern import Pattern
from patchclamp.methods.bounds.patterns.verification import Outcome, VerifyPattern
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The largest ball that verified.

    Attributes:
        eps: every input of this ball (that follows the pattern) has the class: proved. 0 where
            no ball that was tried verified.
        failed: the smallest radius that was tried and did not verify; None if all did.
        why: the outcome there; a counterexample shows that no larger ball can verify.
    """

    eps: float
    failed: float | None = None
    why: Outcome | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """Of one reference.

    Attributes:
        ball: the reach of the ball alone; with_pattern: of the ball cut by the pattern.
        recall_pattern: held-out examples of the class that follow the pattern.
        recall_ball: those that lie in the verified ball.
        recall_both: those that lie in the larger ball and follow the pattern: what of the
            pattern was verified.
        uniform: uniform draws from the whole domain that follow the pattern.
        around: held-out examples of the class, each moved by uniform noise of the radius of
            `with_pattern`, that follow the pattern.
    """

    ball: Reach
    with_pattern: Reach
    recall_pattern: Share
    recall_ball: Share
    recall_both: Share
    uniform: Share
    around: Share

    @property
    def ratio(self) -> float | None:
        """Radius with the pattern over radius without; None where no plain ball verified."""
        return self.with_pattern.eps / self.ball.eps if self.ball.eps > 0 else None


@dataclass(frozen=True, kw_only=True)
class CompareRegions:
    """Radius, recall and volume of a pattern beside a ball.

    Shapes: reference (...), one input; held_out (row, ...), of the class only.
    Units: radii in those of the input, largest difference of any element.
    Randomness: of samples and attacks, by seeds.
    Cost: about 2 log2(largest / tolerance) verifications.
    Raises: InputError if the reference is not of the class or does not follow the pattern, or
        if an option is out of range; as VerifyPattern.
    Fails when: verification runs out of time; radii are then smaller than they could be.
    Source: Geng et al. 2023.

    Attributes:
        largest: radius that is tried first.
        tolerance: how close a radius is bisected.
        verify: how a ball is verified.
        num_samples: of the draws.
        confidence: of the intervals of shares.
        seed: of the draws.
    """

    largest: float = 0.5
    tolerance: float = 0.005
    verify: VerifyPattern = field(default_factory=VerifyPattern)
    num_samples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < self.largest or self.num_samples < 1:
            raise OptionError(
                "options that leave nothing to try",
                got=f"largest {self.largest}, tolerance {self.tolerance}, "
                f"num_samples {self.num_samples}",
                expected="0 < tolerance < largest, and at least one sample",
            )

    def run(
        self,
        net: Net,
        pattern: Pattern,
        label: int,
        reference: Tensor,
        held_out: Tensor,
        domain: Domain,
    ) -> Regions:
        """Compare; `domain` holds all inputs that are possible."""
        cut, plain = Constrained.of(net, pattern), Constrained.of(net, Pattern({}))
        self._require_reference(cut, label, reference)
        with_pattern = self._reach(cut, label, reference, held_out, domain)
        ball = self._reach(plain, label, reference, held_out, domain)
        generator = torch.Generator().manual_seed(self.seed)
        follows = self._follows(cut, held_out.double().flatten(1))
        drawn = self._follows(cut, domain.sampled(self.num_samples, generator))
        moved = self._moved(held_out, with_pattern.eps, domain, generator)

        def share(hits: Tensor) -> Share:
            return Share.of(hits, self.confidence)

        return Regions(
            ball=ball,
            with_pattern=with_pattern,
            recall_pattern=share(follows),
            recall_ball=share(domain.ball(reference, ball.eps).holds(held_out)),
            recall_both=share(domain.ball(reference, with_pattern.eps).holds(held_out) & follows),
            uniform=share(drawn),
            around=share(self._follows(cut, moved)),
        )

    def _reach(
        self,
        constrained: Constrained,
        label: int,
        reference: Tensor,
        starts: Tensor,
        domain: Domain,
    ) -> Reach:
        """Bisect; what verifies is kept, so the radius is proved and not only likely."""
        good, bad, why = 0.0, None, None
        radius = self.largest
        while bad is None or bad - good > self.tolerance:
            made = self.verify.decide(
                constrained, label, domain.ball(reference, radius), starts=starts, only_all=True
            )
            if made.outcome is Outcome.PROVED:
                good = radius
                if bad is None:
                    break
            else:
                bad, why = radius, made.outcome
            radius = (good + bad) / 2
        return Reach(eps=good, failed=bad, why=why)

    def _moved(
        self, held_out: Tensor, eps: float, domain: Domain, generator: torch.Generator
    ) -> Tensor:
        """Held-out examples with noise, within the domain."""
        flat = held_out.double().flatten(1)
        pick = torch.randint(len(flat), (self.num_samples,), generator=generator)
        noise = torch.rand(len(pick), flat.shape[1], generator=generator, dtype=torch.float64)
        return domain.clamped(flat[pick] + eps * (2 * noise - 1))

    @staticmethod
    def _follows(constrained: Constrained, x: Tensor) -> Tensor:
        """In float64; a unit at exactly 0 counts for either state."""
        with torch.no_grad():
            return (constrained.run(x)[1] >= 0).all(1)

    def _require_reference(self, constrained: Constrained, label: int, reference: Tensor) -> None:
        x = reference.double().flatten()[None]
        if x.shape[1] != constrained.num_inputs:
            raise InputError(
                "the reference is no single input of the network",
                got=f"{x.shape[1]} elements",
                expected=str(constrained.num_inputs),
            )
        with torch.no_grad():
            y, inside = constrained.run(x)
        if int(y.argmax()) != label or not bool((inside >= 0).all()):
            raise InputError(
                "the reference must be of the class and follow the pattern",
                got=f"class {int(y.argmax())}, {int((inside < 0).sum())} units outside",
                expected=f"class {label}, none outside",
            )

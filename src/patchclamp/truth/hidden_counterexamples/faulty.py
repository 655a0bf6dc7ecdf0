"""Verifiers that are wrong on purpose: the control of a bench for soundness.

A bench that no wrong verifier fails proves nothing about the others. Each of these is this
package's own search over boxes of inputs with one fault in it, without the replay that would
notice, and without looking for counterexamples, so that nothing but its bounds decides. What a
fault does is what can go wrong in a verifier: a relaxation that cuts off a part of the function,
a box that is too small, bounds that are too good, sub-problems that get lost.

Source: Zhou et al. 2024, arXiv 2412.03154 (the idea of faults made on purpose).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

import patchclamp
from patchclamp.bounding.lowering import Lowered
from patchclamp.methods.bounds.certificate.replay import Replay
from patchclamp.methods.bounds.property import Property
from patchclamp.methods.bounds.search.attack import Attack
from patchclamp.methods.bounds.search.goal import Goal, goals
from patchclamp.methods.bounds.search.input_split import InputSplit
from patchclamp.methods.bounds.search.limits import Limits, OutOfMemoryError, OutOfTimeError
from patchclamp.methods.bounds.verify import Answer, lowered
from patchclamp.rules.base import Interval, Lines
from patchclamp.rules.relu import ReLU


class Fault(StrEnum):
    """What is wrong."""

    NONE = "none"
    """Nothing, for comparison."""
    LOW_LINE = "low-line"
    """The line above an open ReLU has no intercept."""
    SMALL_BOX = "small-box"
    """The box is a tenth narrower."""
    HIGH_BOUND = "high-bound"
    """Bounds are better than they are, by a twentieth of a unit of the output."""
    LOST_HALF = "lost-half"
    """The box is divided once, and the half above is never looked at."""


WIDTH, GIFT = 0.9, 0.05


@dataclass(frozen=True, eq=False)
class _LowReLU(ReLU):
    """A wrong relaxation: the chord is too low."""

    def relax(self, boxes: tuple[Interval, ...], slopes: Tensor | None = None) -> Lines:
        lines = super().relax(boxes, slopes)
        return Lines(
            lines.below_slope, lines.below, lines.above_slope, torch.zeros_like(lines.above)
        )


@dataclass(frozen=True, kw_only=True)
class FaultyVerifier:
    """Division of inputs in float64, with one fault; it never says `sat`.

    Randomness: none.
    Cost: until everything is closed, or `timeout`, as always where it is right to close nothing.
    Raises: as `Verify`.

    Attributes:
        fault: what is wrong.
        replayed: whether a low line is replayed, as `Verify` does, by the certificate checker,
            which has lines of its own. Of the other faults the checker would see the tree of
            boxes and the property, which a replay of single boxes does not.
        timeout: wall seconds.
    """

    fault: Fault
    replayed: bool = False
    timeout: float = 10.0

    def run(self, path: Path, property: Property) -> Answer:
        """unsat, which may be wrong; timeout; or unknown, where too much was open."""
        limits = Limits(self.timeout)
        net = patchclamp.open(path)
        example = [x[:1] for x in net.example.tensors()]
        network = self._network(lowered(net.graph, example, torch.float64))
        replay = Replay(path).margins if self.replayed else None
        search = InputSplit(attack=Attack(num_steps=0))
        try:
            for goal in goals(property.cases):
                search.run(network, self._goal(goal), replay, _unheard, limits)
        except OutOfTimeError:
            return Answer.TIMEOUT
        except OutOfMemoryError:
            return Answer.UNKNOWN
        return Answer.UNSAT

    def _network(self, network: Lowered) -> Lowered:
        if self.fault is Fault.LOW_LINE:
            for value in network.values:
                if isinstance(value.rule, ReLU):
                    value.rule = _LowReLU(value.rule.shape)
        return network

    def _goal(self, goal: Goal) -> Goal:
        width = goal.upper - goal.lower
        if self.fault is Fault.SMALL_BOX:
            cut = (1 - WIDTH) / 2 * width
            return replace(goal, lower=goal.lower + cut, upper=goal.upper - cut)
        if self.fault is Fault.HIGH_BOUND:
            return replace(goal, offsets=goal.offsets + GIFT)
        if self.fault is Fault.LOST_HALF:
            upper = goal.upper.copy()
            widest = int(width.argmax())
            upper[widest] -= width[widest] / 2
            return replace(goal, upper=upper)
        return goal


def _unheard(point: Tensor) -> bool:
    """Told of a counterexample."""
    return False

"""Is every input that follows a pattern classified as the pattern says?

For each other class: attack first; then layers are bounded where the pattern holds, and branch
and bound goes on from the pattern's own constraints, in float64 with outward rounding, so that
`proved` holds over the reals for the network with the weights that it has, and so does every
counterexample. The network's own float32 arithmetic is not part of either.

Source: Geng et al. 2023, arXiv 2210.16114, section 4 (what is verified); Wang et al. 2021,
arXiv 2103.06624 (how).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.patterns.attack import PatternAttack
from patchclamp.methods.bounds.patterns.layers import EmptyError, LayerSearch
from patchclamp.methods.bounds.patterns.network import Constrained, Domain
from patchclamp.methods.bounds.patterns.pattern import Pattern
from patchclamp.methods.bounds.search.limits import Limits, OutOfMemoryError, OutOfTimeError
from patchclamp.methods.bounds.search.neuron_split import (
    Leaf,
    NeuronSplit,
    NothingLeftError,
    Root,
)
from patchclamp.net import Net


class Outcome(StrEnum):
    """What is known of a statement about all inputs."""

    PROVED = "proved"
    REFUTED = "counterexample"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """An outcome and what it rests on.

    Attributes:
        witness: with a counterexample, the input (num_inputs,) float64. Over the reals it
            follows the pattern (z > 0 where active, z <= 0 where inactive) and meets what
            was to be excluded.
        reason: one line.
        bound: the smallest lower bound of what was still open, if it was stopped.
        num_boxes: sub-problems that were bounded.
    """

    outcome: Outcome
    witness: Tensor | None = None
    reason: str
    bound: float | None = None
    num_boxes: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """Of one pattern in one domain.

    Attributes:
        label: the class that the pattern should imply.
        decisions: by other class: `proved` if no input of the domain that follows the pattern
            has an output for it as large as for the label.
        empty: proved because no input of the domain follows the pattern at all.
        cpu_seconds: spent.
    """

    label: int
    decisions: dict[int, Decision]
    empty: bool = False
    cpu_seconds: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """Of all other classes together."""
        outcomes = {d.outcome for d in self.decisions.values()}
        for worst in (Outcome.REFUTED, Outcome.UNKNOWN):
            if worst in outcomes:
                return worst
        return Outcome.PROVED


@dataclass(frozen=True, kw_only=True)
class Prover:
    """Proof that a row of the output is positive wherever a pattern holds.

    Attributes:
        timeout: seconds for one row.
        max_boxes: how many open sub-problems may be held.
        layers: how layers are bounded.
        search: the branch and bound.
    """

    timeout: float = 20.0
    max_boxes: int = 100_000
    layers: LayerSearch = field(default_factory=LayerSearch)
    search: NeuronSplit = field(default_factory=NeuronSplit)

    def root(self, constrained: Constrained, domain: Domain) -> Root:
        """All layers. Raises EmptyError, OutOfTimeError."""
        return self.layers.run(constrained, domain, Limits(self.timeout))

    def run(self, root: Root, row: Tensor) -> Decision:
        """Proved or unknown; row (num_classes,)."""
        limits, bounds = Limits(self.timeout, self.max_boxes), [-torch.inf]
        shape = root.bounds.network.output.shape
        try:
            leaves = self.search.run(
                root, row.reshape(1, 1, *shape), row.new_zeros(1, 1), _always, limits, bounds.append
            )
        except OutOfTimeError:
            reason = f"the time was up ({self.timeout:g} s)"
        except OutOfMemoryError:
            reason = f"more than {self.max_boxes:,} sub-problems were open"
        except NothingLeftError:
            reason = "a sub-problem stayed open in which nothing can be divided"
        else:
            if leaves is not None:
                return Decision(
                    outcome=Outcome.PROVED,
                    reason=f"{len(leaves)} sub-problems were closed, rounded outwards",
                    num_boxes=limits.num_boxes,
                )
            reason = "the whole stayed open and nothing may be divided"
        last = bounds[-1] if bounds[-1] > -torch.inf else None
        return Decision(
            outcome=Outcome.UNKNOWN, reason=reason, bound=last, num_boxes=limits.num_boxes
        )


def _always(leaves: list[Leaf]) -> list[bool]:
    """Bounds that are rounded outwards need no replay."""
    return [True] * len(leaves)


@dataclass(frozen=True, kw_only=True)
class VerifyPattern:
    """No input that follows the pattern is classified as another class.

    Shapes: one input, one output of which every element is a class.
    Randomness: of the attack, by its seed.
    Cost: up to `prover.timeout` for each other class, and the attack.
    Raises: InputError (a label that is no class, a domain of another size), BoundError (an
        operator without a rule), SiteError (a site that no ReLU reads).
    Fails when: the domain is large and the pattern leaves many units free; the answer is then
        unknown. Nothing is said of inputs outside the domain.
    Source: Geng et al. 2023.
    """

    prover: Prover = field(default_factory=Prover)
    attack: PatternAttack = field(default_factory=PatternAttack)

    def run(
        self,
        net: Net,
        pattern: Pattern,
        label: int,
        domain: Domain,
        *,
        starts: Tensor | None = None,
    ) -> Verification:
        """Decide for each other class.

        Args:
            pattern: may be empty: this is the plain verification of the domain.
            label: the class that the pattern should imply.
            domain: the inputs that are asked about.
            starts: inputs (row, ...) that the attack starts from, besides random ones.
        """
        return self.decide(Constrained.of(net, pattern), label, domain, starts=starts)

    def decide(
        self,
        constrained: Constrained,
        label: int,
        domain: Domain,
        *,
        starts: Tensor | None = None,
        only_all: bool = False,
    ) -> Verification:
        """`run`, on a network that is lowered already.

        Args:
            only_all: stop at the first class that is not proved; `decisions` are then not of
                all classes.
        """
        began = time.process_time()
        require_fit(constrained, (label,), domain)
        others = [j for j in range(constrained.num_classes) if j != label]
        rows = margins(label, others, constrained.num_classes)
        limits = Limits(self.prover.timeout)
        try:
            met = self.attack.run(constrained, rows[:, None], domain, limits, starts)
        except OutOfTimeError:
            met = {}
        decisions = {
            others[k]: Decision(
                outcome=Outcome.REFUTED,
                witness=x,
                reason="an input follows the pattern and is classified otherwise, over the reals",
            )
            for k, x in met.items()
        }
        left = [] if only_all and met else [k for k in range(len(others)) if k not in met]
        empty = False
        if left:
            found, empty = self._proved(constrained, domain, rows[left], only_all=only_all)
            decisions |= {others[k]: d for k, d in zip(left, found, strict=False)}
        return Verification(
            label=label,
            decisions=dict(sorted(decisions.items())),
            empty=empty,
            cpu_seconds=time.process_time() - began,
        )

    def _proved(
        self, constrained: Constrained, domain: Domain, rows: Tensor, *, only_all: bool
    ) -> tuple[list[Decision], bool]:
        """Of each row, up to the first that is open; and whether the pattern is empty here."""
        try:
            root = self.prover.root(constrained, domain)
        except EmptyError:
            nothing = Decision(
                outcome=Outcome.PROVED, reason="no input of the domain follows the pattern"
            )
            return [nothing] * len(rows), True
        except OutOfTimeError:
            late = Decision(
                outcome=Outcome.UNKNOWN, reason="the time was up before all layers were bounded"
            )
            return [late] * len(rows), False
        made: list[Decision] = []
        for row in rows:
            made.append(self.prover.run(root, row))
            if only_all and made[-1].outcome is not Outcome.PROVED:
                break
        return made, False


def margins(label: int, others: Sequence[int], num_classes: int) -> Tensor:
    """Rows y[label] - y[other], (len(others), num_classes)."""
    rows = torch.zeros(len(others), num_classes, dtype=torch.float64)
    rows[:, label] = 1
    rows[torch.arange(len(others)), list(others)] = -1
    return rows


def require_fit(constrained: Constrained, labels: Sequence[int], domain: Domain) -> None:
    """Raise InputError for labels that are no classes, and for a domain of other inputs."""
    for label in labels:
        if not 0 <= label < constrained.num_classes:
            raise InputError(
                f"the network has no class {label}",
                expected=f"0 to {constrained.num_classes - 1}",
            )
    if len(domain.lower) != constrained.num_inputs:
        raise InputError(
            "the domain has inputs of another size than the network",
            got=str(len(domain.lower)),
            expected=str(constrained.num_inputs),
        )

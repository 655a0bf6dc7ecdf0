"""Can one input follow the patterns of two classes at once?

No, if some unit has opposite states in them. No, too, if no input of the domain can meet the
constraints of both, or if every input that follows both would have to give each of the two
classes the larger output. Yes, if an input is found that follows both.

Source: Geng et al. 2023, arXiv 2210.16114, section 4 (non-ambiguity).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.bounds.patterns.attack import PatternAttack
from patchclamp.methods.bounds.patterns.layers import EmptyError
from patchclamp.methods.bounds.patterns.network import Constrained, Domain
from patchclamp.methods.bounds.patterns.pattern import Pattern
from patchclamp.methods.bounds.patterns.verification import (
    Decision,
    Outcome,
    Prover,
    margins,
    require_fit,
)
from patchclamp.methods.bounds.search.limits import Limits, OutOfTimeError
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class PatternsApart:
    """No input of a domain follows two patterns.

    Shapes: one input, one output of which every element is a class.
    Randomness: of the attack, by its seed.
    Cost: none where the patterns clash; else up to twice `prover.timeout`, and the attack.
    Raises: as VerifyPattern; OptionError if both patterns are of one class.
    Fails when: neither an input nor a proof is found in time; the answer is then unknown.
    Source: Geng et al. 2023.
    """

    prover: Prover = field(default_factory=Prover)
    attack: PatternAttack = field(default_factory=PatternAttack)

    def run(
        self,
        net: Net,
        first: Pattern,
        second: Pattern,
        labels: tuple[int, int],
        domain: Domain,
        *,
        starts: Tensor | None = None,
    ) -> Decision:
        """Proved, a witness that follows both over the reals, or unknown.

        Args:
            labels: the classes of the patterns; their outputs serve the proof.
            starts: inputs (row, ...) that the attack starts from, besides random ones.
        """
        if labels[0] == labels[1]:
            raise OptionError(
                "two patterns of one class may overlap", got=f"class {labels[0]} twice"
            )
        clash = first.clashes(second)
        if clash:
            site, unit = clash[0]
            return Decision(
                outcome=Outcome.PROVED,
                reason=f"{len(clash)} units clash, such as unit {unit} of '{site}'",
            )
        both = Constrained.of(net, first.joined(second))
        require_fit(both, labels, domain)
        anything = torch.zeros(1, 1, both.num_classes, dtype=torch.float64)
        try:
            met = self.attack.run(both, anything, domain, Limits(self.prover.timeout), starts)
        except OutOfTimeError:
            met = {}
        if met:
            return Decision(
                outcome=Outcome.REFUTED,
                witness=met[0],
                reason="an input follows both patterns, over the reals",
            )
        return self._proved(both, labels, domain)

    def _proved(self, both: Constrained, labels: tuple[int, int], domain: Domain) -> Decision:
        """Each class would need the larger output."""
        try:
            root = self.prover.root(both, domain)
        except EmptyError:
            return Decision(
                outcome=Outcome.PROVED, reason="bounds leave nothing that meets both patterns"
            )
        except OutOfTimeError:
            return Decision(
                outcome=Outcome.UNKNOWN, reason="the time was up before all layers were bounded"
            )
        num = 0
        for this, other in (labels, labels[::-1]):
            found = self.prover.run(root, margins(this, [other], both.num_classes)[0])
            num += found.num_boxes
            if found.outcome is not Outcome.PROVED:
                return found
        return Decision(
            outcome=Outcome.PROVED,
            reason="in both patterns at once each class would have the larger output",
            num_boxes=num,
        )

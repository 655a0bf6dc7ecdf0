"""The network that is bounded: values that depend on something perturbed, and how.

Everything that depends on nothing perturbed is a constant inside a rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchclamp.rules.base import Interval, Rule, Shape


@dataclass(eq=False)
class Value:
    """One perturbed value.

    Attributes:
        rule: how it is computed; None for what is perturbed itself.
        arguments: the values that it is computed from.
        shape: without N.
        name: address of the site that it is, for messages; "" where there is none.
        number: its place in the order of computing.
        known: an interval that holds whatever the arguments are, such as that of a norm.
    """

    rule: Rule | None
    arguments: tuple[Value, ...]
    shape: Shape
    name: str = ""
    number: int = -1
    known: Interval | None = None

    def __repr__(self) -> str:
        kind = type(self.rule).__name__ if self.rule is not None else "perturbed"
        return f"<{self.number} {kind} {self.name} {self.shape}>"

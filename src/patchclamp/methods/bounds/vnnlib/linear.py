"""Linear expressions and inequalities with exact weights."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

Variable = tuple[bool, int]
"""Whether it is an input, and its number."""


class Sum(NamedTuple):
    """A constant, and variables with weights other than 0."""

    terms: dict[Variable, Fraction]
    constant: Fraction

    def plus(self, other: Sum, factor: Fraction) -> Sum:
        """self + factor * other."""
        return self.plus_all([other], factor)

    def plus_all(self, others: Iterable[Sum], factor: Fraction) -> Sum:
        """self + factor * (sum of others); what cancels goes. Cost: linear in what is added."""
        terms, constant = dict(self.terms), self.constant
        for other in others:
            constant += factor * other.constant
            for variable, weight in other.terms.items():
                total = terms.get(variable, Fraction(0)) + factor * weight
                if total:
                    terms[variable] = total
                else:
                    terms.pop(variable, None)
        return Sum(terms, constant)

    def times(self, factor: Fraction) -> Sum:
        """factor * self."""
        terms = {v: weight * factor for v, weight in self.terms.items()} if factor else {}
        return Sum(terms, self.constant * factor)

    def size(self) -> int:
        """Bits of the largest numerator or denominator."""
        return max(
            max(number.numerator.bit_length(), number.denominator.bit_length())
            for number in (self.constant, *self.terms.values())
        )


class Inequality(NamedTuple):
    """Sum of weight * variable, plus constant, <= 0.

    Attributes:
        terms: (variable, weight) with weights other than 0, all inputs or all outputs.
        inputs: whether they are inputs.
        at: the token that it begins with.
    """

    terms: tuple[tuple[int, Fraction], ...]
    constant: Fraction
    inputs: bool
    at: int


Conjunction = list[Inequality]
Disjunction = list[Conjunction]
"""`[]` is false and `[[]]` is true."""

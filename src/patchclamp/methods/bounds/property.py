"""What is to be proved: for no input of a box may the output meet all of some inequalities.

A property of the VNN-COMP form is a disjunction of cases. An input x is a counterexample
if, in some case, x lies in the case's box (and meets its inequalities on inputs) and the
network's output y meets every inequality on outputs. The property holds (`unsat`) if no
case has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One box of inputs with one conjunction of inequalities on outputs.

    Attributes:
        lower, upper: the box, (num_inputs,); flat, in the order of the network's input.
        rows, offsets: unsafe where rows @ y + offsets <= 0 in every row;
            (num_rows, num_outputs) and (num_rows,). No rows at all: every input is unsafe.
        input_rows, input_offsets: as rows and offsets, on the inputs; usually empty.
    """

    lower: Numbers
    upper: Numbers
    rows: Numbers
    offsets: Numbers
    input_rows: Numbers
    input_offsets: Numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Property:
    """A disjunction of cases; see the module docstring."""

    cases: tuple[Case, ...]
    num_inputs: int
    num_outputs: int

    def margin(self, x: Numbers, y: Numbers) -> float:
        """How far (x, y) is from being a counterexample; at most 0 for a counterexample.

        The smallest over the cases of the largest violated inequality, those of the box included.
        """
        return min(_margin(case, x, y) for case in self.cases)


def _margin(case: Case, x: Numbers, y: Numbers) -> float:
    parts = [
        case.lower - x,
        x - case.upper,
        case.input_rows @ x + case.input_offsets,
        case.rows @ y + case.offsets,
    ]
    return float(np.concatenate(parts).max())

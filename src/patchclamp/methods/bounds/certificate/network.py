"""A network as a flat list of steps on flat float64 vectors: affine maps and elementwise functions.

This is all that the checker knows about networks. Step 0 is the input; each later step
names the steps that it reads, so that the list is a directed acyclic graph in topological
order. A matrix may stand for a real matrix that no float64 holds exactly (a batch norm
folded into a convolution): `relative` says how far off each entry may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from patchclamp.methods.bounds.certificate.rounding import Numbers, gamma

Matrix: TypeAlias = "Numbers | sparse.csr_array[Any]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """One product of an affine step: matrix @ value of the step `source`.

    Attributes:
        matrix: (size of the step, size of the source), dense or CSR without duplicates.
        relative: every entry of the matrix that is meant lies within this, relatively.
    """

    source: int
    matrix: Matrix
    relative: float = 0.0

    @cached_property
    def absolute(self) -> Matrix:
        """The entries without their signs."""
        return abs(self.matrix)

    @cached_property
    def longest_row(self) -> int:
        """Products in one element of matrix @ x, at most."""
        if isinstance(self.matrix, np.ndarray):
            return int(self.matrix.shape[1])
        return int(np.diff(self.matrix.indptr).max(initial=0))

    @cached_property
    def longest_column(self) -> int:
        """Products in one element of a @ matrix, at most."""
        if isinstance(self.matrix, np.ndarray):
            return int(self.matrix.shape[0])
        return int(np.bincount(self.matrix.indices, minlength=1).max())

    def after(self, x: Numbers) -> Numbers:
        """x (..., source) -> x @ matrix.T (..., step)."""
        return _times(x, self.matrix.T)

    def absolute_after(self, x: Numbers) -> Numbers:
        """x (..., source) -> x @ abs(matrix).T (..., step)."""
        return _times(x, self.absolute.T)

    def before(self, a: Numbers) -> Numbers:
        """Rows a (..., step) -> a @ matrix (..., source)."""
        return _times(a, self.matrix)

    def rows(self, index: NDArray[np.int64]) -> Numbers:
        """Rows of the matrix, dense: index (...) -> (..., source)."""
        if isinstance(self.matrix, np.ndarray):
            return np.asarray(self.matrix[index], np.float64)
        flat = self.matrix[index.ravel()].toarray()
        return np.asarray(flat.reshape(*index.shape, -1), np.float64)


def _times(x: Numbers, matrix: Any) -> Numbers:
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(matrix, np.ndarray):
        product = flat @ matrix
    else:  # sparse @ dense is fast when the dense one has its long axis last
        product = (matrix.T @ np.ascontiguousarray(flat.T)).T
    return np.ascontiguousarray(product, np.float64).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """bias + the sum of the terms.

    Attributes:
        bias: (size,)
        bias_error: (size,) how far the bias that is meant may be from `bias`.
    """

    terms: tuple[Term, ...]
    bias: Numbers
    bias_error: Numbers

    @property
    def size(self) -> int:
        return len(self.bias)

    @cached_property
    def length(self) -> int:
        """Length whose gamma covers a product with this step in either direction."""
        forward = sum(term.longest_row for term in self.terms)
        backward = max((term.longest_column for term in self.terms), default=0)
        return max(forward, backward, self.size) + len(self.terms)

    @cached_property
    def keeps_boxes(self) -> bool:
        """Whether each element reads at most one element, and no two the same.

        Then the values of the step fill a box if those of its source do.
        """
        if len(self.terms) != 1:
            return not self.terms
        entries = self.terms[0].matrix != 0
        return bool(
            np.all(np.asarray(entries.sum(axis=0)) <= 1)
            and np.all(np.asarray(entries.sum(axis=1)) <= 1)
        )


class Function(StrEnum):
    """Elementwise functions that have a rule in `relaxations`."""

    RELU = "Relu"
    LEAKY_RELU = "LeakyRelu"
    SIGMOID = "Sigmoid"
    TANH = "Tanh"


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """A function applied to each element of one step.

    Attributes:
        slope: of LeakyRelu below 0, in [0, 1]; 0 for Relu.
    """

    function: Function
    source: int
    size: int
    slope: float = 0.0


@dataclass(frozen=True)
class Input:
    """The network's input, flat."""

    size: int


Step: TypeAlias = "Input | Affine | Elementwise"


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """Steps in topological order; the last step is the output.

    Attributes:
        steps: steps[0] is the input.
        sha256: of the unpacked bytes that it was read from.
    """

    steps: tuple[Step, ...]
    sha256: str

    @property
    def num_inputs(self) -> int:
        return self.steps[0].size

    @property
    def num_outputs(self) -> int:
        return self.steps[-1].size

    @cached_property
    def operators(self) -> tuple[int, ...]:
        """Steps of the elementwise operators; certificates number them in this order."""
        return tuple(i for i, step in enumerate(self.steps) if isinstance(step, Elementwise))

    def operator(self, number: int) -> Elementwise:
        """The elementwise operator of this number."""
        step = self.steps[self.operators[number]]
        if not isinstance(step, Elementwise):
            raise TypeError("operators lists elementwise steps only")
        return step

    def forward(self, x: Numbers) -> Numbers:
        """x (B, num_inputs) -> (B, num_outputs), in plain float64 without bounds."""
        values: list[Numbers] = []
        for step in self.steps:
            if isinstance(step, Input):
                values.append(x)
            elif isinstance(step, Affine):
                parts = [term.after(values[term.source]) for term in step.terms]
                values.append(sum(parts, np.broadcast_to(step.bias, (len(x), step.size))))
            else:
                values.append(apply(step, values[step.source]))
        return values[-1]


def apply(step: Elementwise, x: Numbers) -> Numbers:
    """The function itself, in float64; its error is the subject of `relaxations`."""
    if step.function is Function.TANH:
        return np.asarray(np.tanh(x), np.float64)
    if step.function is Function.SIGMOID:
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0))), np.float64)
    return np.where(x > 0, x, step.slope * x)


def csr(
    entries: Numbers, columns: NDArray[np.int64], starts: NDArray[np.int64], width: int
) -> Matrix:
    """Row i has entries[starts[i] : starts[i + 1]], in the columns of the same places."""
    return sparse.csr_array((entries, columns, starts), shape=(len(starts) - 1, width))


def selection(columns: NDArray[np.int64], width: int) -> Matrix:
    """CSR matrix (len(columns), width) whose row i has 1 at column columns[i]."""
    return csr(np.ones(len(columns)), columns, np.arange(len(columns) + 1), width)


def with_error_of(length: int, relative: float) -> float:
    """Relative error of products of this length with a matrix that is itself `relative` off."""
    return gamma(length) + 2.0 * relative

"""Matrices known up to a rounding error, and what can be proved about them in float64.

A `Rounded` is a float64 tensor with, for every element, a bound on its distance from
the exact real number that it stands for. Sums and products carry that bound along, so
a statement proved about a `Rounded` holds over the reals for the exact matrix.

Definiteness is proved by a Cholesky factorisation that runs to its end on the matrix
minus a multiple of the identity which covers the factorisation's own rounding.
Largest singular values follow from it. Products must be computed by ordinary sums (in
any order, fused or not), which holds for the usual BLAS libraries.

Source: Higham 2002, ch. 3 (error of sums and products); Rump 2006, "Verification of
positive definiteness", theorem 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-52
"""Twice the unit roundoff of float64: an upper bound of the relative error of one operation."""
_INFLATE = 1 + 2.0**-20
"""Covers the rounding made while an error bound itself is computed (sums of up to 10^9 terms)."""
_TINY = 1e-290
"""Covers underflow, per element."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """`value` +- `error`, elementwise; `error` None stands for zero."""

    value: Tensor
    error: Tensor | None = None

    @property
    def slack(self) -> Tensor:
        """The error as a tensor."""
        return torch.zeros_like(self.value) if self.error is None else self.error

    @property
    def largest(self) -> Tensor:
        """An upper bound of the absolute value, elementwise."""
        return (
            self.value.abs()
            if self.error is None
            else (self.value.abs() + self.error) * (1 + 2 * UNIT)
        )

    def __getitem__(self, index: object) -> Rounded:
        error = None if self.error is None else self.error[index]  # type: ignore[index]  # as torch
        return Rounded(self.value[index], error)  # type: ignore[index]  # as torch

    def transposed(self) -> Rounded:
        """Rows as columns."""
        return Rounded(self.value.T, None if self.error is None else self.error.T)

    def __matmul__(self, other: Rounded) -> Rounded:
        """The matrix product; its error grows with the inner size."""
        inner = self.value.shape[-1]
        error = (inner + 2) * UNIT * (self.value.abs() @ other.value.abs())
        if other.error is not None:
            error = error + self.value.abs() @ other.error
        if self.error is not None:
            error = error + self.error @ other.largest
        return Rounded(self.value @ other.value, error * _INFLATE + _TINY)

    def __add__(self, other: Rounded) -> Rounded:
        value = self.value + other.value
        return Rounded(value, (self.slack + other.slack + UNIT * value.abs()) * _INFLATE)

    def __sub__(self, other: Rounded) -> Rounded:
        return self + other.negated()

    def negated(self) -> Rounded:
        """Minus the matrix, exactly."""
        return Rounded(-self.value, self.error)

    def rows_times(self, factor: Rounded) -> Rounded:
        """Row i times factor[i]. Shapes: (row, column) and (row,)."""
        by = Rounded(factor.value[:, None], factor.slack[:, None])
        value = self.value * by.value
        error = UNIT * value.abs() + self.value.abs() * by.slack + self.slack * by.largest
        return Rounded(value, error * _INFLATE + _TINY)


def computed(value: Tensor, num_operations: int) -> Rounded:
    """A value that came out of that many operations without cancellation."""
    return Rounded(value, value.abs() * (num_operations * UNIT))


def is_positive_definite(matrix: Rounded) -> bool:
    """Whether the exact symmetric matrix is proved positive semidefinite.

    False means "not proved". Shapes: (n, n); only the lower triangle is read.
    """
    diagonal = matrix.value.diagonal()
    if not bool(torch.isfinite(matrix.value).all()) or bool((diagonal <= 0).any()):
        return False
    # Powers of two bring the diagonal into [1, 4): exact, and it changes no sign.
    scale = torch.exp2(-(diagonal.log2() / 2).floor())
    value = matrix.value * scale[:, None] * scale
    below = (matrix.slack * scale[:, None] * scale).tril()
    # A symmetric matrix's spectral norm is at most its largest absolute row sum.
    off = float((below + below.tril(-1).T).sum(1).max()) if len(below) else 0.0
    shift = (off + (len(below) + 6) * UNIT * float(value.diagonal().sum()) + _TINY) * _INFLATE
    value.diagonal().sub_(shift)
    return bool((value.diagonal() > 0).all()) and not int(torch.linalg.cholesky_ex(value).info)


def spectral_norm(matrix: Rounded) -> float:
    """A proved upper bound of the largest singular value, tight to about 1e-12. Shapes: (m, n)."""
    if 0 in matrix.value.shape or not bool(matrix.value.any()):
        return frobenius(Rounded(matrix.slack))
    wide = matrix.value.shape[1] > matrix.value.shape[0]
    exact = Rounded(matrix.value.T if wide else matrix.value)
    gram = exact.transposed() @ exact
    guess = float(torch.linalg.matrix_norm(matrix.value, 2))
    identity = torch.eye(gram.value.shape[0], dtype=torch.float64)
    for digits in range(13, 0, -1):
        bound = guess * (1 + 10.0**-digits)
        square = Rounded(identity * (bound * bound), identity * (bound * bound * UNIT))
        if is_positive_definite(square - gram):
            # The exact matrix is the value plus a matrix no larger than its error.
            return (bound + frobenius(Rounded(matrix.slack))) * (1 + 2 * UNIT)
    return frobenius(matrix)


def frobenius(matrix: Rounded) -> float:
    """A proved upper bound of the Frobenius norm."""
    return math.sqrt(float(matrix.largest.square().sum())) * _INFLATE

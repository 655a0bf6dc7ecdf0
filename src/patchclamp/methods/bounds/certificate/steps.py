"""Building the steps of a network while its graph is read.

A tensor that depends on the input is a `View`: for each of its elements, which element of
which step it is. Reshaping, transposing, slicing and gathering only move that index
around, which costs no step and no rounding. Arithmetic makes an affine step, and takes the
rows of the affine step it reads along (a bias after a matrix, a batch norm after a
convolution) where nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import EngineError
from patchclamp.methods.bounds.certificate.network import (
    Affine,
    Elementwise,
    Function,
    Input,
    Matrix,
    Step,
    Term,
    csr,
    selection,
)
from patchclamp.methods.bounds.certificate.rounding import SLACK, Numbers

Index = NDArray[np.int64]

MOST_ENTRIES = 200_000_000
"""Entries of one matrix; beyond it reading is refused rather than memory exhausted."""

SMALLEST = 1e-280
"""Products of weights below this could underflow, where relative errors do not hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A tensor made of elements of one step.

    Attributes:
        index: of the tensor's shape; elements of the step.
        shared: whether several nodes read it, so that its step must be kept.
    """

    step: int
    index: Index
    shared: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape


def moved(view: View, index: Index) -> View:
    """The view with its elements moved, left out or repeated."""
    return replace(view, index=np.asarray(index, np.int64))


class Steps:
    """The steps so far. Every method returns views of the whole of a step, in flat order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape, dtype=np.int64))
        self.steps: list[Step] = [Input(size)]
        self.input = View(step=0, index=np.arange(size, dtype=np.int64).reshape(shape))

    def whole(self, view: View) -> View:
        """A view whose elements are those of its step, in order."""
        flat = view.index.ravel()
        size = self.steps[view.step].size
        if len(flat) == size and np.array_equal(flat, np.arange(size)):
            return view
        return self.affine([self._rows(view)], view.shape)

    def distinct(self, view: View) -> View:
        """A view in which no element of the step occurs twice."""
        counts = np.bincount(view.index.ravel(), minlength=1)
        return view if counts.max(initial=0) <= 1 else self.whole(view)

    def linear(self, view: View, matrix: Matrix, shape: tuple[int, ...], relative: float) -> View:
        """matrix @ step of the view, as a tensor of this shape."""
        size = matrix.shape[0]
        term = Term(source=view.step, matrix=matrix, relative=relative)
        part = Affine(terms=(term,), bias=np.zeros(size), bias_error=np.zeros(size))
        return self.affine([part], shape)

    def scaled(
        self,
        view: View,
        scale: Numbers,
        shift: Numbers,
        *,
        relative: float = 0.0,
        shift_error: Numbers | float = 0.0,
    ) -> View:
        """view * scale + shift, broadcast; `relative` and `shift_error` are errors of these."""
        shape = np.broadcast_shapes(view.shape, scale.shape, shift.shape)
        view = moved(view, np.broadcast_to(view.index, shape))
        scale, shift = (np.broadcast_to(a, shape).ravel() for a in (scale, shift))
        error = np.broadcast_to(np.asarray(shift_error, np.float64), shape).ravel()
        if np.all(scale == 1.0) and not shift.any() and not relative and not error.any():
            return view
        part = _scale(self._rows(view), scale, relative)
        return self.affine([_shift(part, shift, error)], shape)

    def total(self, views: Sequence[View], signs: Sequence[float]) -> View:
        """Sum of sign * view, broadcast."""
        shape = np.broadcast_shapes(*(view.shape for view in views))
        parts = [
            _scale(
                self._rows(moved(view, np.broadcast_to(view.index, shape))),
                np.full(int(np.prod(shape)), sign),
                0.0,
            )
            for view, sign in zip(views, signs, strict=True)
        ]
        return self.affine(parts, shape)

    def placed(self, views: Sequence[View], places: Sequence[Index], constant: Numbers) -> View:
        """`constant`, with each view written over its places (flat, going upwards)."""
        terms = []
        for view, place in zip(views, places, strict=True):
            filled = np.zeros(constant.size, np.int64)
            filled[place] = 1
            starts = np.append(0, np.cumsum(filled))
            columns = view.index.ravel()  # places go upwards, so rows are in order
            matrix = csr(np.ones(place.size), columns, starts, self.steps[view.step].size)
            terms.append(Term(source=view.step, matrix=matrix))
        bias = constant.ravel().copy()
        for place in places:
            bias[place] = 0.0
        part = Affine(terms=tuple(terms), bias=bias, bias_error=np.zeros(bias.size))
        return self.affine([part], constant.shape)

    def elementwise(self, view: View, function: Function, slope: float = 0.0) -> View:
        """A nonlinear function of each element."""
        view = self.whole(view)
        self.steps.append(
            Elementwise(function=function, source=view.step, size=view.index.size, slope=slope)
        )
        return self._last(view.shape)

    def affine(self, parts: Sequence[Affine], shape: tuple[int, ...]) -> View:
        """A new step: the sum of the parts."""
        total = parts[0]
        for part in parts[1:]:
            total = _shift(
                replace(total, terms=total.terms + part.terms), part.bias, part.bias_error
            )
        for values in (total.bias, total.bias_error):
            if not np.isfinite(values).all():
                raise EngineError("a bias of the network is not finite", expected="finite numbers")
        self.steps.append(total)
        return self._last(shape)

    def _last(self, shape: tuple[int, ...]) -> View:
        size = self.steps[-1].size
        return View(step=len(self.steps) - 1, index=np.arange(size, dtype=np.int64).reshape(shape))

    def _rows(self, view: View) -> Affine:
        """The flat elements of a view as an affine function of earlier steps."""
        flat, step = view.index.ravel(), self.steps[view.step]
        if isinstance(step, Affine) and not view.shared and len(flat) <= step.size:
            if len(flat) == step.size and np.array_equal(flat, np.arange(step.size)):
                return step
            terms = tuple(replace(term, matrix=term.matrix[flat]) for term in step.terms)
            return Affine(terms=terms, bias=step.bias[flat], bias_error=step.bias_error[flat])
        terms = (Term(source=view.step, matrix=selection(flat, step.size)),)
        return Affine(terms=terms, bias=np.zeros(len(flat)), bias_error=np.zeros(len(flat)))


def _scale(part: Affine, scale: Numbers, relative: float) -> Affine:
    """Rows times a scale that is `relative` off.

    Each entry is rounded once, so its relative error is the sum of both errors and 2^-53,
    plus products of these that SLACK covers; the bias is treated in the same way.
    """
    if np.all(scale == 1.0) and not relative:
        return part
    rounded = 0.0 if np.all(np.abs(scale) == 1.0) else 2.0**-53
    terms = tuple(
        Term(
            source=term.source,
            matrix=_scale_rows(term.matrix, scale),
            relative=(term.relative + relative + rounded) * SLACK,
        )
        for term in part.terms
    )
    bias = part.bias * scale
    _refuse_underflow(part.bias, scale, bias)
    error = part.bias_error * np.abs(scale) + np.abs(bias) * (relative + rounded)
    error += part.bias_error * np.abs(scale) * relative
    return Affine(terms=terms, bias=bias, bias_error=error * SLACK)


def _shift(part: Affine, shift: Numbers, shift_error: Numbers) -> Affine:
    """Rows plus a shift; the sum is rounded to nearest unless one of the two is 0."""
    bias = part.bias + shift
    inexact = (part.bias != 0) & (shift != 0)
    error = (part.bias_error + shift_error + np.where(inexact, 2.0**-53 * np.abs(bias), 0.0)) * (
        SLACK
    )
    return replace(part, bias=bias, bias_error=error)


def _scale_rows(matrix: Matrix, scale: Numbers) -> Matrix:
    if isinstance(matrix, np.ndarray):
        result = np.asarray(matrix * scale[:, None], np.float64)
        _refuse_underflow(matrix, scale[:, None], result)
        return result
    per_entry = np.repeat(scale, np.diff(matrix.indptr))
    data = matrix.data * per_entry
    _refuse_underflow(matrix.data, per_entry, data)
    return csr(data, matrix.indices, matrix.indptr, matrix.shape[1])


def _refuse_underflow(a: Numbers, b: Numbers, product: Numbers) -> None:
    size = np.abs(product)
    if not np.all(((size >= SMALLEST) & (size < np.inf)) | (a == 0) | (b == 0)):
        raise EngineError(
            "a product of weights is too small for its rounding error to be bounded, or not finite",
            expected=f"at least {SMALLEST:g} or exactly 0",
        )

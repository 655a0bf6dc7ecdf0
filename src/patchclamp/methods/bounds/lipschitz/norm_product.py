"""Bounds from operator norms: the product over layers, and the sharper recursion.

The product takes every layer at its worst by itself. The recursion writes each
activation as its centre plus a part that is no longer than its input (ReLU: half the
identity plus half of something of length at most the input's), so that products of
neighbouring weights are merged before norms are taken.

Norms: "l2" is Euclidean to Euclidean; "linf" is largest element to largest element.
Both bounds hold over the reals for the weights as stored.

Source: Szegedy et al. 2014 (product); Combettes & Pesquet 2020, theorem 4.2 (recursion).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.methods.bounds.lipschitz.layers import (
    Activation,
    Chain,
    Elementwise,
    Householder,
    Layer,
    Linear,
    Residual,
)
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import (
    QuadraticForm,
    Ranges,
    quadratic_form,
)
from patchclamp.methods.bounds.lipschitz.rounding import (
    UNIT,
    Rounded,
    spectral_norm,
)

_UP = 1 + 2.0**-40
"""Rounds short sums and products of norms upward."""


class Norm(StrEnum):
    """How lengths of inputs and outputs are measured."""

    L2 = "l2"
    LINF = "linf"


def norm_product(chain: Chain, norm: Norm, ranges: Ranges | None = None) -> float:
    """Product of the layers' operator norms; a residual counts the sum of its branches.

    Args:
        ranges: bounds of the activations' inputs, where the bound need only hold there.

    Cost: one singular value decomposition and a Cholesky factorisation a layer.
    """
    known = iter([None] * len(chain.activations) if ranges is None else ranges)
    return _product(chain.layers, norm, known)


def _product(
    layers: Sequence[Layer], norm: Norm, ranges: Iterator[tuple[Tensor, Tensor] | None]
) -> float:
    total = 1.0
    for layer in layers:
        match layer:
            case Linear(weight=weight):
                total *= matrix_norm(Rounded(weight), norm)
            case Residual(body=body, skip=skip):
                first = _product(skip, norm, ranges)
                total *= first + _product(body, norm, ranges)
            case _:
                total *= _steepest(layer, norm, next(ranges))
        total *= _UP
    return total


def _steepest(activation: Activation, norm: Norm, bounds: tuple[Tensor, Tensor] | None) -> float:
    """The activation's own Lipschitz constant, or more. Sorting is 1 in both norms."""
    if isinstance(activation, Elementwise):
        least, most = (torch.tensor([s]) for s in activation.slopes)
        if bounds is not None and activation.slopes_on is not None:
            least, most = activation.slopes_on(*bounds)
        return float(torch.maximum(least.abs(), most.abs()).max())
    if isinstance(activation, Householder) and norm is Norm.LINF:
        v = activation.directions.to("cpu", torch.float64)
        mirror = -2 * v[:, :, None] * v[:, None] / v.square().sum(1)[:, None, None]
        mirror.diagonal(dim1=1, dim2=2).add_(1)
        rounding = 1 + (v.shape[1] + 8) * UNIT * 4
        return max(1.0, float(mirror.abs().sum(2).max()) * rounding)
    return 1.0


def _up(num_terms: int) -> float:
    """Rounds a sum of so many nonnegative terms upward."""
    return 1 + (num_terms + 8) * UNIT


def matrix_norm(matrix: Rounded, norm: Norm) -> float:
    """A proved upper bound of the operator norm."""
    if norm is Norm.L2:
        return spectral_norm(matrix)
    return float(matrix.largest.sum(1).max()) * _up(matrix.value.shape[1])


def recursive_bound(chain: Chain, norm: Norm, ranges: Ranges | None = None) -> float:
    """The bound with merged products, or the plain product where that is smaller.

    It is smaller only with GroupSort or Householder, whose kept part is no multiple of the
    identity, so that the recursion adds lengths of parts at right angles.

    Cost: one spectral norm for every pair of activations ("l2").
    """
    form = quadratic_form(chain, ranges, centred=True)
    if norm is Norm.LINF:
        return min(_elementwise_recursion(form), norm_product(chain, norm, ranges))
    spans = form.spans()
    lengths = [1.0]
    for number, own in enumerate(spans[1:], start=1):
        rows = form.probes[own.start - form.num_inputs : own.stop - form.num_inputs]
        lengths.append(_merged(rows, spans[:number], lengths))
    merged = _merged(form.output, spans, lengths)
    return min(merged, norm_product(chain, norm, ranges))


def _merged(rows: Rounded, spans: Sequence[slice], lengths: Sequence[float]) -> float:
    """Length of a linear map of parts of known length."""
    total = 0.0
    for span, length in zip(spans, lengths, strict=True):
        total += spectral_norm(rows[:, span]) * length
    return total * _UP


def _elementwise_recursion(form: QuadraticForm) -> float:
    """The recursion element by element, for inputs that differ by at most 1 in each element."""
    sizes, up = torch.zeros(form.num_variables, dtype=torch.float64), _up(form.num_variables)
    sizes[: form.num_inputs] = 1
    for own in form.spans()[1:]:
        rows = slice(own.start - form.num_inputs, own.stop - form.num_inputs)
        probed = form.probes[rows].largest @ sizes * up
        group = form.group[rows]
        if len(group):
            squares = torch.zeros(form.num_groups, dtype=torch.float64)
            squares.index_add_(0, group, probed.square())
            sizes[own] = squares[group].sqrt() * up
    return float((form.output.largest @ sizes).max()) * up

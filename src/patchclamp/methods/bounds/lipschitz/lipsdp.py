"""LipSDP: the smallest Lipschitz bound that the activations' quadratic constraints give.

A semidefinite program looks for multipliers (quadratic_constraints.py has the inequality);
its answer is only a hint. `certified` takes the multipliers, puts them into their cone and
computes the smallest bound for which the matrix inequality is *proved* in float64, with
room for every rounding error. What a solver claims is kept beside it and never used.

A solver's multipliers may miss feasibility by its tolerance. They are mixed with a small
share of multipliers that are strictly feasible by construction, and the share that
gives the smallest proved bound is taken.

"l2": one program. "linf" (largest input element to largest output element): one for every
output, with a free weight on every input; |y| <= L |x|_inf follows from
y^2 <= sum_i d_i x_i^2 with sum_i d_i = L^2.

Source: Fazlyab et al. 2019 (LipSDP-Neuron, -Layer); Pauli et al. 2024, arXiv 2401.14033;
Wang et al. 2022 ("linf").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz.norm_product import Norm
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import QuadraticForm
from patchclamp.methods.bounds.lipschitz.rounding import UNIT, Rounded, is_positive_definite

_SHARES = (0.0, *(d * 10.0**-k for k in range(9, 0, -1) for d in (1, 2, 5)), 1.0)
"""Shares of the strictly feasible multipliers that are tried."""
_UP = 1 + 2.0**-40


@dataclass(frozen=True, kw_only=True, eq=False)
class Multipliers:
    """A solver's answer, in the form's own units.

    Attributes:
        groups: one for each constraint, (group,).
        inputs: weights of the inputs' squares, (num_inputs,); all alike for "l2".
        claim: the Lipschitz bound that the solver believes in.
        status: its own word for how it ended.
        well_scaled: the program's numbers were of a size that the solver handles well.
    """

    groups: Tensor
    inputs: Tensor
    claim: float
    status: str
    well_scaled: bool


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A bound that was proved.

    Attributes:
        bound: the Lipschitz bound; infinite where nothing was proved.
        share: of the strictly feasible multipliers that went in; 1.0 means that those given
            were of no use.
    """

    bound: float
    share: float


def certified(form: QuadraticForm, norm: Norm, multipliers: Multipliers) -> Certified:
    """The smallest bound that these multipliers prove; they may be any numbers.

    The bound holds over the reals, for the weights as stored.
    Cost: an eigenvalue decomposition of the inputs for each of some shares, and Cholesky
        factorisations of all variables.

    Raises:
        InputError: multipliers of another number than the form's constraints and inputs.
    """
    sizes = len(multipliers.groups), len(multipliers.inputs)
    if sizes != (form.num_groups, form.num_inputs):
        raise InputError(
            f"{sizes[0]} multipliers and {sizes[1]} input weights",
            expected=f"{form.num_groups} and {form.num_inputs}",
        )
    if not bool(form.output.largest.any()):
        return Certified(bound=0.0, share=0.0)
    groups, inputs = _in_cone(multipliers.groups), _in_cone(multipliers.inputs)
    if norm is Norm.L2 or not bool(inputs.any()):
        inputs = torch.ones_like(inputs)
    inputs = (inputs / inputs.max()).clamp(min=1e-9)
    # |x|_inf <= 1 allows sum_i d_i x_i^2 as much as sum_i d_i; |x|_2 <= 1 allows 1 when d is 1.
    total = 1.0 if norm is Norm.L2 else math.fsum(inputs.tolist()) * _UP
    sound = strictly_feasible(form)
    small = without_idle_inputs(form) if norm is Norm.L2 else form
    weights = inputs[: small.num_inputs]
    parts = [matrix(small, m).value for m in (groups, sound)]
    estimates = sorted(
        (_estimate((1 - share) * parts[0] + share * parts[1], weights), share) for share in _SHARES
    )
    best = Certified(bound=math.inf, share=1.0)
    for estimate, share in estimates:
        if not estimate * total < best.bound**2:
            break
        proved = _proved(form, (1 - share) * groups + share * sound, inputs, estimate)
        bound = math.sqrt(proved * total) * _UP
        if bound < best.bound:
            best = Certified(bound=bound, share=share)
    return best


def _in_cone(multipliers: Tensor) -> Tensor:
    """Negative and undefined multipliers become zero, which proves less but nothing wrong."""
    return multipliers.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)


def matrix(form: QuadraticForm, groups: Tensor) -> Rounded:
    """The matrix of the inequality without its inputs' term; (variable, variable)."""
    start, size = form.num_inputs, form.num_variables
    own = groups[form.group]
    total = form.output.transposed().negated() @ form.output
    if not len(own):
        return total
    squares = torch.zeros(size, size, dtype=torch.float64)
    squares.diagonal()[start:] = own
    total = total + Rounded(squares)
    if bool(form.cross.largest.any()):
        rows = form.probes.rows_times(_times(form.cross, -own / 2))
        value, error = torch.zeros_like(squares), torch.zeros_like(squares)
        value[start:], error[start:] = rows.value, rows.slack
        total = total + Rounded(value + value.T, error + error.T)
    if bool(form.square.largest.any()):
        total = total + form.probes.transposed() @ form.probes.rows_times(_times(form.square, -own))
    return total


def _times(x: Rounded, factor: Tensor) -> Rounded:
    value = x.value * factor
    return Rounded(value, (UNIT * value.abs() + x.slack * factor.abs()) * _UP)


def _estimate(form_matrix: Tensor, weights: Tensor) -> float:
    """The smallest rho that makes the matrix semidefinite, up to rounding; inf for none."""
    num = len(weights)
    inner, factor = form_matrix[num:, num:], form_matrix[num:, :num]
    lower, info = torch.linalg.cholesky_ex(inner)
    if int(info):
        return math.inf
    half = torch.linalg.solve_triangular(lower, factor, upper=False)
    scale = weights.rsqrt()
    schur = scale[:, None] * (half.T @ half - form_matrix[:num, :num]) * scale
    if not bool(torch.isfinite(schur).all()):
        return math.inf
    return max(float(torch.linalg.eigvalsh(schur)[-1]), 0.0)


def _proved(form: QuadraticForm, groups: Tensor, inputs: Tensor, estimate: float) -> float:
    """The smallest rho, from the estimate upward, for which the inequality is proved."""
    fixed = matrix(form, groups)
    num = form.num_inputs
    for digits in range(13, -1, -1):
        rho = estimate * (1 + 10.0**-digits)
        value, error = torch.zeros_like(fixed.value), torch.zeros_like(fixed.value)
        value.diagonal()[:num] = rho * inputs
        error.diagonal()[:num] = UNIT * rho * inputs
        if is_positive_definite(fixed + Rounded(value, error)):
            return rho
    return math.inf


def strictly_feasible(form: QuadraticForm) -> Tensor:
    """Multipliers that satisfy the inequality with room for some bound; (group,).

    From the last activation backwards, each outweighs all that its variables feed. In a plain
    chain the bound is close to the norm product.
    """
    spans = form.spans()
    reach = _squares(form.output.value, spans)
    needs = max(max(reach), 1e-200)
    result = torch.zeros(form.num_groups, dtype=torch.float64)
    for number in range(len(spans) - 1, 0, -1):
        rows = slice(spans[number].start - form.num_inputs, spans[number].stop - form.num_inputs)
        if rows.start == rows.stop:
            continue
        multiplier = 2.002 * reach[number] + 1e-9 * needs
        result[form.group[rows]] = multiplier
        # cross v . w is at most |w|^2 / 2 + cross^2 |v|^2 / 2: half of |w|^2 is left.
        curve = form.cross.value[rows].square() / 2 + form.square.value[rows]
        weight = multiplier * max(float(curve.max()), 0.0)
        for earlier, square in enumerate(_squares(form.probes.value[rows], spans[:number])):
            reach[earlier] += weight * square
    return result


def _squares(rows: Tensor, spans: Sequence[slice]) -> list[float]:
    """Numbers s with |rows z|^2 <= sum_i s_i |z_i|^2 for the parts z_i of z."""
    parts = [rows[:, span] for span in spans]
    lengths = [float(torch.linalg.matrix_norm(p, 2)) if p.numel() else 0.0 for p in parts]
    return [length**2 * sum(1 for other in lengths if other) for length in lengths]


def without_idle_inputs(form: QuadraticForm) -> QuadraticForm:
    """The form on the inputs' directions that something reads; for estimates, "l2" only."""
    num = form.num_inputs
    read = torch.cat([form.probes.value[:, :num], form.output.value[:, :num]])
    read = read[read.any(1)]
    if len(read) >= num or not len(read):
        return form
    basis = torch.linalg.qr(read.T).Q

    def turned(rows: Tensor) -> Rounded:
        return Rounded(torch.cat([rows[:, :num] @ basis, rows[:, num:]], 1))

    return replace(
        form,
        num_inputs=basis.shape[1],
        probes=turned(form.probes.value),
        output=turned(form.output.value),
    )

"""The semidefinite program of LipSDP, as handed to a solver through cvxpy.

Nothing that comes out of here is believed: lipsdp.py proves a bound from the multipliers.
The program is scaled first, so that every variable is about as large as it can get for an
input of length 1 and the bound is at most 1; solvers stop at absolute tolerances.

Source: Fazlyab et al. 2019; O'Donoghue et al. 2016 (SCS); Goulart & Chen 2024 (Clarabel).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp.core.errors import (
    EngineError,
    InputError,
    MissingExtraError,
    OptionError,
    nearest,
)
from patchclamp.methods.bounds.lipschitz.lipsdp import Multipliers, without_idle_inputs
from patchclamp.methods.bounds.lipschitz.norm_product import Norm
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import QuadraticForm

_MARGIN = 10
"""The program asks for this many tolerances more than semidefiniteness, so that an answer
within tolerance still has it. Costs some hundredths of a per cent, saves far more in proof."""
_WELL_SCALED = 0.1


class Solver(StrEnum):
    """Which solver looks for multipliers; cvxpy brings both."""

    SCS = "scs"
    CLARABEL = "clarabel"


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """How hard a solver tries. None of it touches soundness.

    Attributes:
        solver: SCS is a first-order method, quick and of low accuracy; Clarabel an interior-
            point method, accurate and slow beyond some tens of neurons.
        tolerance: where SCS stops, absolute and relative, on the scaled program.
        max_iterations: of SCS, in each round.
        num_rounds: how often the program may be solved, scaled anew by the last answer. One is
            enough unless the norm product is ten times too large (deep, wide-ranging chains).
        time_limit_s: wall time that the solver may take, in each round.
        memory_limit_gb: programs that are estimated to need more are refused beforehand.
    """

    solver: Solver = Solver.SCS
    tolerance: float = 1e-5
    max_iterations: int = 2_000
    num_rounds: int = 3
    time_limit_s: float = 600.0
    memory_limit_gb: float = 8.0

    def __post_init__(self) -> None:
        names = [str(x) for x in Solver]
        if str(self.solver) not in names:
            raise OptionError(
                f"no solver '{self.solver}'",
                expected=" or ".join(names),
                nearest=nearest(str(self.solver), names),
            )
        object.__setattr__(self, "solver", Solver(self.solver))
        for name in (
            "tolerance",
            "max_iterations",
            "num_rounds",
            "time_limit_s",
            "memory_limit_gb",
        ):
            if not getattr(self, name) > 0:
                raise OptionError(
                    f"{name} is {getattr(self, name)}", expected="a number above zero"
                )


def solve(
    form: QuadraticForm,
    norm: Norm,
    options: SolverOptions,
    *,
    layers: bool,
    before: Multipliers | None = None,
) -> Multipliers:
    """Ask a solver for multipliers.

    Args:
        layers: one multiplier for each activation (LipSDP-Layer) instead of one for each
            group (LipSDP-Neuron). Looser; it saves variables, but the matrix inequality, which
            costs most, stays as large.
        before: an earlier answer, to scale the program by.

    Cost: SCS, an eigenvalue decomposition of (variable, variable) an iteration; Clarabel, the
        factorisation of a dense matrix of about variables^2 / 2 rows an iteration.

    Raises:
        MissingExtraError: cvxpy is not installed.
        EngineError: the program would not fit into memory, or the solver gave no numbers.
        InputError: "linf" of more than one output.
    """
    if norm is Norm.LINF and form.output.value.shape[0] != 1:
        raise InputError("'linf' is solved for one output at a time")
    if not form.num_groups or not bool(form.output.value.any()):
        return _without_constraints(form, norm)
    small = without_idle_inputs(form) if norm is Norm.L2 else form
    _check_memory(small, options.memory_limit_gb)
    lengths = (
        _lengths(small) if before is None or not before.claim else _lengths_from(small, before)
    )
    margin = _MARGIN * (options.tolerance if options.solver is Solver.SCS else 1e-8)
    problem, answer = _program(small, norm, lengths, margin, layers=layers)
    status = _run(problem, options)
    values = None if answer.value is None else torch.from_numpy(np.array(answer.value, float))
    if values is None or not bool(torch.isfinite(values).all()):
        raise EngineError(
            f"{options.solver.value} gave no multipliers; it says '{status}'",
            hint="allow more max_iterations or time_limit_s, or try the other solver",
        )
    num_weights = 1 if norm is Norm.L2 else form.num_inputs
    weights, found = values[:num_weights], values[num_weights:]
    groups = (found[_block_of_group(small)] if layers else found) * lengths[-1] ** 2
    size = math.sqrt(max(float(weights.sum()), 0.0))
    return Multipliers(
        groups=groups / lengths[1:-1][_block_of_group(small)] ** 2,
        inputs=weights.expand(form.num_inputs).clone() * lengths[-1] ** 2,
        claim=size * float(lengths[-1]),
        status=status,
        well_scaled=size > _WELL_SCALED,
    )


def _without_constraints(form: QuadraticForm, norm: Norm) -> Multipliers:
    """A linear chain, or a constant one: the answer is known."""
    rows = form.output.value[:, : form.num_inputs]
    if norm is Norm.L2:
        weights, claim = torch.ones(form.num_inputs, dtype=torch.float64), _spectral(rows)
    else:
        weights, claim = rows[0].abs(), float(rows.abs().sum())
    groups = torch.zeros(form.num_groups, dtype=torch.float64)
    return Multipliers(
        groups=groups, inputs=weights, claim=claim, status="closed form", well_scaled=True
    )


def _spectral(rows: Tensor) -> float:
    return float(torch.linalg.matrix_norm(rows, 2)) if rows.numel() else 0.0


def _lengths(form: QuadraticForm) -> Tensor:
    """About how long the input (1), each activation's variables and the output get."""
    spans = form.spans()
    lengths = [1.0]
    for number, own in enumerate(spans[1:], start=1):
        rows = slice(own.start - form.num_inputs, own.stop - form.num_inputs)
        probed = sum(
            _spectral(form.probes.value[rows, span]) * length
            for span, length in zip(spans[:number], lengths, strict=True)
        )
        lengths.append(probed or 1.0)
    made = sum(
        _spectral(form.output.value[:, span]) * length
        for span, length in zip(spans, lengths, strict=True)
    )
    return torch.tensor([*lengths, made or 1.0], dtype=torch.float64)


def _lengths_from(form: QuadraticForm, before: Multipliers) -> Tensor:
    """Lengths for which multipliers like those before come out near 1."""
    block = _block_of_group(form)
    lengths = [1.0]
    for number in range(len(form.blocks)):
        own = before.groups[block == number].clamp(min=0)
        middle = float(own.square().mean().sqrt()) if len(own) else 0.0
        lengths.append(before.claim / math.sqrt(middle) if middle else 1.0)
    return torch.tensor([*lengths, before.claim], dtype=torch.float64)


def _block_of_group(form: QuadraticForm) -> Tensor:
    """Which activation each group belongs to; (group,)."""
    block = _blocks(form)
    result = torch.zeros(form.num_groups, dtype=torch.long)
    result[form.group] = block
    return result


def _check_memory(form: QuadraticForm, limit_gb: float) -> None:
    read = form.probes.value.ne(0).sum(1).double()
    entries = 2 * read.sum() + read[form.square.value != 0].square().sum()
    # Measured at 300 to 1100 variables: an entry is held about eight times, with its place,
    # and as much as 75 dense matrices beside.
    needed = (float(entries) * 16 * 8 + form.num_variables**2 * 8 * 75) / 1e9
    if needed > limit_gb:
        raise EngineError(
            f"a program of {form.num_variables} variables and {form.num_groups} constraints needs "
            f"about {needed:.1f} GB",
            expected=f"at most {limit_gb} GB",
            hint="raise memory_limit_gb, or use Method.RECURSIVE",
        )


def _program(
    form: QuadraticForm, norm: Norm, lengths: Tensor, margin: float, *, layers: bool
) -> tuple[Any, Any]:
    """The cvxpy problem, and its variable: input weights, then multipliers.

    The matrix inequality is handed over as one sparse linear map from the variable to the
    matrix's elements, which is what the solver wants and spares cvxpy's own bookkeeping.
    """
    cvxpy, sparse = _optional("cvxpy"), _optional("scipy.sparse")
    size, num_inputs = form.num_variables, form.num_inputs
    scale = torch.ones(size, dtype=torch.float64)
    for span, length in zip(form.spans(), lengths[:-1], strict=True):
        scale[span] = length
    of_inputs = torch.arange(num_inputs)
    column = of_inputs * 0 if norm is Norm.L2 else of_inputs
    num_weights = int(column[-1]) + 1
    parts = [(of_inputs, of_inputs, column, torch.ones(num_inputs, dtype=torch.float64))]
    multiplier = _block_of_group(form)[form.group] if layers else form.group
    for rows, columns, number, values in _constraint_entries(form):
        scaled = values * (scale[rows] * scale[columns] / lengths[1:-1][_blocks(form)][number] ** 2)
        parts.append((rows, columns, num_weights + multiplier[number], scaled))
    entries = [torch.cat(x).numpy() for x in zip(*parts, strict=True)]
    place, count = entries[0] * size + entries[1], num_weights + int(multiplier.max()) + 1
    linear = sparse.csc_matrix((entries[3], (place, entries[2])), (size * size, count))
    output = (form.output.value * scale / lengths[-1]).numpy()
    answer = cvxpy.Variable(count, nonneg=True)
    left = cvxpy.reshape(linear @ answer, (size, size), order="C") - output.T @ output
    left = left - margin * np.eye(size)
    cost = np.zeros(count)
    cost[:num_weights] = 1
    return cvxpy.Problem(cvxpy.Minimize(cost @ answer), [left >> 0]), answer


def _blocks(form: QuadraticForm) -> Tensor:
    """Which activation each variable w belongs to; (w,)."""
    return torch.arange(len(form.blocks)).repeat_interleave(torch.tensor(form.blocks))


def _constraint_entries(form: QuadraticForm) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Elements of the constraints' matrices: row, column, which w they come from, value."""
    probes, num_inputs = form.probes.value, form.num_inputs
    own = torch.arange(len(probes))
    yield own + num_inputs, own + num_inputs, own, torch.ones(len(probes), dtype=torch.float64)
    number, column = (probes * (form.cross.value != 0)[:, None]).nonzero(as_tuple=True)
    values = -form.cross.value[number] / 2 * probes[number, column]
    yield number + num_inputs, column, number, values
    yield column, number + num_inputs, number, values
    for number in form.square.value.nonzero().flatten():
        read = probes[number].nonzero().flatten()
        rows, columns = torch.cartesian_prod(read, read).T if len(read) > 1 else (read, read)
        values = -form.square.value[number] * probes[number, rows] * probes[number, columns]
        yield rows, columns, number.expand(len(rows)), values


def _run(problem: Any, options: SolverOptions) -> str:
    """Solve, and return how it ended."""
    cvxpy = _optional("cvxpy")
    limits: dict[str, float] = {"time_limit": options.time_limit_s}
    if options.solver is Solver.SCS:
        limits = {
            "eps_abs": options.tolerance,
            "eps_rel": options.tolerance,
            "max_iters": options.max_iterations,
            "time_limit_secs": options.time_limit_s,
        }
    with warnings.catch_warnings():
        # "Solution may be inaccurate": the status says so, and the bound is proved anyway.
        warnings.simplefilter("ignore")
        try:
            problem.solve(solver=options.solver.value.upper(), **limits)
        except cvxpy.SolverError as error:
            raise EngineError(
                f"{options.solver.value} failed: {error}", hint="try the other solver"
            ) from error
    return str(problem.status)


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"LipSDP needs {name.partition('.')[0]}, which is not installed",
            hint="pip install 'patchclamp[bounds]'",
        ) from error

"""What is proved never depends on the solver being right."""

from __future__ import annotations

import sys

import pytest
import torch

from patchclamp.core.errors import EngineError, InputError, MissingExtraError, OptionError
from patchclamp.methods.bounds.lipschitz import (
    Chain,
    Linear,
    Lipschitz,
    Norm,
    Solver,
    SolverOptions,
    lipschitz,
    relu,
)
from patchclamp.methods.bounds.lipschitz.lipsdp import (
    Multipliers,
    certified,
    matrix,
    strictly_feasible,
)
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import QuadraticForm, quadratic_form
from patchclamp.methods.bounds.lipschitz.rounding import Rounded, is_positive_definite
from patchclamp.methods.bounds.lipschitz.search import Search, steepest
from patchclamp.methods.bounds.lipschitz.solver import solve

pytest.importorskip("cvxpy", reason="LipSDP is an optional extra")


@pytest.fixture(scope="module")
def chain() -> Chain:
    torch.manual_seed(5)
    weights = [torch.randn(b, a) / a**0.5 for a, b in ((4, 8), (8, 8), (8, 3))]
    return Chain((Linear(weights[0]), relu(), Linear(weights[1]), relu(), Linear(weights[2])), 4)


@pytest.fixture(scope="module")
def form(chain: Chain) -> QuadraticForm:
    return quadratic_form(chain)


@pytest.fixture(scope="module")
def answer(form: QuadraticForm) -> Multipliers:
    return solve(form, Norm.L2, SolverOptions(), layers=False)


def _given(form: QuadraticForm, groups: torch.Tensor) -> Multipliers:
    ones = torch.ones(form.num_inputs, dtype=torch.float64)
    return Multipliers(groups=groups, inputs=ones, claim=0.0, status="", well_scaled=True)


def test_the_answer_is_proved_nearly_as_claimed(form: QuadraticForm, answer: Multipliers) -> None:
    found = certified(form, Norm.L2, answer)
    assert found.bound == pytest.approx(answer.claim, rel=1e-3)
    assert found.share < 0.01


def test_no_multipliers_prove_less_than_the_steepest_place(
    chain: Chain, form: QuadraticForm, answer: Multipliers
) -> None:
    lower, _ = steepest(chain, Norm.L2, Search())
    for seed in range(12):
        torch.manual_seed(seed)
        noise = torch.randn(form.num_groups, dtype=torch.float64)
        groups = answer.groups * (1 + noise * 0.3 * seed)  # many of them negative
        assert certified(form, Norm.L2, _given(form, groups)).bound >= lower


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_useless_multipliers_give_a_loose_bound_and_say_so(
    form: QuadraticForm, answer: Multipliers, bad: float
) -> None:
    found = certified(form, Norm.L2, _given(form, torch.full_like(answer.groups, bad)))
    assert found.share == 1.0
    assert found.bound > 1.3 * answer.claim


def test_one_multiplier_short_is_caught(form: QuadraticForm, answer: Multipliers) -> None:
    proved = certified(form, Norm.L2, answer)
    groups = answer.groups.clone()
    groups[int(groups.argmax())] = 0  # its unit may now do anything
    ones = torch.ones(form.num_inputs, dtype=torch.float64)
    squares = torch.zeros(form.num_variables, form.num_variables, dtype=torch.float64)
    squares.diagonal()[: form.num_inputs] = (1000 * proved.bound) ** 2 * ones
    assert not is_positive_definite(matrix(form, groups) + Rounded(squares))
    assert certified(form, Norm.L2, _given(form, groups)).bound > proved.bound * 1.01


def test_a_claim_that_is_too_small_is_not_believed(
    chain: Chain, form: QuadraticForm, answer: Multipliers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie = Multipliers(
        groups=answer.groups / 2,
        inputs=answer.inputs,
        claim=0.1,
        status="optimal",
        well_scaled=True,
    )
    monkeypatch.setattr(lipschitz, "solve", lambda *_, **__: lie)
    found = Lipschitz().run(chain)
    assert found.upper >= found.lower > 0.5
    assert found.solver[0].slack > 0.4


def test_the_strictly_feasible_multipliers_are_feasible(form: QuadraticForm) -> None:
    found = certified(form, Norm.L2, _given(form, strictly_feasible(form)))
    assert torch.isfinite(torch.tensor(found.bound))


@pytest.mark.parametrize("norm", list(Norm))
def test_both_solvers_agree(form: QuadraticForm, norm: Norm) -> None:
    form = form.with_output(slice(0, 1))
    bounds = []
    for solver in Solver:
        hint = solve(form, norm, SolverOptions(solver=solver, tolerance=1e-7), layers=False)
        bounds.append(certified(form, norm, hint).bound)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)


def test_deep_chains_of_wide_ranging_weights_are_scaled_anew() -> None:
    torch.manual_seed(0)
    layers: list[Linear] = [Linear(torch.randn(4, 4) * 3) for _ in range(6)]
    chain = Chain((*(x for w in layers for x in (w, relu())), Linear(torch.randn(2, 4))), 4)
    once = Lipschitz(solver=SolverOptions(num_rounds=1)).run(chain)
    more = Lipschitz().run(chain)
    assert more.upper <= once.upper
    assert abs(more.solver[0].slack) < 0.05 * more.upper


def test_refusals(form: QuadraticForm, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"20 variables and 16 constraints needs about .* GB"):
        solve(form, Norm.L2, SolverOptions(memory_limit_gb=1e-6), layers=False)
    wide = Linear(torch.ones(50_000, 8))
    with pytest.raises(EngineError, match="100008 inputs and neurons together need about 1600"):
        Lipschitz().run(Chain((wide, relu(), relu()), 8))
    with pytest.raises(InputError, match="one output at a time"):
        solve(form, Norm.LINF, SolverOptions(), layers=False)
    with pytest.raises(InputError, match="3 multipliers and 4 input weights"):
        certified(form, Norm.L2, _given(form, torch.ones(3, dtype=torch.float64)))
    with pytest.raises(OptionError, match=r"no solver 'scip'.*nearest 'scs'"):
        SolverOptions(solver="scip")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tolerance is 0"):
        SolverOptions(tolerance=0)
    with pytest.raises(OptionError, match=r"no method 'lipsdb'.*nearest 'lipsdp'"):
        Lipschitz(method="lipsdb")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingExtraError, match=r"patchclamp\[bounds\]"):
        Lipschitz().run(chain)


def test_a_solver_that_is_stopped_at_once_costs_tightness_only(
    chain: Chain, answer: Multipliers
) -> None:
    stopped = Lipschitz(solver=SolverOptions(max_iterations=1, num_rounds=1)).run(chain)
    assert stopped.upper >= stopped.lower
    assert stopped.solver[0].status != "optimal"
    assert stopped.upper > answer.claim * 1.01

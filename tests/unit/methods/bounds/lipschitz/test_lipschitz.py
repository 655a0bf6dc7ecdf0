"""The method: ordered bounds, on boxes too, for every activation and norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz import (
    Activation,
    Chain,
    GroupSort,
    Householder,
    Linear,
    Lipschitz,
    Method,
    Norm,
    Residual,
    Search,
    SolverOptions,
    leaky_relu,
    max_min,
    relu,
    tanh,
)

pytest.importorskip("cvxpy", reason="LipSDP is an optional extra")

QUICK = Search(num_samples=32, num_rounds=2, num_kept=4)
ROUGH = SolverOptions(tolerance=1e-4)
ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "relu": relu,
    "leaky_relu": lambda: leaky_relu(0.1),
    "tanh": tanh,
    "max_min": max_min,
    "sort_of_4": lambda: GroupSort(size=4),
    "householder": lambda: Householder(directions=torch.randn(4, 2)),
}


def _chain(activation: Callable[[], Activation]) -> Chain:
    block = Residual((Linear(torch.randn(8, 8) / 3, torch.randn(8)), activation()))
    first, last = Linear(torch.randn(8, 4) / 2, torch.randn(8)), Linear(torch.randn(1, 8) / 3)
    return Chain((first, activation(), block, last), 4)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bounds_are_ordered_and_shrink_with_the_box(name: str, norm: Norm) -> None:
    chain = _chain(ACTIVATIONS[name])
    upper = {}
    for method in Method:
        found = Lipschitz(norm=norm, method=method, search=QUICK, solver=ROUGH).run(chain)
        assert 0 < found.lower <= found.upper
        assert not found.local
        upper[method] = found.upper
    assert upper[Method.LIPSDP] <= upper[Method.LIPSDP_LAYER] * 1.01
    assert upper[Method.RECURSIVE] <= upper[Method.NORM_PRODUCT]
    if norm is Norm.L2:
        assert upper[Method.LIPSDP_LAYER] <= upper[Method.RECURSIVE] * 1.01
    middle, before = torch.zeros(4), upper[Method.LIPSDP] * 1.01
    for radius in (1.0, 0.05):
        box = middle - radius, middle + radius
        local = Lipschitz(norm=norm, search=QUICK, solver=ROUGH).run(chain, box=box)
        assert local.local
        assert local.lower <= local.upper <= before
        before = local.upper * 1.01


def test_a_point_has_the_norm_of_its_gradient() -> None:
    chain = _chain(relu)
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.func.jacrev(chain)(x)
    for norm, exact in (
        (Norm.L2, torch.linalg.matrix_norm(jacobian, 2)),
        (Norm.LINF, jacobian.abs().sum(1).max()),
    ):
        found = Lipschitz(norm=norm).run(chain, box=(x, x))
        assert found.upper == pytest.approx(float(exact), rel=1e-9)
        assert found.lower == pytest.approx(float(exact), rel=1e-8)


def test_given_ranges_are_used() -> None:
    chain = Chain((Linear(torch.eye(2)), relu(), Linear(torch.ones(1, 2))), 2)
    half_off = [(torch.tensor([-2.0, -1.0]).double(), torch.tensor([-1.0, 1.0]).double())]
    found = Lipschitz().run(chain, ranges=half_off)
    assert found.upper == pytest.approx(1, abs=1e-3)
    assert found.local
    assert Lipschitz().run(chain).upper == pytest.approx(2**0.5, abs=1e-3)


def test_a_constant_chain_has_bound_zero() -> None:
    chain = Chain((Linear(torch.ones(3, 2)), relu(), Linear(torch.zeros(1, 3))), 2)
    for method in Method:
        found = Lipschitz(method=method).run(chain)
        assert (found.lower, found.upper) == (0, pytest.approx(0, abs=1e-12))


def test_samples_help_the_search_and_stay_in_the_box() -> None:
    # Steep only above 100 in the first input.
    weight, bias = torch.tensor([[1.0, 0.0]]), torch.tensor([-100.0])
    chain = Chain((Linear(weight, bias), relu()), 2)
    there = torch.tensor([[101.0, 0.0]])
    method = Lipschitz(method=Method.NORM_PRODUCT, search=QUICK)
    assert method.run(chain).lower == 0
    assert method.run(chain, samples=there).lower == pytest.approx(1)
    box = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    assert method.run(chain, box=box, samples=there).lower == 0
    with pytest.raises(InputError, match="samples of 3 elements"):
        method.run(chain, samples=torch.zeros(1, 3))


def test_the_search_repeats_and_leaves_the_random_state() -> None:
    chain = _chain(tanh)
    state = torch.get_rng_state()
    method = Lipschitz(method=Method.RECURSIVE, search=QUICK)
    assert method.run(chain) == method.run(chain)
    assert torch.equal(state, torch.get_rng_state())

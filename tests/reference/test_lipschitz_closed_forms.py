"""Lipschitz constants that are known exactly: linear, MaxMin and small ReLU networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from patchclamp.methods.bounds.lipschitz import (
    Chain,
    GroupSort,
    Householder,
    Linear,
    Lipschitz,
    Method,
    Norm,
    Residual,
    SolverOptions,
    max_min,
    relu,
)

pytest.importorskip("cvxpy", reason="LipSDP is an optional extra")


@pytest.mark.parametrize("method", list(Method))
def test_a_linear_network_has_the_norm_of_its_matrix(method: Method) -> None:
    weight = torch.randn(3, 5, dtype=torch.float64)
    chain = Chain((Linear(weight),), 5)
    exact = {
        Norm.L2: float(torch.linalg.svdvals(weight)[0]),
        Norm.LINF: float(weight.abs().sum(1).max()),
    }
    for norm, value in exact.items():
        found = Lipschitz(norm=norm, method=method).run(chain)
        assert value * (1 - 1e-14) <= found.upper <= value * (1 + 1e-10)
        assert found.lower == pytest.approx(value, rel=1e-8)


def _directions(weights: list[Tensor]) -> list[float]:
    """Angles where a unit of a ReLU network without biases, of two inputs, changes sides.

    Sector by sector: within a sector, units further on are linear in the direction.
    """
    ends = [0.0, 2 * math.pi]
    for depth in range(1, len(weights)):
        found = set(ends)
        for low, high in itertools.pairwise(ends):
            rows = _matrix(weights[:depth], (low + high) / 2)
            for a, b in rows.tolist():
                root = math.atan2(-a, b) % math.pi
                found.update(t for t in (root, root + math.pi) if low < t < high)
        ends = sorted(found)
    return ends


def _matrix(weights: list[Tensor], angle: float) -> Tensor:
    """The network's matrix in the direction; ReLU between the weights."""
    direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    made = weights[0]
    for weight in weights[1:]:
        made = weight @ (made * (made @ direction > 0).double()[:, None])
    return made


def _exact(weights: list[Tensor]) -> float:
    ends = _directions(weights)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    return max(float(torch.linalg.matrix_norm(_matrix(weights, t), 2)) for t in middles)


@pytest.mark.parametrize("widths", [(2, 5, 1), (2, 6, 3), (2, 5, 4, 2)])
def test_small_relu_networks_by_all_their_activation_patterns(widths: tuple[int, ...]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = list(itertools.pairwise(widths))
        weights = [torch.randn(b, a, dtype=torch.float64) for a, b in sizes]
        layers = [x for w in weights[:-1] for x in (Linear(w), relu())]
        found = Lipschitz().run(Chain((*layers, Linear(weights[-1])), 2))
        exact = _exact(weights)
        assert found.lower <= exact <= found.upper
        assert found.lower == pytest.approx(exact, rel=1e-6)
        assert found.upper < 0.9 * math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in weights)


def test_the_absolute_value_of_pairs() -> None:
    # |x1| + |x2| by four ReLUs: the exact constant is sqrt 2; free slopes reach no more.
    first = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    chain = Chain((Linear(first), relu(), Linear(torch.ones(1, 4))), 2)
    found = Lipschitz(solver=SolverOptions(tolerance=1e-7)).run(chain)
    assert found.lower == pytest.approx(2**0.5, rel=1e-8)
    assert found.upper == pytest.approx(2**0.5, rel=1e-4)


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def _two_relus(pairs: int) -> Residual:
    """MaxMin as x2 + relu(x1 - x2) and x2 - relu(x2 - x1), pair by pair."""
    eye = torch.eye(pairs, dtype=torch.float64)
    skip = torch.kron(eye, torch.tensor([[0.0, 1], [0, 1]]).double())
    into = torch.kron(eye, torch.tensor([[1.0, -1], [-1, 1]]).double())
    out = torch.kron(eye, torch.tensor([[1.0, 0], [0, -1]]).double())
    return Residual((Linear(into), relu(), Linear(out)), (Linear(skip),))


def _one_relu(pairs: int) -> Residual:
    """MaxMin as x1 + relu(x2 - x1) and x2 - relu(x2 - x1), pair by pair."""
    eye = torch.eye(pairs, dtype=torch.float64)
    into = torch.kron(eye, torch.tensor([[-1.0, 1]]).double())
    return Residual((Linear(into), relu(), Linear(-into.T)))


def test_orthogonal_max_min_networks_have_constant_one() -> None:
    """The new constraints find it; LipSDP of the rewriting with two ReLUs a pair does not.

    With one ReLU a pair the rewriting says the same as the constraints, and finds it too.
    """
    solver = SolverOptions(tolerance=1e-6)
    weights = [Linear(_orthogonal(6)) for _ in range(3)]
    bounds = []
    for kind in (max_min(), _one_relu(3), _two_relus(3)):
        chain = Chain((weights[0], kind, weights[1], kind, weights[2]), 6)
        x = torch.randn(20, 6, dtype=torch.float64)
        plain = Chain((weights[0], max_min(), weights[1], max_min(), weights[2]), 6)
        assert torch.allclose(chain(x), plain(x))
        found = Lipschitz(solver=solver).run(chain)
        assert found.lower == pytest.approx(1, rel=1e-8)
        bounds.append(found.upper)
    assert 1 <= bounds[0] < 1.001
    assert 1 <= bounds[1] < 1.001
    assert bounds[2] > 1.3


def test_one_max_min_pair_by_two_relus_is_the_square_root_of_two() -> None:
    found = Lipschitz(solver=SolverOptions(tolerance=1e-7)).run(Chain((_two_relus(1),), 2))
    assert found.upper == pytest.approx(2**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "kind",
    [GroupSort(size=3), Householder(directions=torch.tensor([[1.0, 2.0], [0, 1], [3, -1]]))],
    ids=["group_sort", "householder"],
)
def test_other_lengths_preserving_activations(kind: GroupSort | Householder) -> None:
    layers = [x for _ in range(2) for x in (Linear(_orthogonal(6)), kind)]
    found = Lipschitz().run(Chain(tuple(layers), 6))
    assert found.lower == pytest.approx(1, rel=1e-8)
    assert 1 <= found.upper < 1.001

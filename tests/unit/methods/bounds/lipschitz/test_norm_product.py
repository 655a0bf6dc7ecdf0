"""Norm products against closed forms, and the recursion against the product."""

from __future__ import annotations

import pytest
import torch

from patchclamp.methods.bounds.lipschitz import (
    Chain,
    GroupSort,
    Householder,
    Linear,
    Norm,
    Residual,
    relu,
    sigmoid,
)
from patchclamp.methods.bounds.lipschitz.norm_product import norm_product, recursive_bound

A = torch.tensor([[3.0, 4.0], [0.0, 5.0]])


@pytest.mark.parametrize(("norm", "one"), [(Norm.L2, 45**0.5), (Norm.LINF, 7.0)])
def test_products_of_known_norms(norm: Norm, one: float) -> None:
    a = Linear(A)
    assert norm_product(Chain((a, relu(), a), 2), norm) == pytest.approx(one**2)
    assert norm_product(Chain((a, sigmoid(), a), 2), norm) == pytest.approx(one**2 / 4)
    assert norm_product(Chain((Residual((a, relu())),), 2), norm) == pytest.approx(1 + one)
    assert norm_product(Chain((a, GroupSort(size=2)), 2), norm) == pytest.approx(one)


def test_a_reflection_may_stretch_the_largest_element() -> None:
    # The reflection along (1, 1, 1) has rows (1/3, -2/3, -2/3).
    chain = Chain((Householder(directions=torch.ones(1, 3)),), 3)
    assert norm_product(chain, Norm.LINF) == pytest.approx(5 / 3)
    assert norm_product(chain, Norm.L2) == pytest.approx(1)


def test_the_recursion_of_two_layers() -> None:
    # Half of the merged product, and half of the product of norms.
    b = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    chain = Chain((Linear(A), relu(), Linear(b)), 2)
    merged = float(torch.linalg.matrix_norm(b @ A, 2))
    expected = merged / 2 + 2 * 45**0.5 / 2
    assert recursive_bound(chain, Norm.L2) == pytest.approx(expected)
    # Element by element: |B| |A| in every row, here 7 and 10.
    assert recursive_bound(chain, Norm.LINF) == pytest.approx(10)


@pytest.mark.parametrize("norm", list(Norm))
def test_the_recursion_is_never_above_the_product(norm: Norm) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        activation = [relu(), sigmoid(), GroupSort(size=4)][seed % 3]
        layers = [Linear(torch.randn(8, 8)) for _ in range(3)]
        block = Residual((layers[1], activation))
        chain = Chain((layers[0], activation, block, layers[2]), 8)
        assert recursive_bound(chain, norm) <= norm_product(chain, norm)


def test_ranges_make_a_switched_off_layer_vanish() -> None:
    chain = Chain((Linear(A), relu(), Linear(A)), 2)
    off = [(torch.full((2,), -2.0).double(), torch.full((2,), -1.0).double())]
    on = [(torch.full((2,), 1.0).double(), torch.full((2,), 2.0).double())]
    for norm in Norm:
        assert norm_product(chain, norm, off) == 0
        assert recursive_bound(chain, norm, off) < 1e-12
    exact = float(torch.linalg.matrix_norm(A @ A, 2))
    assert recursive_bound(chain, Norm.L2, on) == pytest.approx(exact)

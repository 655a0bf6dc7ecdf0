"""Error bounds against exact fractions; definiteness against matrices that just fail it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from patchclamp.methods.bounds.lipschitz.rounding import (
    Rounded,
    computed,
    frobenius,
    is_positive_definite,
    spectral_norm,
)


def _exact(x: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in x.tolist()]


def _covers(found: Rounded, exact: list[list[Fraction]]) -> bool:
    return all(
        abs(Fraction(v) - e) <= Fraction(s)
        for values, slacks, row in zip(
            found.value.tolist(), found.slack.tolist(), exact, strict=True
        )
        for v, s, e in zip(values, slacks, row, strict=True)
    )


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e12])
def test_products_and_sums_cover_the_exact_values(scale: float) -> None:
    a, b, c = (torch.randn(6, 6, dtype=torch.float64) * scale for _ in range(3))
    found = (Rounded(a) @ Rounded(b)) @ Rounded(c) - Rounded(a).transposed()
    A, B, C = _exact(a), _exact(b), _exact(c)
    n = range(6)
    AB = [[sum((A[i][k] * B[k][j] for k in n), Fraction(0)) for j in n] for i in n]
    exact = [[sum((AB[i][k] * C[k][j] for k in n), Fraction(0)) - A[j][i] for j in n] for i in n]
    assert _covers(found, exact)
    assert float((found.slack / (found.value.abs() + scale)).max()) < 1e-10 * max(1, scale**2)
    # The control: without its error bound the value itself is not exact.
    assert not _covers(Rounded(found.value), exact)


def test_row_factors_cover_the_exact_values() -> None:
    x, factor = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) / 3
    found = Rounded(x).rows_times(computed(factor, 1))
    exact = [
        [Fraction(v) * Fraction(f) for v in row]
        for row, f in zip(x.tolist(), factor.tolist(), strict=True)
    ]
    assert _covers(found, exact)


def _with_smallest(eigenvalue: float, size: int = 12) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.linspace(1, 2, size, dtype=torch.float64)
    values[0] = eigenvalue
    made = basis @ torch.diag(values) @ basis.T
    return (made + made.T) / 2


def test_definite_matrices_are_proved_and_indefinite_ones_are_not() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        assert is_positive_definite(Rounded(_with_smallest(1e-11)))
        assert not is_positive_definite(Rounded(_with_smallest(-1e-15)))
        assert not is_positive_definite(Rounded(_with_smallest(-1e-8)))


def test_a_matrix_that_may_be_indefinite_within_its_error_is_not_proved() -> None:
    x = _with_smallest(1e-6)
    assert is_positive_definite(Rounded(x))
    assert not is_positive_definite(Rounded(x, torch.full_like(x, 1e-6)))


def test_scales_far_apart_do_not_spoil_a_proof() -> None:
    scale = torch.logspace(-9, 9, 12, dtype=torch.float64)
    assert is_positive_definite(Rounded(_with_smallest(0.1) * scale[:, None] * scale))
    assert not is_positive_definite(Rounded(_with_smallest(-0.1) * scale[:, None] * scale))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_diagonal_is_not_proved(value: float) -> None:
    x = torch.eye(3, dtype=torch.float64)
    x[1, 1] = value
    assert not is_positive_definite(Rounded(x))


def test_spectral_norm_is_above_the_exact_one_and_close() -> None:
    # Of [[3, 4], [0, 5]] it is the square root of 45; of a scaled permutation its scale.
    found = spectral_norm(Rounded(torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)))
    assert Fraction(found) ** 2 >= 45
    assert found == pytest.approx(45**0.5, rel=1e-11)
    turned = torch.eye(5, dtype=torch.float64)[torch.randperm(5)] / 3
    assert turned.max() <= spectral_norm(Rounded(turned)) <= turned.max() * (1 + 1e-11)


def test_spectral_norm_counts_the_error() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    plain = spectral_norm(Rounded(x))
    assert spectral_norm(Rounded(x, torch.full_like(x, 0.1))) >= plain + 0.4
    assert plain <= frobenius(Rounded(x))
    assert spectral_norm(Rounded(torch.zeros(2, 2, dtype=torch.float64))) == 0

"""Closed forms against pencil and paper, against autograd, and against sums over fine steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.attribution.gradients.plain import Gradient, GradientTimesValue
from patchclamp.truth.attribution import Kind, OneLayer, Quantity, exact_network


@pytest.mark.parametrize("kind", [*Kind])
def test_expected_values_are_those_of_the_network(kind: Kind) -> None:
    exact = exact_network(kind)
    x, b, module = exact.inputs, exact.baseline, exact.net.module
    with torch.no_grad():
        assert torch.allclose(module(x)[:, 0], exact.scores, atol=1e-12)
        assert float(module(b[None])) == pytest.approx(exact.baseline_score, abs=1e-12)
    for method in (Gradient(), GradientTimesValue()):
        found = method.run(exact.net, x, 0).values
        assert torch.allclose(found, exact.expected[Quantity(method.name)], atol=1e-12)
    # a sum over fine steps of the path comes near the integral
    steps = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for row in range(3):
        path = (b + steps[:, None] * (x[row] - b)).requires_grad_()
        (slopes,) = torch.autograd.grad(module(path).sum(), path)
        summed = slopes.mean(0) * (x[row] - b)
        wanted = exact.expected[Quantity.INTEGRATED_GRADIENTS][row]
        assert torch.allclose(summed, wanted, atol=2e-3)
    for quantity in (Quantity.INTEGRATED_GRADIENTS, Quantity.DEEP_LIFT, Quantity.SHAPLEY):
        total = exact.expected[quantity].sum(1)
        assert torch.allclose(total, exact.scores - exact.baseline_score, atol=1e-12)


def test_gates_by_hand() -> None:
    both, either = exact_network("and"), exact_network("or")
    a, b = both.inputs.unbind(1)
    assert both.inputs[0].tolist() == [1.0, 1.0]
    assert torch.allclose(both.scores, (a + b - 1).clamp(min=0))
    path = (1 - 1 / (a + b)).clamp(min=0)  # the share of the path on which the unit is on
    for column, x in ((0, a), (1, b)):
        found = both.expected[Quantity.INTEGRATED_GRADIENTS][:, column]
        assert torch.allclose(found, x * path, atol=1e-12)
    assert both.expected[Quantity.SHAPLEY][0].tolist() == pytest.approx([0.5, 0.5])
    assert both.expected[Quantity.OCCLUSION][0].tolist() == pytest.approx([1.0, 1.0])
    assert both.expected[Quantity.GRADIENT][0].tolist() == [1.0, 1.0]
    assert torch.allclose(either.scores, (a + b).clamp(max=1))
    assert either.expected[Quantity.SHAPLEY][0].tolist() == pytest.approx([0.5, 0.5])
    assert either.expected[Quantity.OCCLUSION][0].tolist() == [0.0, 0.0]
    assert either.expected[Quantity.GRADIENT][0].tolist() == [0.0, 0.0]
    assert either.expected[Quantity.INTEGRATED_GRADIENTS][0].tolist() == pytest.approx([0.5, 0.5])


def test_additive_quantities_agree_and_others_do_not() -> None:
    names = (Quantity.INTEGRATED_GRADIENTS, Quantity.SHAPLEY, Quantity.OCCLUSION)
    for kind, agree in ((Kind.LINEAR, True), (Kind.ADDITIVE, True), (Kind.PIECEWISE, False)):
        expected = exact_network(kind).expected
        same = [
            torch.allclose(expected[p], expected[q], atol=1e-9)
            for p, q in itertools.combinations(names, 2)
        ]
        assert all(same) if agree else not any(same)


def test_shapley_values_are_means_over_all_orders() -> None:
    exact = exact_network(Kind.PIECEWISE, num=2, seed=5)
    x, b, module = exact.inputs, exact.baseline, exact.net.module
    total = torch.zeros_like(x)
    orders = list(itertools.permutations(range(x.shape[1])))

    def score(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(module(rows))[:, 0]

    for order in orders:
        at = b.expand_as(x).clone()
        for i in order:
            before = score(at)
            at[:, i] = x[:, i]
            total[:, i] += score(at) - before
    assert torch.allclose(total / len(orders), exact.expected[Quantity.SHAPLEY], atol=1e-10)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="nearest 'additive'"):
        exact_network("aditive")
    with pytest.raises(OptionError):
        exact_network("and", num=0)
    wide = OneLayer(weight=torch.ones(1, 20).double(), bias=torch.zeros(1), out=torch.ones(1))
    with pytest.raises(OptionError, match="20 features"):
        wide.shapley(torch.ones(1, 20).double(), torch.zeros(20))

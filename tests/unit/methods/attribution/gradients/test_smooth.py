"""SmoothGrad and its variants against the moments of a quadratic, and their draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods import scoring
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.methods.attribution.gradients.smooth import (
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from tests.networks import TwoLinear, opened

ALL = (SmoothGrad, SmoothGradSquared, VarGrad)


class Quadratic(nn.Module):
    """Score a . x^2: its gradient 2 a x is normal around itself under normal noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * x * x).sum(1, keepdim=True)


def test_the_moments_of_a_quadratic() -> None:
    module = Quadratic()
    x = torch.tensor([[0.0, 1.0, 2.0, -2.0]], dtype=torch.float64)
    net = patchclamp.open(module.eval(), x.repeat(2, 1))
    a, deviation, num = module.a.detach(), 0.2 * 4.0, 2500
    found = {m: m(noise=0.2, num_samples=num).run(net, x, 0).values for m in ALL}
    sd = 2 * a.abs() * deviation
    assert bool(((found[SmoothGrad] - 2 * a * x).abs() <= 4.5 * sd / num**0.5).all())
    torch.testing.assert_close(found[VarGrad][0], sd**2, rtol=0.1, atol=0)
    square = (2 * a * x)[0] ** 2 + sd**2
    torch.testing.assert_close(found[SmoothGradSquared][0], square, rtol=0.1, atol=0)


def test_the_three_belong_together() -> None:
    net, x = opened("digits_cnn")
    mean, square, variance = (m(num_samples=6).run(net, x, 2).values.double() for m in ALL)
    torch.testing.assert_close(variance, (square - mean**2) * 6 / 5, rtol=1e-3, atol=1e-6)


def test_a_linear_network_has_its_gradient_and_no_variance() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    net = patchclamp.open(TwoLinear().double().eval(), x)
    plain = Gradient().run(net, x, 1).values
    torch.testing.assert_close(SmoothGrad().run(net, x, 1).values, plain)
    torch.testing.assert_close(SmoothGradSquared().run(net, x, 1).values, plain**2)
    assert float(VarGrad().run(net, x, 1).values.abs().max()) < 1e-12


def test_the_same_map_in_any_batch_order_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_mlp")
    method = SmoothGrad(num_samples=5, seed=3)
    found = method.run(net, x, 1).values
    turned = method.run(net, x[[2, 0]], 1).values
    torch.testing.assert_close(turned, found[[2, 0]], rtol=1e-4, atol=1e-6)
    before = torch.get_rng_state()
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)
    torch.testing.assert_close(method.run(net, x, 1).values, found, rtol=1e-4, atol=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    other = SmoothGrad(num_samples=5, seed=4).run(net, x, 1).values
    assert not torch.allclose(other, found, rtol=1e-3)


def test_the_cost_is_the_number_of_samples() -> None:
    net, x = opened("digits_mlp")
    found = SmoothGrad(num_samples=7).run(net, x, 1)
    assert (found.passes.forwards, found.passes.backwards) == (21, 21)


def test_bad_options_and_a_constant_example_by_name() -> None:
    net, x = opened("digits_mlp")
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="noise"):
            SmoothGrad(noise=bad)
    with pytest.raises(OptionError, match="too few samples for vargrad"):
        VarGrad(num_samples=1)
    flat = x.clone()
    flat[1] = 0.5
    with pytest.raises(InputError, match="example 1 has the same value everywhere"):
        SmoothGrad().run(net, flat, 1)

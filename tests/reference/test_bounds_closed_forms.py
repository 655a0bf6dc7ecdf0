"""Bounds whose exact values are known: linear networks, one neuron, a fine grid."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.sets import Around, Ball, Box, HalfSpaces, Patches, PerturbedSet
from patchclamp.net import Net

METHODS = ["interval", "forward", "forward+crown", "crown", "alpha"]


@cache
def linear() -> tuple[Net, Tensor]:
    """One linear layer on images, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double().eval()
        x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    return patchclamp.open(module, x), x


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_a_linear_layer_reaches_its_dual_norm(norm: float) -> None:
    """w . x + b over a ball: at the centre, plus and minus r times the dual norm of w."""
    net, x = linear()
    weight = net.module[1].weight
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    reach = 0.3 * torch.linalg.vector_norm(weight, dual, dim=1)
    value = net.module(x)
    for method in ("crown", "forward"):
        found = net.bound(x, Around(0.3, norm), method=method)
        torch.testing.assert_close(found.tensors.lower, value - reach, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.tensors.upper, value + reach, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_with_one_pixel_changed() -> None:
    """The best pixel of each output, set to 0 or 1."""
    net, x = linear()
    weight, flat = net.module[1].weight, x.flatten(1)
    gain = torch.minimum(weight * (0 - flat[:, None]), weight * (1 - flat[:, None])).amin(2)
    given = Patches(x, torch.zeros_like(x), torch.ones_like(x), (1, 1), 1)
    found = net.bound(x, given)
    torch.testing.assert_close(found.tensors.lower, net.module(x) + gain, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_on_a_cut_box() -> None:
    """Over [0, 1]^9 with a sum of at most 1, w . x is smallest at 0 or at the best corner."""
    net, x = linear()
    module = net.module[1]
    zero = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    given = HalfSpaces(
        zero, zero + 1, torch.ones(1, 1, 1, 3, 3).double(), torch.ones(1, 1).double()
    )
    found = net.bound(x, given)
    wanted = module.bias + module.weight.amin(1).clamp(max=0)
    torch.testing.assert_close(found.tensors.lower[0], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_product_of_a_moving_weight_and_input(method: str) -> None:
    """y = w x with both in intervals: the extremes are at corners, and every method has them."""
    module = nn.Linear(1, 1, bias=False).double().eval()
    module.weight.data.fill_(2.0)
    x = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    net = patchclamp.open(module, x)
    found = net.bound(x, {"input": 0.5, "weight": 0.25}, method=method)
    for i, centre in enumerate((3.0, -1.0)):
        corners = [w * v for w, v in product((1.75, 2.25), (centre - 0.5, centre + 0.5))]
        exact = torch.tensor([min(corners), max(corners)], dtype=torch.float64)
        made = torch.stack([found.tensors.lower[i, 0], found.tensors.upper[i, 0]])
        torch.testing.assert_close(made, exact, rtol=1e-9, atol=1e-9)


def test_one_relu() -> None:
    """relu(x) on [-1, 2]: interval arithmetic is exact, and so is going backwards with slopes."""
    x = torch.full((2, 1), 0.5, dtype=torch.float64)
    net = patchclamp.open(nn.Sequential(nn.ReLU(), nn.Identity()).eval(), x)
    for method in METHODS:
        found = net.bound(x, 1.5, method=method)
        exact = torch.tensor([[0.0], [0.0]]).double()
        torch.testing.assert_close(found.tensors.lower, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.tensors.upper, exact + 2, rtol=0, atol=1e-12)


def test_x_minus_x_is_zero_backwards_only() -> None:
    """relu(x + 5) - x on [-1, 1] is 5 everywhere: linear bounds see it, intervals cannot."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + 5) - x

    x = torch.zeros(2, 3)
    net = patchclamp.open(Same().eval(), x)
    widths = {}
    for method in METHODS:
        found = net.bound(x, 1.0, method=method)
        widths[method] = float((found.tensors.upper - found.tensors.lower).max())
    assert widths["interval"] == pytest.approx(4)
    for method in METHODS[1:]:
        assert widths[method] < 1e-12


@pytest.mark.parametrize("kind", ["box", "ball"])
def test_a_small_network_against_a_fine_grid(kind: str) -> None:
    """Two inputs: the exact range by 400 x 400 points; methods enclose it, tighter in order."""
    torch.manual_seed(5)
    layers = [nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)]
    module = nn.Sequential(*layers).double().eval()
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    net = patchclamp.open(module, x.expand(2, 2))
    given: PerturbedSet = Box(x - 0.5, x + 0.5) if kind == "box" else Ball(x, 0.5, 2)
    side = torch.linspace(-0.5, 0.5, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    if kind == "ball":
        grid = grid[torch.linalg.vector_norm(grid, dim=1) <= 0.5]
    value = module(x + grid).detach()
    exact = value.amax(0) - value.amin(0)
    shares = []
    for method in ("interval", "crown", "alpha"):
        found = net.bound(x, given, method=method)
        lower, upper = found.tensors
        assert bool(((lower <= value) & (upper >= value)).all())
        shares.append(float(((upper - lower)[0] / exact).mean()))
    assert shares[0] > shares[1] > shares[2] >= 1 - 1e-9
    assert shares[2] < 1.6

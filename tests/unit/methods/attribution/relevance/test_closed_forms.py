"""Relevance by hand, and by other libraries."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.attribution.base import Explainer
from patchclamp.methods.attribution.relevance.deep_lift import DeepLift
from patchclamp.methods.attribution.relevance.guided import DeconvNet, GuidedBackprop
from patchclamp.methods.attribution.relevance.lrp import (
    LRP,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    WSquare,
    ZBox,
)
from patchclamp.net import Net
from patchclamp.rules.maximum import MaxPool, Minimum
from patchclamp.rules.relevance.differences import multipliers, quotient
from patchclamp.rules.softmax import Softmax


def grid(*shape: int) -> Tensor:
    num = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, num + 1, dtype=torch.float64) * 1.7).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    """With weights that can be written down, for comparisons between libraries."""
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(grid(*p.shape) * (0.5 if p.ndim > 1 else 0.3) * (1 + 0.1 * k))
    return module.eval().double()


@cache
def dense() -> tuple[Net, Tensor]:
    x = grid(2, 5)
    layers = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    return patchclamp.open(filled(nn.Sequential(*layers)), x), x


@cache
def convolutional() -> tuple[Net, Tensor]:
    x = grid(2, 1, 6, 6)
    body = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU()
    return patchclamp.open(filled(nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 3))), x), x


# Made with captum 0.9.0 and zennit 0.5.1 on the same weights in float64.
CAPTUM_LIFT = [
    [-0.0431337113, 0.0179589818, -0.0570359156, 0.0268812607, -0.0603857886],
    [0.0346436105, -0.0054624863, 0.0405717936, -0.0083338293, 0.0401956286],
]
CAPTUM_EPSILON = [
    [-0.0344502701, 0.0261899723, -0.0566135099, 0.0428547685, -0.0666732487],
    [-0.0005861366, 0.0212553605, 0.0068934355, 0.0128221018, 0.0157203795],
]
ZENNIT_DENSE: dict[str, tuple[LRP, list[float]]] = {
    "Gamma(0.25)": (
        LRP(dense=Gamma()),
        [-0.0577359909, 0.0136282682, -0.0663849788, 0.0171590889, -0.0642191877],
    ),
    "AlphaBeta(2, 1)": (
        LRP(dense=AlphaBeta(alpha=2.0)),
        [0.1195972244, -0.0280179549, 0.1367149094, -0.0350873618, 0.1316956073],
    ),
    "Flat first": (LRP(first=Flat()), [-0.0624265724] * 5),
    "WSquare first, zero_params='bias'": (
        LRP(first=WSquare()),
        [-0.165091918, 0.0899070553, -0.1717596874, 0.0791992266, -0.1443874693],
    ),
    "ZBox(-1, 1) first": (
        LRP(first=ZBox(low=-1.0, high=1.0)),
        [-0.1172232194, 0.0387242379, -0.1281454625, 0.0200574389, -0.1255458473],
    ),
}
# the third and fourth row of the second picture
CAPTUM_PICTURES: dict[str, tuple[Explainer, list[float]]] = {
    "DeepLift": (
        DeepLift(),
        [
            *(0.2829146725, -0.1165799009, 0.1304269586, -0.0503195114, -0.483487523, 0.151617872),
            *(
                -0.0281855845,
                0.6228119965,
                0.1891249511,
                -0.2561338417,
                0.1046237633,
                -0.4795695754,
            ),
        ],
    ),
    "GuidedBackprop": (
        GuidedBackprop(),
        [
            *(
                0.2493949327,
                0.2142291167,
                -0.1821478719,
                0.0668109603,
                -0.0622854283,
                -0.0774647725,
            ),
            *(
                -0.1077165822,
                0.4018894312,
                0.2431305949,
                -0.0337100956,
                -0.2263301754,
                -0.0148969999,
            ),
        ],
    ),
    "Deconvolution": (
        DeconvNet(),
        [
            *(0.0, -0.0652517838, 0.0125062865, 0.1822738247, -0.0800886883, -0.0996067972),
            *(
                -0.0827554264,
                0.007208927,
                0.1184361928,
                -0.0283773803,
                -0.0961210212,
                -0.0148969999,
            ),
        ],
    ),
    "zennit EpsilonPlusFlat": (
        LRP(dense=Epsilon(epsilon=1e-6), conv=AlphaBeta(), first=Flat()),
        [
            *(
                0.0225609774,
                0.0244363911,
                -0.002941559,
                -0.0190101498,
                -0.0208855636,
                -0.0184292457,
            ),
            *(0.0304506938, 0.0356715447, 0.0283442021, 0.0023679553, 0.0038437733, -0.0137505164),
        ],
    ),
}


def test_deep_lift_and_epsilon_on_a_plain_network_as_captum_has_them() -> None:
    net, x = dense()
    lift = DeepLift().run(net, x, 2).values
    torch.testing.assert_close(lift, torch.tensor(CAPTUM_LIFT).double(), rtol=0, atol=1e-8)
    relevance = LRP(dense=Epsilon(epsilon=1e-2)).run(net, x, 2).values
    torch.testing.assert_close(relevance, torch.tensor(CAPTUM_EPSILON).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ZENNIT_DENSE)
def test_rules_of_layers_as_zennit_has_them(name: str) -> None:
    net, x = dense()
    method, expected = ZENNIT_DENSE[name]
    found = method.run(net, x, 2).values[0]
    # zennit's own stabiliser of 1e-6 is part of its figures
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", CAPTUM_PICTURES)
def test_pictures_as_others_have_them(name: str) -> None:
    net, x = convolutional()
    method, expected = CAPTUM_PICTURES[name]
    found = method.run(net, x, 1).values[1, 0, 2:4].flatten()
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


# ---- by hand ------------------------------------------------------------------


def test_a_linear_network_is_gradient_times_input() -> None:
    module, x = nn.Linear(3, 2).double(), torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, 4.0]]).double()
    net = patchclamp.open(module.eval(), x)
    expected = (x * module.weight[1]).detach()
    torch.testing.assert_close(DeepLift().run(net, x, 1).values, expected)
    relevance = LRP().run(net, x, 1)
    torch.testing.assert_close(relevance.values, expected)
    assert relevance.bias is not None
    torch.testing.assert_close(relevance.bias, module.bias[1].detach().expand(2))


@cache
def one_relu() -> tuple[Net, Tensor]:
    """y = 3 relu(2 a - b - 1) - relu(a + b) + 0.5 at (2, 1): 3 * 2 - 3 + 0.5 = 3.5."""
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0, -1.0], [1.0, 1.0]]))
        module[0].bias.copy_(torch.tensor([-1.0, 0.0]))
        module[2].weight.copy_(torch.tensor([[3.0, -1.0]]))
        module[2].bias.copy_(torch.tensor([0.5]))
    x = torch.tensor([[2.0, 1.0]]).double()
    return patchclamp.open(module, x.repeat(2, 1)), x


def test_one_layer_of_relus_by_hand() -> None:
    net, x = one_relu()
    # at 0 the first unit is off: its secant is 2 / 3, so a gets 3 (2/3) 2 2 - 2, b -3 (2/3) - 1
    lift = DeepLift().run(net, x, 0)
    torch.testing.assert_close(lift.values, torch.tensor([[6.0, -3.0]]).double())
    # 6 divided by 4 - 1 - 1 = 2 of a, b and bias; -3 by 2 + 1
    relevance = LRP().run(net, x, 0)
    torch.testing.assert_close(relevance.values, torch.tensor([[12.0 - 2.0, -3.0 - 1.0]]).double())
    assert relevance.bias is not None
    torch.testing.assert_close(relevance.bias, torch.tensor([0.5 - 3.0]).double())
    # positive contributions only: 6 is a's alone; -3 as before; of the last layer 6 and 0.5
    plus = LRP(dense=AlphaBeta()).run(net, x, 0)
    score = 3.5
    torch.testing.assert_close(plus.values, torch.tensor([[score * 6.0 / 6.5, 0.0]]).double())
    assert plus.bias is not None
    torch.testing.assert_close(plus.bias, torch.tensor([score * 0.5 / 6.5]).double())
    # negative slopes do not come back: only 3 (2, -1)
    guided = GuidedBackprop().run(net, x, 0)
    torch.testing.assert_close(guided.values, torch.tensor([[6.0, -3.0]]).double())
    below = torch.tensor([[0.0, 1.0]]).double()  # the first unit is off
    assert float(GuidedBackprop().run(net, below, 0).values.abs().max()) == 0
    deconv = DeconvNet().run(net, below, 0)
    torch.testing.assert_close(deconv.values, torch.tensor([[6.0, -3.0]]).double())


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :1] * x[:, 1:]) * 2


def test_factors_share_a_product() -> None:
    x = torch.tensor([[3.0, 5.0], [-1.0, 4.0]]).double()
    net = patchclamp.open(Product().eval(), x)
    for method in (DeepLift(), LRP()):
        found = method.run(net, x, 0).values
        torch.testing.assert_close(found, (x[:, :1] * x[:, 1:]).expand(2, 2))
    # from (1, 1): 2 (5 - 1) (3 + 1) / 2 and 2 (3 - 1) (5 + 1) / 2
    found = DeepLift(baseline=1.0).run(net, x[:1], 0).values
    torch.testing.assert_close(found, torch.tensor([[12.0, 16.0]]).double())


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.rms_norm(x, (4,), eps=1e-12)
        h = torch.nn.functional.rms_norm(h - 1e-9, (4,), eps=1e-12)
        return (h * torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=x.dtype)).sum(1, keepdim=True)


def test_norms_stay_bounded_from_a_baseline_of_0() -> None:
    """As products with 1 / norm, the two norms have multipliers of about 1e6 each."""
    x = grid(3, 4)
    found = DeepLift().run(patchclamp.open(Scaled().eval(), x), x, 0)
    assert float(found.values.abs().max()) < 20
    assert found.error is not None
    assert float(found.error.max()) < 1e-8


# ---- single rules ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-7, 1.0, 30.0, 2000.0])
def test_softmax_multipliers_are_exact_at_any_size(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, x0, m = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    x, x0 = x * size, x0 * size
    x[:, 2], x0[:, 2] = -1e9, -1e9  # masked at both
    (found,) = multipliers(Softmax((6,)), m, (x,), (x0,))
    rise = (m * (x.softmax(1) - x0.softmax(1))).sum(1)
    torch.testing.assert_close((found * (x - x0)).sum(1), rise, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.zeros(50).double(), rtol=0, atol=1e-12)


def test_the_quotient_rule_by_hand() -> None:
    x, x0, s, s0 = (torch.tensor([v]).double() for v in (6.0, 1.0, 2.0, 0.5))
    of_x, of_r = quotient(torch.ones(1).double(), x, x0, 1 / s, 1 / s0)
    # 6 / 2 - 1 / 0.5 = 1 = 5 / 1.25 - 1.5 (2.5) / 1.25
    torch.testing.assert_close(of_x, torch.tensor([1 / 1.25]).double())
    torch.testing.assert_close(of_r * (1 / s - 1 / s0), torch.tensor([-3.0]).double())


def test_maxima_give_to_the_winner() -> None:
    rule = MaxPool((1, 1, 4), kernel=(2,), stride=(2,), padding=(0,), dilation=(1,))
    x = torch.tensor([[[[3.0, 1.0, 0.0, 2.0]]]])
    x0 = torch.tensor([[[[1.0, 2.0, 5.0, 1.0]]]])
    (found,) = multipliers(rule, torch.ones(1, 1, 1, 2), (x,), (x0,))
    # 3 - 2 = 1 to the winner at x, which rose by 2; 2 - 5 = -3 to the one at x0, which fell by 5
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5, 0.0, 0.6, 0.0]))
    a, b = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 3.0]])
    a0, b0 = torch.tensor([[5.0, 1.0]]), torch.tensor([[6.0, 0.0]])
    to_a, to_b = multipliers(Minimum((2,)), torch.ones(1, 2), (a, b), (a0, b0))
    # 1 - 5: a was smallest at both; 3 - 0: b rose by 3
    torch.testing.assert_close(to_a, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(to_b, torch.tensor([[0.0, 1.0]]))


def test_epsilon_takes_its_share_and_says_so() -> None:
    module = nn.Linear(2, 1, bias=False).double().eval()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 1.0]]))
    x = torch.tensor([[3.0, 1.0]]).double()
    net = patchclamp.open(module, x.repeat(2, 1))
    found = LRP(dense=Epsilon(epsilon=1.0)).run(net, x, 0)
    torch.testing.assert_close(found.values, torch.tensor([[2.4, 0.8]]).double())
    torch.testing.assert_close(found.absorbed, torch.tensor([0.8]).double())
    assert found.error is not None
    assert math.isclose(float(found.error[0]), 0.2)

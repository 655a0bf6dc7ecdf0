"""Chains read from networks compute what the networks compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError, InputError
from patchclamp.methods.bounds.lipschitz import Chain, max_min, read_chain


class _MaxMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).sort(2, descending=True).values.flatten(1)


class _Mixed(nn.Module):
    """A shift, a convolution, a residual block with its skip layer, and a plain matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.randn(1, 1, 4, 4))
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.sort = _MaxMin()
        self.last = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.leaky_relu(self.conv(x - self.mean), 0.2).flatten(1)
        x = self.sort(torch.tanh(self.a(x)) + self.b(x))
        x = x + torch.sigmoid(x)
        return x @ self.last


def _largest_gap(chain: Chain, module: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((chain(x.flatten(1).double()) - module(x)).abs().max())


def test_sequential() -> None:
    layers = [nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 4), _MaxMin())]
    module = nn.Sequential(*layers, nn.Linear(4, 2), nn.LeakyReLU(0.3), nn.GELU(), nn.Dropout())
    chain = read_chain(module.eval(), known={_MaxMin: max_min()})
    assert (chain.num_inputs, chain.num_outputs, len(chain.activations)) == (4, 2, 4)
    assert _largest_gap(chain, module, torch.randn(9, 4)) < 1e-6


def test_bundled_network() -> None:
    net = patchclamp.open("digits-mlp")
    chain = read_chain(net)
    assert (chain.num_inputs, chain.num_outputs, len(chain.activations)) == (64, 10, 2)
    assert _largest_gap(chain, net.module, torch.rand(5, 1, 8, 8)) < 1e-5


def test_captured_graph_with_everything_that_has_a_form() -> None:
    module = _Mixed().eval()
    net = patchclamp.open(module, torch.randn(2, 1, 4, 4))
    chain = read_chain(net, known={_MaxMin: max_min()})
    assert _largest_gap(chain, module, torch.randn(7, 1, 4, 4)) < 1e-5
    with pytest.raises(EngineError, match="operator 'sort'"):
        read_chain(net)
    with pytest.raises(EngineError, match="unrolls to 8 x 16"):
        read_chain(net, known={_MaxMin: max_min()}, max_unrolled=100)


def test_what_has_no_form_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="module LSTM"):
        read_chain(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    with pytest.raises(EngineError, match="module Dropout"):
        read_chain(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    with pytest.raises(EngineError, match="no linear layer"):
        read_chain(nn.Sequential(nn.ReLU()))
    module = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)).eval()
    with pytest.raises(EngineError, match="operator 'softmax' at '1:softmax'"):
        read_chain(patchclamp.open(module, torch.randn(2, 2)))


def test_nan_weights_are_refused() -> None:
    module = nn.Linear(2, 2)
    module.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="weight holds NaN"):
        read_chain(module)

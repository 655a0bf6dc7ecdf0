"""The scorer under every gradient method: what it refuses, and what must not change a map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import TargetError
from patchclamp.methods.attribution.gradients.integrated import IntegratedGradients
from patchclamp.methods.attribution.gradients.plain import Gradient
from tests.networks import opened


class Root(nn.Module):
    """A score with an infinite slope at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt().sum(1, keepdim=True)


class Seen(nn.Module):
    """Two scores of an image; keeps how its inputs lay in memory."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 5, 3), nn.Linear(5 * 16, 2)
        self.views = views
        self.last: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.is_contiguous(memory_format=torch.channels_last))
        y = torch.tanh(self.conv(x))
        return self.read(y.view(len(y), -1) if self.views else y.flatten(1))


@pytest.mark.parametrize("views", [False, True])
def test_the_layout_in_memory_changes_nothing(views: bool) -> None:
    module, x = Seen(views=views).double().eval(), torch.rand(9, 3, 6, 6).double()
    net = patchclamp.open(module, x[:2])
    want = [Gradient().run(net, row[None], 1).values[0] for row in x]  # too few rows to try
    assert not any(module.last)
    found = Gradient().run(net, x, 1)
    torch.testing.assert_close(found.values, torch.stack(want))
    assert found.values.is_contiguous()
    assert module.last[-1] is not views


def test_a_function_that_counts_on_the_whole_batch_is_refused() -> None:
    net, x = opened("digits_mlp")
    labels = torch.tensor([1, 2, 3])

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, labels[: len(output)], reduction="none")

    with pytest.raises(TargetError, match="'loss' does not score a row by itself"):
        Gradient().run(net, x, loss)
    with pytest.raises(TargetError, match="does not score a row by itself"):
        Gradient().run(net, x, lambda out: out[torch.arange(3), labels])
    by_function = Gradient().run(net, x, lambda out: out[:, 2]).values
    torch.testing.assert_close(by_function, Gradient().run(net, x, 2).values)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    x = torch.tensor([[4.0, 0.0], [1.0, 1.0]])
    net = patchclamp.open(Root().eval(), x)
    with pytest.raises(TargetError, match="is not finite"):
        Gradient().run(net, x, 0)
    with pytest.raises(TargetError, match="is not finite"):
        IntegratedGradients().run(net, x + 1, 0)  # at the baseline

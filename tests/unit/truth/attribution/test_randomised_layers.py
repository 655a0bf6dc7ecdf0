"""Layers made random: which, in what order, and what similarity says of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError, OptionError
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.net import Net
from patchclamp.truth.attribution import Edges, Order, RandomiseLayers
from patchclamp.truth.attribution.randomising import (
    changeable,
    randomised,
    rank_correlation,
    structural_similarity,
)


class _Backwards(nn.Module):
    """Layers that run in another order than they are listed in, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 3)
        self.norm = nn.BatchNorm2d(2)
        self.unused = nn.Linear(2, 2)
        self.first = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))[:, :1]
        return torch.as_tensor(self.last(hidden.flatten(1)))


@pytest.fixture
def net() -> Net:
    module = _Backwards().eval()
    with torch.no_grad():
        module.norm.weight.fill_(1.0)
    return patchclamp.open(module, torch.rand(2, 1, 6, 6))


def test_layers_by_when_they_run(net: Net) -> None:
    layers, same = changeable(net, net.call(torch.rand(2, 1, 6, 6)))
    assert layers == ["last", "first"]
    assert same == ("norm",)  # all its weights are 1 and all its biases 0


def test_a_copy_is_changed_and_nothing_else(net: Net) -> None:
    x = torch.rand(4, 1, 6, 6)
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    other = randomised(net, net.call(x), ["first"], seed=1)
    assert all(torch.equal(v, net.module.state_dict()[k]) for k, v in before.items())
    changed = {k for k, v in other.module.state_dict().items() if not torch.equal(v, before[k])}
    assert "first.weight" in changed
    assert changed <= {"first.weight", "first.bias"}
    new = other.module.state_dict()["first.weight"].flatten().sort().values
    assert torch.equal(new, before["first.weight"].flatten().sort().values)
    again = randomised(net, net.call(x), ["last", "first"], seed=1)
    assert torch.equal(
        again.module.state_dict()["first.weight"], other.module.state_dict()["first.weight"]
    )


def test_a_method_changes_and_edges_stay(net: Net) -> None:
    x = torch.rand(6, 1, 6, 6)
    found = RandomiseLayers().run(Gradient(), net, x, 0)
    assert [(s.layer, s.num_random) for s in found.steps] == [("last", 1), ("first", 2)]
    assert found.unchanged == ("norm",)
    assert found.steps[-1].spearman.mean < 0.6
    stays = RandomiseLayers(order=Order.INDEPENDENT).run(Edges(), net, x, 0)
    assert [s.num_random for s in stays.steps] == [1, 1]
    for step in stays.steps:
        assert step.spearman.mean == pytest.approx(1.0)
        assert step.ssim is not None
        assert step.ssim.mean == pytest.approx(1.0)
    assert not any(m._forward_hooks for m in net.module.modules())
    one = RandomiseLayers(num_layers=1).run(Gradient(), net, x, 0)
    assert [(s.layer, s.num_random) for s in one.steps] == [("first", 2)]


def test_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 50, 12, 12, generator=generator, dtype=torch.float64)
    for alike in (rank_correlation, structural_similarity):
        assert torch.allclose(alike(a, a), torch.ones(50, dtype=torch.float64))
        assert abs(float(alike(a, b).mean())) < 0.05
    assert torch.allclose(rank_correlation(a, a**3), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(rank_correlation(a, -a), -torch.ones(50, dtype=torch.float64))
    tied = torch.tensor([[1.0, 1.0, 2.0, 3.0]])  # ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4
    line = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert float(rank_correlation(tied, line)) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert rank_correlation(torch.ones(1, 4), line).tolist() == [0.0]
    assert torch.allclose(structural_similarity(5 * a, a), torch.ones(50, dtype=torch.float64))


def test_networks_without_weights_are_refused() -> None:
    net = patchclamp.open(nn.Flatten(), torch.rand(2, 1, 2, 2))
    with pytest.raises(EngineError, match="no weights"):
        RandomiseLayers().run(Gradient(), net, torch.rand(2, 1, 2, 2), 0)
    with pytest.raises(OptionError):
        RandomiseLayers(num_layers=0).run(Gradient(), net, torch.rand(2, 1, 2, 2), 0)

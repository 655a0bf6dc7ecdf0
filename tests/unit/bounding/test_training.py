"""Bounds of the loss: they hold, their gradients are right, and training on them certifies more."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.sets import Box
from patchclamp.bounding.training import Training, certified_loss, certified_margins
from patchclamp.core.errors import BoundError, OptionError
from tests.networks import Difference


def made(width: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh()]
    module = nn.Sequential(*layers, nn.Linear(width, 3)).double().eval()
    return module, torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("method", Training)
def test_it_is_above_every_loss_in_the_box(method: Training) -> None:
    module, x, labels = made()
    engine = patchclamp.open(module, x).graph
    box = Box(x - 0.1, x + 0.1)
    bound = certified_loss(engine, box, labels, method).detach()
    share = torch.rand(3000, *x.shape, dtype=torch.float64)
    share[:1000] = share[:1000].round()
    at = box.lower + share * 0.2
    losses = nn.functional.cross_entropy(
        module(at).detach().flatten(0, 1), labels.repeat(3000), reduction="none"
    ).unflatten(0, (3000, 4))
    assert bool((bound >= losses.amax(0)).all())
    assert float((bound - losses.amax(0)).max()) < 1.0
    low = certified_margins(engine, box, labels, method)
    margins = module(at).gather(2, labels.expand(3000, 4)[:, :, None]) - module(at)
    assert bool((margins >= low - 1e-12).all())
    point = certified_loss(engine, Box(x, x), labels, method)
    torch.testing.assert_close(
        point, nn.functional.cross_entropy(module(x), labels, reduction="none")
    )


def test_fusing_is_tighter_than_intervals() -> None:
    module, x, labels = made()
    engine = patchclamp.open(module, x).graph
    box = Box(x - 0.05, x + 0.05)
    interval, fused, crown = (certified_loss(engine, box, labels, m) for m in Training)
    assert bool((fused < interval).all())
    assert bool(crown.sum() < fused.sum())


@pytest.mark.parametrize("method", Training)
def test_gradients_in_the_weights(method: Training) -> None:
    """Against differences, for a weight and a bias of every layer."""
    module, x, labels = made()
    engine = patchclamp.open(module, x).graph
    box = Box(x - 0.05, x + 0.05)
    certified_loss(engine, box, labels, method).sum().backward()
    for weight in module.parameters():
        assert weight.grad is not None
        at = tuple(0 for _ in weight.shape)
        sides = []
        for move in (1e-6, -2e-6):
            weight.data[at] += move
            sides.append(float(certified_loss(engine, box, labels, method).detach().sum()))
        weight.data[at] += 1e-6
        slope = (sides[0] - sides[1]) / 2e-6
        assert abs(slope - float(weight.grad[at])) < 1e-5 * (1 + abs(slope))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def trained(certified: bool, num_epochs: int = 8) -> float:
    """Share of 400 held-out digits that are right on their whole box of radius 0.06."""
    torch.manual_seed(0)
    x, y = digits()
    module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    engine = patchclamp.open(module, x[:2]).graph
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    for epoch in range(num_epochs):
        radius = 0.08 * min(1.0, epoch / (num_epochs - 3))
        for i in torch.randperm(1200).split(100):
            adam.zero_grad()
            loss = nn.functional.cross_entropy(module(x[i]), y[i])
            if certified:
                box = Box(x[i] - radius, x[i] + radius)
                loss = (loss + certified_loss(engine, box, y[i]).mean()) / 2
            loss.backward()
            adam.step()
    rest = slice(1397, 1797)
    with torch.no_grad():
        low = certified_margins(engine, Box(x[rest] - 0.06, x[rest] + 0.06), y[rest])
    own = nn.functional.one_hot(y[rest], 10).bool()
    return float(((low > 0) | own).all(1).double().mean())


def test_training_certifies_more_digits() -> None:
    plain, certified = trained(certified=False), trained(certified=True)
    assert certified > plain + 0.1


def test_refused() -> None:
    module, x, labels = made()
    engine = patchclamp.open(module, x).graph
    with pytest.raises(OptionError, match="nearest 'fused'"):
        certified_loss(engine, Box(x, x), labels, "fuse")
    with pytest.raises(BoundError, match="the box does not fit the network's input"):
        certified_loss(engine, Box(x[:, 0], x[:, 0]), labels)
    pair = torch.randn(2, 4)
    engine = patchclamp.open(Difference().eval(), (pair, pair)).graph
    with pytest.raises(BoundError, match="one input and one output; got 2 and 1"):
        certified_loss(engine, Box(pair, pair), labels)

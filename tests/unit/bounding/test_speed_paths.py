"""What makes the engine fast changes no bound: each path beside the plain one, and samples."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding import propagate
from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Ball, Box
from patchclamp.bounding.slopes import Optimised, SlopeSearch
from patchclamp.bounding.steps import Steps
from patchclamp.methods.bounds.verify import lowered
from patchclamp.rules.base import Interval, Nonlinear
from patchclamp.rules.conv import Conv
from patchclamp.rules.linear import Linear
from patchclamp.rules.relu import ReLU
from patchclamp.rules.sparse import Sparse, Windows
from patchclamp.rules.value import Value

DOUBLE = torch.float64


@dataclass(eq=False)
class Plain(Propagation):
    """Without any of it: one-hot rows, dense, all the way, each sign by itself."""

    def tighten(self, value: Value) -> None:
        """Every undecided element, to the sets."""
        if self.is_exact(value):
            super().tighten(value)
            return
        index = self._undecided(value)
        if len(index):
            down, up = (self.linearise(*self.start(value, index, s)).bound for s in (1.0, -1.0))
            self._narrow(value, index, down, -up)

    def _alive(self, value: Value) -> None:
        return None


class Skipped(nn.Module):
    """Two ways to one sum, one of them a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 2, 6, 6)."""
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(y) + y).flatten(1))


def dense_net(kind: type[nn.Module] = nn.ReLU) -> nn.Module:
    sizes = [6, 40, 40, 40, 3]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), kind()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 9, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(9, 5, 2, padding=(0, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(60, 3),
    )


def pooled_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
    )


NETS = {
    "dense": (dense_net, (6,)),
    "sigmoid": (lambda: dense_net(nn.Sigmoid), (6,)),
    "conv": (conv_net, (2, 15, 14)),
    "pooled": (pooled_net, (2, 12, 12)),
    "skipped": (Skipped, (2, 6, 6)),
}


@cache
def made(name: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Lowered, Tensor]:
    """A network in which many neurons are dead, lowered, and a point."""
    torch.manual_seed(3)
    build, shape = NETS[name]
    module = build()
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None:
            layer.weight.data *= 2
            layer.bias.data += torch.linspace(-1.5, 1, len(layer.bias))
    x = torch.randn(1, *shape)
    network = lowered(patchclamp.open(module.eval(), x).graph, [x], dtype)
    return module.to(dtype).requires_grad_(requires_grad=False), network, x.to(dtype)


def box(network: Lowered, x: Tensor, radii: Tensor) -> Box:
    shape = (len(radii), *network.leaves["input"].shape)
    radii = radii.reshape(-1, *(1,) * (len(shape) - 1)).to(x)
    centre = x.reshape(1, *shape[1:]).expand(shape)
    return Box(centre - radii, centre + radii)


def rows_of(network: Lowered) -> tuple[Tensor, Tensor]:
    eye = torch.eye(3, dtype=network.dtype)
    rows = torch.cat([eye, -eye]).reshape(1, 6, *network.output.shape)
    return rows, torch.zeros(1, 6, dtype=network.dtype)


def bounded(kind: type[Propagation], network: Lowered, given: Box, *, rounded: bool) -> Propagation:
    bounds = kind(network, {"input": given}, rounded=rounded)
    bounds.run()
    return bounds


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("radii", [[0.05], [0.02, 0.1, 0.3]])
def test_bounds_are_those_of_the_plain_way(
    name: str, radii: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead neurons left out, windows, settled rows, both signs at once: the same numbers."""
    monkeypatch.setattr(propagate, "MIN_SETTLED", 1)
    _, network, x = made(name)
    given = box(network, x, torch.tensor(radii))
    fast, plain = (bounded(k, network, given, rounded=False) for k in (Propagation, Plain))
    for value in network.values:
        ours, theirs = fast.interval(value), plain.interval(value)
        readers = [v for v in network.values if value in v.arguments]
        relu = bool(readers) and all(isinstance(v.rule, ReLU) for v in readers)
        if relu:  # of what is dead only that has to be known
            dead = (theirs.upper <= 0).all(0)
            assert bool((ours.upper <= 1e-12)[:, dead].all())
            ours, theirs = (Interval(*(s[:, ~dead] for s in b)) for b in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    C, d = rows_of(network)
    ours, theirs = fast.output(C, d), plain.output(C, d)
    torch.testing.assert_close(ours.bound, theirs.bound, rtol=1e-9, atol=1e-9)
    (leaf,) = network.leaves.values()
    torch.testing.assert_close(ours.rows[leaf], theirs.rows[leaf], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rounded", [False, True])
def test_samples_are_inside(name: str, rounded: bool) -> None:
    """Float32 bounds with slopes by rule and optimised, against the network in float64."""
    module, network, x = made(name, torch.float32)
    given = box(network, x, torch.tensor([0.1]))
    C, d = rows_of(network)
    bounds = Propagation(network, {"input": given}, rounded=rounded)
    search = SlopeSearch(num_steps=3)
    bounds.improve = Optimised(bounds, search)
    bounds.run()
    plain = bounds.output(C, d).bound
    best, _ = search.improve(bounds, ({network.output: C}, d), plain)
    assert bool((best >= plain).all())
    assert bool((best > plain).any())
    share = torch.rand(10_000, *x.shape[1:], dtype=DOUBLE)
    share[::2] = share[::2].round()
    low, high = (side.reshape(x.shape).double() for side in given.hull())
    y = copy.deepcopy(module).double()(low + (high - low) * share)
    slack = 0 if rounded else 1e-5
    assert bool((torch.cat([y, -y], 1).amin(0) >= best[0].double() - slack).all())


def test_rounded_bounds_lie_below_the_exact_ones() -> None:
    """A float32 bound that is rounded is below the float64 one, with windows and without."""
    for name in NETS:
        _, network, x = made(name, torch.float32)
        _, exact, _ = made(name)
        given = box(network, x, torch.tensor([0.05]))
        C, d = rows_of(network)
        low = bounded(Propagation, network, given, rounded=True).output(C, d).bound
        sharp = Box(*(side.double() for side in given.hull()))
        C, d = rows_of(exact)
        high = bounded(Propagation, exact, sharp, rounded=False).output(C, d).bound
        assert bool((low.double() < high).all()), name
        assert bool((low.double() > high - 0.02 * (1 + high.abs())).all()), name


def test_paths_are_taken() -> None:
    """Dead columns and windows do occur in the networks above."""
    _, network, x = made("dense")
    bounds = bounded(Propagation, network, box(network, x, torch.tensor([0.05])), rounded=False)
    relus = [v for v in network.values if isinstance(v.rule, ReLU)]
    assert any(Steps._alive(bounds, v) is not None for v in relus)
    _, network, x = made("conv")
    bounds = bounded(Propagation, network, box(network, x, torch.tensor([0.05])), rounded=False)
    second = [v for v in network.values if isinstance(v.rule, Conv)][1]
    found = bounds.first(second, torch.arange(4))
    assert found is not None
    assert isinstance(found[0][second.arguments[0]], Sparse)


def test_windows_are_the_dense_rows() -> None:
    """Rows that start in windows, over borders and through two layers."""
    torch.manual_seed(0)
    first = Conv(torch.randn(3, 2, 3, 2), torch.randn(3), (1, 2, 11, 9), (2, 1), (1, 0), (1, 1), 1)
    second = Conv(torch.randn(4, 3, 2, 2), None, first.output, (1, 2), (1, 1), (1, 1), 1)
    index = torch.tensor([0, 5, 11, 30, 47, 5])
    rows = second.start_in_windows(index)
    (plain,) = second.start(index)
    torch.testing.assert_close(rows.dense(), plain)
    torch.testing.assert_close(rows.signed().dense(), torch.cat([plain, -plain], 1))
    x = torch.randn(2, *second.before)
    torch.testing.assert_close(rows.dot(x), torch.einsum("mrchw,nchw->nr", plain[:, :, 0], x[:, 0]))
    torch.testing.assert_close(
        first.backward_in_windows(rows).dense(), first.backward(plain)[0], rtol=1e-5, atol=1e-5
    )
    some = torch.tensor([4, 1])
    torch.testing.assert_close(rows.rows(some).dense(), plain[:, some])
    assert isinstance(rows.where, Windows)
    assert rows.where.size == (3, 2, 2)


@pytest.mark.parametrize("channels", [2, 9])
def test_transposed_convolutions_are_gradients(channels: int) -> None:
    """On few channels and on many, with a remainder at the edge."""
    torch.manual_seed(0)
    conv = Conv(
        torch.randn(5, channels, 3, 3), None, (1, channels, 8, 8), (2, 2), (0, 1), (1, 1), 1
    )
    A = torch.randn(2, 3, *conv.output)
    at = torch.zeros(6, *conv.before, requires_grad=True)
    (rows,) = torch.autograd.grad(conv.forward(at), at, A.flatten(0, 1))
    torch.testing.assert_close(conv.backward(A)[0].flatten(0, 1), rows, rtol=1e-5, atol=1e-5)


def test_gradients_go_through() -> None:
    """A bound is differentiable in a weight on the fast paths as on the plain one."""
    found = []
    for kind in (Propagation, Plain):
        _, network, x = made.__wrapped__("dense")  # others must not meet its gradients
        first = next(v.rule for v in network.values if isinstance(v.rule, Linear))
        weight = first.weight.requires_grad_()
        bounds = bounded(kind, network, box(network, x, torch.tensor([0.05])), rounded=False)
        found.append(torch.autograd.grad(bounds.output(*rows_of(network)).bound.sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)
    assert bool((found[0] != 0).any())


@pytest.mark.parametrize("name", ["dense", "sigmoid", "conv"])
def test_kept_slopes_give_the_bounds(name: str) -> None:
    """Both signs are optimised in one go; each row's slopes are found again under its sign."""
    _, network, x = made(name)
    bounds = Propagation(network, {"input": box(network, x, torch.tensor([0.1]))})
    bounds.improve = kept = Optimised(bounds, SlopeSearch(num_steps=4), kept={})
    bounds.run()
    assert kept.kept
    reached = 0
    for (value, sign), parts in kept.kept.items():
        for index, slopes in parts:
            found = bounds.linearise(*bounds.start(value, index, sign), slopes).bound
            side = bounds.interval(value)[0 if sign > 0 else 1].flatten(1)[:, index] * sign
            assert bool((found <= side + 1e-9).all())
            reached += int((found >= side - 1e-9).sum())
    assert reached > 0.9 * sum(len(i) for parts in kept.kept.values() for i, _ in parts)


def test_a_ball_is_not_its_hull() -> None:
    """The first layer over an L2 ball is bounded over the ball itself."""
    _, network, x = made("dense")
    ball = Ball(x.reshape(1, *network.leaves["input"].shape), 0.3)
    bounds = Propagation(network, {"input": ball})
    bounds.run()
    first = next(v for v in network.values if isinstance(v.rule, Nonlinear)).arguments[0]
    hull = Propagation(network, {"input": Box(*ball.hull())})
    hull.run()
    narrow, wide = bounds.interval(first), hull.interval(first)
    assert float((narrow.upper - narrow.lower).mean()) < 0.9 * float(
        (wide.upper - wide.lower).mean()
    )

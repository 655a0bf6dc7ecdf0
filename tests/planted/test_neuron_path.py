"""Neuron paths: closed forms, a planted path, a small vision transformer, and a control."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.data import load_data
from patchclamp.methods.circuits.finding.neuron_path import (
    Influence,
    NeuronPathResult,
    NeuronPaths,
    _Probe,
)
from patchclamp.net import Net
from patchclamp.specimens import build
from tests.networks import fresh
from tests.snapshots import snapshot

ANSWER, SIGNAL, ALSO, IGNORED = range(4)
NUM_UNITS, NUM_INPUTS = 10, 4
PATH, CHAIN, LOUD = (0, 0, 0), (0, 1, 1), (5, 5, 5)
"""The true path; the units that look best alone; the units that are most active."""


class Stream(nn.Module):
    """Three layers of rectified units that read and write a stream; the answer is one of its axes.

    In every layer unit 0 writes to the answer what it reads of an input of its own. Unit 0
    of the first layer also writes a signal, from which unit 1 of both later layers writes
    more to the answer than unit 0 does. Zeroing a first unit silences those, so jointly they
    add nothing to it. Unit 5 is loud and is not read; others read noise and write little.
    """

    def __init__(self) -> None:
        super().__init__()
        width = ALSO + 2 + NUM_INPUTS
        self.read = nn.ModuleList(nn.Linear(width, NUM_UNITS) for _ in PATH)
        self.act = nn.ModuleList(nn.ReLU() for _ in PATH)
        self.write = nn.ModuleList(nn.Linear(NUM_UNITS, width, bias=False) for _ in PATH)
        self.width = width
        generator = torch.Generator().manual_seed(0)
        first = width - NUM_INPUTS
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for layer, (read, write) in enumerate(zip(self.read, self.write, strict=True)):
                read.weight[2:, first:] = torch.rand(NUM_UNITS - 2, NUM_INPUTS, generator=generator)
                write.weight[ANSWER, 2:] = 0.02 * torch.randn(NUM_UNITS - 2, generator=generator)
                read.weight[5] *= 5
                write.weight[:, 5] = 0
                write.weight[IGNORED, 5] = 1.0
                read.weight[0, first + layer] = 1.0
                write.weight[ANSWER, 0] = 1.0
                if layer:
                    read.weight[1, SIGNAL] = 1.0
                    write.weight[ANSWER, 1] = 1.5
                else:
                    write.weight[SIGNAL, 0] = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.pad(inputs, (self.width - NUM_INPUTS, 0))
        for read, act, write in zip(self.read, self.act, self.write, strict=True):
            x = x + write(act(read(x)))
        return x[:, : ANSWER + 1]


@dataclass(frozen=True)
class Target:
    """The class's output, with a sign for each row."""

    classes: Tensor
    signs: Tensor
    name: str = "output of the class"
    position: int | None = None

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output.gather(1, self.classes[rows][:, None])[:, 0] * self.signs[rows]


def planted(num: int = 40) -> tuple[Net, Tensor, Target]:
    generator = torch.Generator().manual_seed(1)
    inputs = 0.5 + torch.rand(num, NUM_INPUTS, generator=generator)
    net = patchclamp.open(Stream().eval(), inputs)
    return net, inputs, Target(torch.zeros(num, dtype=torch.long), torch.ones(num))


def baseline(result: NeuronPathResult, name: str) -> tuple[int, ...]:
    return tuple(next(b for b in result.baselines if b.name == name).units[0].tolist())


def test_the_planted_path_is_found_and_baselines_are_fooled() -> None:
    net, inputs, target = planted()
    before = snapshot(net.module)
    result = NeuronPaths(top_k=3).run(net, inputs, "act.*", target)
    assert snapshot(net.module) == before
    assert result.sites == ("act.0", "act.1", "act.2")
    assert tuple(result.found.units[0].tolist()) == PATH
    assert baseline(result, "independent") == CHAIN
    assert baseline(result, "top activation") == LOUD
    for margin in result.margins.values():
        assert margin.low > 0.5
    assert result.found.interval.low > 1
    assert result.null.p == 0.01  # 99 random paths, none as influential
    # one random path in ten shares the first neuron, which moves the target most
    assert result.removal_null.p is not None
    assert result.removal_null.p <= 0.15
    assert result.found.removal > 3 * result.removal_null.mean


def test_no_path_has_more_influence_than_the_one_that_was_found() -> None:
    net, inputs, target = planted()
    probe = _Probe(NeuronPaths(), net, net.call(inputs), net.taps("act.*"), target)
    rows = torch.arange(40)
    every = itertools.product(range(NUM_UNITS), repeat=3)
    means = {
        path: float(probe.drops(rows, torch.tensor([path]).expand(40, -1), range(3)).mean())
        for path in every
        if path[0] in (0, 2, 5) or path == (1, 1, 1)
    }
    assert max(means, key=means.__getitem__) == PATH
    # in closed form: what the units write to the answer, with all they hand on
    x = inputs
    wanted = (x[:, 0] * (1 + 2 * 1.5) + x[:, 1] + x[:, 2]).mean()
    assert means[PATH] == pytest.approx(float(wanted), rel=1e-5)


def test_the_integral_sums_to_what_removal_takes_away() -> None:
    """Completeness, on a network that is not linear."""
    module, images = fresh("vit")
    net = patchclamp.open(module.double(), images.double())
    target = Target(torch.tensor([1, 2, 3]), torch.ones(3))
    probe = _Probe(
        NeuronPaths(num_steps=16, position=0),
        net,
        net.call(images.double()),
        net.taps("blocks.*.mlp.1"),
        target,
    )
    rows, units = torch.arange(3), torch.tensor([[3, 8], [1, 100], [64, 5]])
    activation, slope = probe.along(rows, units, range(2))
    line = (activation * slope).sum((1, 2))
    drops = probe.drops(rows, units, range(2))
    assert drops.abs().max() > 1e-6
    torch.testing.assert_close(line, drops, rtol=1e-3, atol=1e-9)
    product = _Probe(
        NeuronPaths(num_steps=16, position=0, influence=Influence.PRODUCT),
        net,
        net.call(images.double()),
        net.taps("blocks.*.mlp.1"),
        target,
    ).influence(rows, units, range(2))
    torch.testing.assert_close(product, activation.sum((1, 2)) * slope.sum((1, 2)))


@pytest.fixture(scope="module")
def vit() -> tuple[Net, Tensor, Target]:
    """A vision transformer of four layers after a little training, and held-out digits."""
    train, test = load_data("digits", split="train"), load_data("digits", split="test")
    assert train.labels is not None
    assert test.labels is not None
    torch.manual_seed(0)
    module = build("vit", num_layers=4).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(80):
        batch = torch.randint(len(train.inputs), (32,))
        loss = F.cross_entropy(module(train.inputs[batch]), train.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = test.inputs[:10], test.labels[:10]
    net = patchclamp.open(module.eval(), images[:2])
    return net, images, Target(labels, torch.ones(10))


@pytest.mark.parametrize("influence", list(Influence))
def test_paths_of_a_vision_transformer_beat_the_baselines(
    influence: Influence, vit: tuple[Net, Tensor, Target]
) -> None:
    net, images, target = vit
    method = NeuronPaths(
        influence=influence, per_row=True, num_random=39, num_steps=4, top_k=4, position=0
    )
    result = method.run(net, images, "blocks.*.mlp.1", target)
    assert result.found.units.shape == (10, 4)
    active, alone = result.baselines
    assert result.margins["top activation"].low > 0
    # Neurons of this network hardly share signals, so that the most influential ones alone come
    # within a few hundredths; the planted network above is where the two must differ.
    assert result.found.mean >= alone.mean > active.mean
    assert result.null.p == 1 / 40
    assert result.removal_null.p == 1 / 40


def test_a_shuffled_metric_has_no_path() -> None:
    """Signs drawn by chance: what the search fits on some rows does not hold on the others."""
    net, inputs, target = planted(60)
    for seed in range(5):
        signs = torch.randn(60, generator=torch.Generator().manual_seed(seed)).sign()
        method = NeuronPaths(top_k=3, seed=seed, num_random=39)
        found = method.run(net, inputs, "act.*", replace(target, signs=signs))
        assert found.null.p is not None
        assert found.null.p > 0.05 or found.found.interval.low <= 0


def test_bad_requests_are_refused() -> None:
    net, inputs, target = planted(8)
    with pytest.raises(SiteError, match="at least two"):
        NeuronPaths().run(net, inputs, "act.0", target)
    with pytest.raises(SiteError, match="no positions"):
        NeuronPaths(position=0).run(net, inputs, "act.*", target)
    with pytest.raises(OptionError, match="top_k"):
        NeuronPaths(top_k=0).run(net, inputs, "act.*", target)
    with pytest.raises(DataError, match="too few rows"):
        NeuronPaths().run(net, inputs[:1], "act.*", target)
    module, tokens = fresh("tiny_lm")
    heads = patchclamp.open(module, tokens)
    with pytest.raises(SiteError, match="layer of neurons"):
        NeuronPaths().run(heads, tokens, "attn.*.z", target)

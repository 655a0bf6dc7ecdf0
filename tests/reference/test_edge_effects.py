"""Effects of edges against closed forms, brute force and each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Edge
from patchclamp.engine.targets import ClassScore
from patchclamp.methods.circuits.finding.edge_attribution import (
    BlindSpotWarning,
    Direction,
    EdgeAttribution,
    Path,
    Sign,
)
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import Slopes, Wiring, wire
from tests.networks import opened, tiny_gpt2, tiny_llama

NOISING = Direction.NOISING


def first_order(w: Wiring, c: Contrast) -> tuple[list[Tensor], Slopes]:
    """Changes of all sources and slopes at the clean point."""
    batch = c.batch(range(c.num_rows))
    slopes = w.slopes(batch.clean, batch.metric, batch.rows)
    other = w.record(batch.corrupt).values
    return [y - x for x, y in zip(slopes.at, other, strict=True)], slopes


# ---- linear networks: first order is exact ----------------------------------------


class ResidualLinear(nn.Module):
    """A stream without anything that bends. Shapes: (batch, 5, 3) to (batch, 5, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.unembed = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.first(x)
        x = x + self.second(x)
        y: Tensor = self.unembed(x)
        return y


def linear_stack() -> tuple[Wiring, Contrast]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double().eval()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 4).double()
    net = patchclamp.open(module, x)
    return wire(net), contrast(net, x, y, ClassScore(2))


def linear_stream() -> tuple[Wiring, Contrast]:
    torch.manual_seed(0)
    module = ResidualLinear().double().eval()
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 3).double()
    net = patchclamp.open(module, x)
    return wire(net, kind="stream"), contrast(net, x, y, ClassScore(1, -1))


def linear_convolutions() -> tuple[Wiring, Contrast]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    x, y = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 2, 8, 8).double()
    net = patchclamp.open(module.double().eval(), x)
    return wire(net), contrast(net, x, y, ClassScore(0))


@pytest.mark.parametrize("make", [linear_stack, linear_stream, linear_convolutions])
def test_linear_networks_have_exact_first_order_effects(
    make: Callable[[], tuple[Wiring, Contrast]],
) -> None:
    w, c = make()
    exact = ExactEdges().run(w, c)
    changes, slopes = first_order(w, c)
    products = w.products(changes, slopes)[:, w.possible].T
    torch.testing.assert_close(products, exact.noising, rtol=0, atol=1e-10)
    assert float(exact.noising.abs().max()) > 0.1
    with pytest.warns(BlindSpotWarning):
        scores = EdgeAttribution(direction=NOISING, path=Path.NONE, sign=Sign.SIGNED).run(w, c)
    mean = exact.noising.mean(1).numpy()
    np.testing.assert_allclose(scores.circuit.scores[w.possible], mean, rtol=0, atol=1e-10)
    # and so the default, whose points all have the same slopes, gives the mean sizes
    sizes = EdgeAttribution().run(w, c).circuit.scores[w.possible]
    np.testing.assert_allclose(sizes, exact.sizes.numpy(), rtol=0, atol=1e-10)
    one_way = ExactEdges(direction=NOISING).run(w, c)  # a direction left out is no effect of 0
    np.testing.assert_allclose(
        one_way.sizes.numpy(), exact.noising.abs().mean(1).numpy(), rtol=0, atol=1e-10
    )


def test_effects_of_a_linear_stack_by_hand() -> None:
    w, c = linear_stack()
    changes, slopes = first_order(w, c)
    products = w.products(changes, slopes)
    a, b, last = (layer.weight.detach() for layer in w.net.module)
    change = c.corrupt.tensors()[0] - c.clean.tensors()[0]
    behind = last[2] @ b  # slope of the metric at the first layer's outputs
    torch.testing.assert_close(
        products[:, :6, :4], change[:, None] * a * behind[:, None], rtol=0, atol=1e-10
    )


# ---- the convolution formula -------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 2, 3, stride=2, padding=2), (11,)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (9, 8)),
    "2d no bias": (nn.Conv2d(2, 3, 1, bias=False), (5, 5)),
    "3d": (nn.Conv3d(2, 2, 2, padding=1), (3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_edges_are_those_of_weights_cut_by_hand(name: str) -> None:
    """An output channel whose weights for one input channel read the other input instead."""
    layer, shape = CONVOLUTIONS[name]
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    channels = layer.weight.shape[1]
    size = layer(torch.zeros(1, channels, *shape)).flatten(1).shape[1]
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(size, 3)).double().eval()
    x, y = (torch.randn(3, channels, *shape).double() for _ in range(2))
    net = patchclamp.open(module, x)
    w, c = wire(net), contrast(net, x, y, ClassScore(1))
    products = w.products(*first_order(w, c))
    with torch.no_grad():
        whole = module(x)[:, 1]
        weight = layer.weight.clone()
        for j in range(weight.shape[0]):
            for i in range(channels):
                only = torch.zeros_like(weight)
                only[j, i] = weight[j, i]
                layer.weight.copy_(weight - only)
                rest = layer(x)
                layer.weight.copy_(only)
                moved = layer(y)
                if layer.bias is not None:
                    moved = moved - layer.bias.view(-1, *[1] * len(shape))
                layer.weight.copy_(weight)
                expected = module[2]((rest + moved).flatten(1))[:, 1] - whole
                torch.testing.assert_close(products[:, j, i], expected, rtol=0, atol=1e-12)


# ---- batches, sums -----------------------------------------------------------------


@cache
def network(name: str) -> tuple[Wiring, Contrast]:
    """Networks of real anatomies with two sets of inputs."""
    if name in ("gpt2", "llama"):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            x, y = torch.randint(3, 97, (3, 6)), torch.randint(3, 97, (3, 6))
        net = patchclamp.open(tiny_gpt2() if name == "gpt2" else tiny_llama(), x)
    else:
        net, x = opened(name)
        y = x.flip(0)
    positions = name in ("gpt2", "llama", "tiny_lm")
    return wire(net), contrast(net, x, y, ClassScore(5, -1 if positions else None))


NETWORKS = ("tiny_lm", "gpt2", "llama", "vit", "digits_cnn")


@pytest.mark.parametrize("name", ["tiny_lm", "llama", "digits_cnn"])
def test_batches_of_one_are_the_same(name: str) -> None:
    w, c = network(name)
    together = EdgeAttribution(steps=1).run(w, c)
    single = EdgeAttribution(steps=1, batch_size=1).run(w, c)
    for a, b in (
        (together.circuit.scores, single.circuit.scores),
        (together.nodes, single.nodes),
        (together.spread, single.spread),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert together.circuit.scores.max() > 1e-3


def test_a_writer_that_is_a_parameter_has_no_gradient() -> None:
    """The class token of a vision transformer is a summand of the stream as it is."""
    w, c = network("vit")
    assert not any(value.requires_grad for value in w.record(c.clean).values)
    with pytest.warns(BlindSpotWarning):
        EdgeAttribution(direction=NOISING, path=Path.NONE).run(w, c)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_readers_see_adds_up_to_what_the_writer_does(name: str) -> None:
    """The chain rule: a writer acts through its readers and in no other way."""
    w, c = network(name)
    changes, slopes = first_order(w, c)
    edges, nodes = w.products(changes, slopes).sum(1), w.node_products(changes, slopes)
    torch.testing.assert_close(edges, nodes, rtol=1e-4, atol=1e-5)
    assert float(nodes.abs().max()) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_edges_are_masks_that_cut_one_edge(name: str) -> None:
    w, c = network(name)
    where = np.argwhere(w.possible)
    where = where[np.random.default_rng(0).permutation(len(where))[:16]]
    edges = [
        Edge(w.writers[writer], w.readers[reader].node, w.readers[reader].slot)
        for reader, writer in where
    ]
    exact = ExactEdges().run(w, c, edges)
    masks = [w.possible]
    for reader, writer in where:
        mask = w.possible.copy()
        mask[reader, writer] = False
        masks.append(mask)
    resample = References(kind=Ablation.RESAMPLE)
    rows = metric_rows(w, [c], masks, resample)
    torch.testing.assert_close(exact.noising, rows[1:] - rows[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(exact.metric_clean, rows[0], rtol=0, atol=2e-5)
    assert float(exact.noising.abs().max()) > 1e-4

"""Layers: what is found, cut edges against cut weights, products against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.errors import EngineError
from patchclamp.engine.layers import find_layers
from patchclamp.methods.circuits.network.wiring import wire
from patchclamp.net import Net


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
    ).eval()


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open(small_cnn(), torch.zeros(2, 2, 8, 8))


def test_units_are_followed_through_rectifiers_and_flattening(net: Net) -> None:
    wiring = wire(net)
    assert [str(w) for w in wiring.writers] == [
        *(f":input[{i}]" for i in range(2)),
        *(f"0[{i}]" for i in range(3)),
        *(f"2[{i}]" for i in range(4)),
    ]
    assert [str(r) for r in wiring.readers[-2:]] == ["5[3]", "5[4]"]
    assert int(wiring.possible.sum()) == 2 * 3 + 3 * 4 + 4 * 5


def test_cutting_edges_is_cutting_weights(net: Net) -> None:
    wiring = wire(net)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 3, 2, 8, 8, generator=generator)
    values = wiring.record(net.call(x)).values
    zeros = [torch.zeros_like(v) for v in values]
    cut = torch.from_numpy(wiring.possible).float() * (
        torch.rand(wiring.possible.shape, generator=generator) < 0.4
    )
    got = wiring.run(net.call(x), zeros, cut[None])
    by_hand = small_cnn()
    first = 0
    with torch.no_grad():
        for layer, offset, repeat in ((by_hand[0], 0, 1), (by_hand[2], 2, 1), (by_hand[5], 5, 4)):
            out, inside = layer.weight.shape[:2]
            kept = 1 - cut[first : first + out, offset : offset + inside // repeat]
            kept = kept.repeat_interleave(repeat, 1)
            layer.weight *= kept.reshape(out, inside, *[1] * (layer.weight.ndim - 2))
            first += out
        want = by_hand(x)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(want, small_cnn()(x), atol=1e-2)
    other = wiring.record(net.call(y)).values
    everything = torch.ones(1, *wiring.possible.shape)
    assert torch.allclose(wiring.run(net.call(x), other, everything), small_cnn()(y), atol=1e-5)


def test_masks_by_example(net: Net) -> None:
    """A batch of masks gives what each of them gives alone."""
    wiring = wire(net)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 8, 8, generator=generator)
    zeros = [torch.zeros_like(v) for v in wiring.record(net.call(x)).values]
    cut = (torch.rand(3, *wiring.possible.shape, generator=generator) < 0.3).float()
    together = wiring.run(net.call(x), zeros, cut)
    for i in range(3):
        alone = wiring.run(net.call(x[i : i + 1]), [z[:1] for z in zeros], cut[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-5)


def test_steps_of_a_recurrent_cell_are_layers_of_their_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(x.shape[0], 3)
            for t in range(3):
                h = self.cell(torch.cat([x[:, t], h], 1)).tanh()
            return self.head(h)

    torch.manual_seed(0)
    net = patchclamp.open(Recurrent().eval(), torch.zeros(2, 3, 2))
    wiring = wire(net)
    sites = list(dict.fromkeys(r.node.site for r in wiring.readers))
    assert sites == ["cell@0", "cell@1", "cell@2", "head"]
    hidden = {str(w) for w in wiring.writers}
    assert {"cell@0[1]", "cell@1[2]", "cell@2[0]"} <= hidden


def test_a_mixture_of_units_is_a_writer_of_its_own() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            return self.c(h + self.b(h).relu())

    torch.manual_seed(0)
    net = patchclamp.open(Skip().eval(), torch.zeros(2, 3))
    wiring = wire(net, "layers")
    own = [w for w in wiring.writers if w.site not in (":input", "a", "b")]
    assert len(own) == 3
    column = wiring.writers.index(own[1])
    fed = {str(r) for r, on in zip(wiring.readers, wiring.feeds[:, column], strict=True) if on}
    assert fed == {"a[1]", "b[1]"}


def test_what_cannot_be_followed_is_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)).eval()
    net = patchclamp.open(grouped, torch.zeros(2, 4, 3, 3))
    with pytest.raises(EngineError, match="grouped"):
        find_layers(net.graph.capture.graph)
    plain = patchclamp.open(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), torch.zeros(2, 4))
    with pytest.raises(EngineError, match="no linear or convolutional layer"):
        find_layers(plain.graph.capture.graph)

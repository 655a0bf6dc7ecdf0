"""A user's architecture on the bench of glyphs: trained anew, left alone, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError
from patchclamp.truth.attribution.fitting import anywhere
from patchclamp.truth.attribution.likeness import Alike, alike, glyphs_for
from tests.networks import opened
from tests.snapshots import snapshot


class Fixed(nn.Module):
    """A weight that nothing draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.head = nn.Linear(3 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((x * self.scale[:, None, None]).flatten(1))
        return y


def colour() -> patchclamp.Net:
    inner = anywhere((3, 16, 16), 6).eval()
    return patchclamp.open(inner, torch.rand(2, 3, 16, 16))


def test_the_copy_has_other_weights_and_the_network_its_own() -> None:
    net = colour()
    weights = [p.detach().clone() for p in net.module.parameters()]
    made = alike(net, 3)((1, 16, 16), 4)
    assert isinstance(made, Alike)
    assert made(torch.rand(2, 1, 16, 16)).shape == (2, 4)
    pairs = zip(made.module.parameters(), weights, strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert all(map(torch.equal, net.module.parameters(), weights))
    before = snapshot(net.module)
    bench = glyphs_for(net)
    assert bench.size == 16
    assert snapshot(net.module) == before


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    small, _ = opened("digits_cnn")
    with pytest.raises(EngineError, match="14 pixels"):
        glyphs_for(small)
    text, _ = opened("tiny_lm")
    with pytest.raises(EngineError, match="square image"):
        glyphs_for(text)
    with pytest.raises(EngineError, match="scale"):
        glyphs_for(patchclamp.open(Fixed().eval(), torch.rand(2, 3, 16, 16)))
    with pytest.raises(EngineError, match="too long"):
        glyphs_for(colour(), seconds=1e-6)

"""Relevance finds what a network was built to use, and nothing where it uses nothing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.attribution.base import Explainer
from patchclamp.methods.attribution.relevance.attention import (
    AttentionRelevance,
    AttentionRollout,
)
from patchclamp.methods.attribution.relevance.deep_lift import DeepLift
from patchclamp.methods.attribution.relevance.guided import GuidedBackprop
from patchclamp.methods.attribution.relevance.lrp import LRP
from patchclamp.net import Net

SIZE, AT = 8, (slice(2, 5), slice(3, 6))


class Glyph(nn.Module):
    """Class 1 grows with a 3 x 3 patch that looks like a cross; a residual of the rest is 0.

    The evidence goes through a function in place, a product with a gate that is open at the
    glyph, a norm and a residual sum, none of them a module.
    """

    def __init__(self) -> None:
        super().__init__()
        cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
        self.register_buffer("seen", torch.zeros(SIZE, SIZE))
        self.seen[AT] = cross
        self.register_buffer("rest", torch.ones(SIZE, SIZE) - (self.seen != 0).float())

    def forward(self, x: Tensor) -> Tensor:
        picture = x[:, 0]
        found = (picture * self.seen).flatten(1).sum(1, keepdim=True) - 1.0
        found = found.relu_() * torch.sigmoid(4 * (found - 2))
        nothing = (picture * self.rest * 0.0).flatten(1).sum(1, keepdim=True)
        evidence = found + nothing
        return torch.cat([torch.zeros_like(evidence), evidence], 1)


def with_glyph(num: int = 4) -> Tensor:
    x = torch.rand(num, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) * 0.3
    x[:, 0, 3, 3:6] += 0.7
    x[:, 0, 2:5, 4] += 0.7
    return x


@pytest.mark.parametrize("method", [DeepLift(), LRP(), GuidedBackprop()], ids=lambda m: m.name)
def test_all_relevance_is_on_the_glyph(method: Explainer) -> None:
    x = with_glyph()
    net = glyph()
    found = method.run(net, x, 1).values[:, 0]
    off = found * (net.module.seen == 0)
    assert bool((off == 0).all())
    assert bool((found[:, 3, 4] > 0.05).all())
    nothing = method.run(net, x, 0).values  # the other class depends on no pixel
    assert float(nothing.abs().max()) == 0


class Reading(nn.Module):
    """The first token attends to the token whose feature says so, and its value is the class."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.last = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]  # one head
        marks, values = h[..., :1], h[..., 1:]
        asking = self.sharpness * torch.ones_like(marks)
        read = nn.functional.scaled_dot_product_attention(asking, marks, values)
        return self.last(read[:, 0, 0])


@cache
def reading(sharpness: float) -> Net:
    return patchclamp.open(Reading(sharpness).eval(), tokens(3))


@cache
def glyph() -> Net:
    return patchclamp.open(Glyph().eval(), with_glyph())


def tokens(marked: int) -> Tensor:
    x = torch.zeros(2, 5, 3)
    x[:, marked, 0] = 1.0
    x[:, :, 1] = torch.linspace(0.5, 1.0, 5)
    x[:, :, 2] = 0.25
    return x


@pytest.mark.parametrize("method", [AttentionRollout(), AttentionRelevance()], ids=lambda m: m.name)
@pytest.mark.parametrize("marked", [1, 3])
def test_attention_finds_the_token_that_is_read(method: Explainer, marked: int) -> None:
    net = reading(9.0)
    found = method.run(net, tokens(marked), 0).values[:, 1:]
    assert bool((found.argmax(1) == marked - 1).all())
    assert float((found[:, marked - 1] / found.sum(1)).min()) > 0.99


def test_attention_that_prefers_nothing_gives_nothing_to_prefer() -> None:
    net = reading(0.0)
    found = AttentionRollout(residual=0.0).run(net, tokens(3), 0).values
    torch.testing.assert_close(found, torch.full((2, 5), 0.2).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [DeepLift(), LRP()], ids=lambda m: m.name)
def test_relevance_of_values_goes_where_attention_reads(method: Explainer) -> None:
    x = tokens(3)
    net = reading(9.0)
    found = method.run(net, x, 0).values
    share = found[:, :, 1].abs() / found[:, :, 1].abs().sum(1, keepdim=True)
    assert float(share[:, 3].min()) > 0.5
    assert float(found[:, :, 2].abs().max()) == 0  # the feature of the other class

"""Rollout and gradient-weighted rollout by hand, and where there is nothing to follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, SiteError, TargetError
from patchclamp.methods.attribution.relevance.attention import (
    AttentionRelevance,
    AttentionRollout,
)
from tests.networks import opened


def by_hand(patterns: list[Tensor]) -> Tensor:
    num = patterns[0].shape[-1]
    total = torch.eye(num).double()
    for pattern in patterns:
        total = (pattern.double().mean(1) + torch.eye(num)) / 2 @ total
    return total


@pytest.mark.parametrize(("network", "row"), [("vit", 0), ("tiny_lm", -1)])
def test_rollout_is_the_product_of_the_patterns(network: str, row: int) -> None:
    net, x = opened(network)
    acts = net.record(x, "attn.*.pattern", engine="graph")
    expected = by_hand([acts.tensor(name) for name in acts])[:, row]
    found = AttentionRollout().run(net, x, 3)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.values.sum(1), torch.ones(3).double(), rtol=1e-5, atol=0)
    named = AttentionRollout(position=row).run(net, x, 3)
    torch.testing.assert_close(found.values, named.values)
    other = AttentionRollout().run(net, x, 4)  # rollout does not know of classes
    torch.testing.assert_close(found.values, other.values)


def test_relevance_weights_patterns_by_gradients() -> None:
    net, x = opened("vit")
    sites = ["attn.0.pattern", "attn.1.pattern"]
    _, grads, acts = net.gradients(x, sites, 3, engine="graph")
    total = torch.eye(acts.tensor(sites[0]).shape[-1])
    for site in sites:
        total = total + (acts.tensor(site) * grads.tensor(site)).clamp(min=0).mean(1) @ total
    found = AttentionRelevance().run(net, x, 3)
    torch.testing.assert_close(found.values.float(), total[:, 0], rtol=1e-4, atol=1e-6)
    other = AttentionRelevance().run(net, x, 4)
    assert float((other.values - found.values).abs().max()) > 1e-4


def test_the_future_gets_nothing() -> None:
    net, x = opened("tiny_lm")
    for method in (AttentionRollout(), AttentionRelevance()):
        found = method.run(net, x, lambda y: y[:, 3, 5])  # read at the fourth position
        assert bool((found.values[:, 4:] == 0).all())
        assert bool((found.values[:, :4] != 0).any(0).all())


def test_refusals() -> None:
    net, x = opened("digits_cnn")
    with pytest.raises(SiteError, match="no attention patterns"):
        AttentionRollout().run(net, x, 1)
    net, x = opened("vit")
    with pytest.raises(OptionError, match="no such position"):
        AttentionRollout(position=17).run(net, x, 1)
    with pytest.raises(OptionError, match="residual"):
        AttentionRollout(residual=1.0).run(net, x, 1)
    with pytest.raises(OptionError, match="all layers"):
        AttentionRollout().run(net, x, 1, at="attn.0.pattern")
    with pytest.raises(TargetError, match=r"does not depend|no gradient"):
        AttentionRollout().run(net, x, lambda y: (y * 0).sum(1))

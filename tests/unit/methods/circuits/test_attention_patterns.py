"""Patterns by layer, and the keys that a head looks at most."""

from __future__ import annotations

import math

import pytest
import torch

from patchclamp.core.errors import OptionError, SiteError
from patchclamp.methods.circuits.heads.attention_patterns import (
    AttentionPatterns,
    is_causal,
    patterns,
)
from tests.networks import fresh, opened


def test_patterns_are_those_of_the_formula() -> None:
    net, ids = opened("tiny_lm")
    found = patterns(net, ids, batch_size=2)
    assert list(found) == [0, 1]
    acts = net.record(ids, ["attn.1.q", "attn.1.k"])
    q, k = (acts.tensor(f"attn.1.{s}").transpose(1, 2) for s in "qk")
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1)
    assert torch.allclose(found[1], expected, atol=1e-6)
    assert is_causal(found)


def test_the_strongest_attention_and_the_spread_of_a_uniform_head() -> None:
    import patchclamp

    lm, ids = fresh("tiny_lm")
    with torch.no_grad():
        lm.blocks[0].attn.q_proj.weight.zero_()
        lm.blocks[0].attn.q_proj.bias.zero_()
    table = AttentionPatterns(top=2).run(patchclamp.open(lm, ids), ids)
    assert table.height == 2 * 4 * ids.shape[0] * 2
    flat = table.filter(layer=0, rank=0)
    assert set(flat["query"]) == {0}  # the first query sees one key only
    assert set(flat["attention"]) == {1.0}
    mean = sum(range(1, ids.shape[1] + 1)) / ids.shape[1]
    assert flat["spread"].to_list() == pytest.approx([mean] * flat.height, rel=1e-5)


def test_no_attention_and_bad_options_are_refused() -> None:
    net, images = opened("digits_mlp")
    with pytest.raises(SiteError, match="no attention was found"):
        patterns(net, images)
    lm, ids = opened("tiny_lm")
    with pytest.raises(OptionError, match="top must be"):
        AttentionPatterns(top=0).run(lm, ids)

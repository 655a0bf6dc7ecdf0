"""Targets, nulls and errors of head typing; planted heads are in tests/planted/test_heads.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.circuits.heads.head_kinds import HeadKind, targets_of
from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of
from tests.networks import Attend, fresh, opened, tiny_bert, tiny_llama
from tests.snapshots import snapshot

SMALL = HeadTyping(num_rows=6, length=30, num_nulls=19, num_sources=4)


def test_targets_of_a_row_by_hand() -> None:
    made = targets_of(torch.tensor([[5, 6, 7, 5, 6, 5]]))
    keys = {
        kind: {q: t[0, q].nonzero()[:, 0].tolist() for q in range(6) if t[0, q].any()}
        for kind, t in made.items()
    }
    assert keys[HeadKind.PREVIOUS] == {2: [1], 3: [2], 4: [3], 5: [4]}
    assert keys[HeadKind.CURRENT] == {q: [q] for q in range(2, 6)}
    assert keys[HeadKind.FIRST] == {q: [0] for q in range(2, 6)}
    assert keys[HeadKind.DUPLICATE] == {3: [0], 4: [1], 5: [0, 3]}
    assert keys[HeadKind.INDUCTION] == {3: [1], 4: [2], 5: [1, 4]}


def test_a_uniform_head_scores_what_chance_gives() -> None:
    """All query weights zero: every score is the closed form of uniform causal attention."""
    lm, _ = fresh("tiny_lm")
    with torch.no_grad():
        for block in lm.blocks:
            block.attn.q_proj.weight.zero_()
    net = patchclamp.open(lm, torch.randint(0, 256, (2, 8)))
    tokens = SMALL.tokens(net)
    table = SMALL.run(net)
    uniform = 1 / torch.arange(1, tokens.shape[1] + 1).double()
    for kind, target in targets_of(tokens).items():
        share = (target.double().sum(2) * uniform).sum(1) / target.any(2).sum(1)
        for got in table.filter(kind=str(kind))["score"]:
            assert got == pytest.approx(float(share.mean()), abs=1e-6)
        assert not table.filter(kind=str(kind))["found"].any()


def test_grouped_heads_and_random_ids_of_the_vocabulary() -> None:
    pytest.importorskip("transformers")
    net = patchclamp.open(tiny_llama(), {"input_ids": torch.randint(3, 90, (2, 8))})
    tokens = SMALL.tokens(net)
    assert int(tokens.max()) < 97
    assert any(int(a) != int(b) for a, b in zip(tokens[0], tokens[1], strict=True))
    table = SMALL.run(net)
    assert table.height == 2 * 4 * 6  # four query heads over two key heads
    assert list(kinds_of(table)) == [(n, h) for n in range(2) for h in range(4)]


def test_an_encoder_looks_both_ways_and_has_no_unembedding_to_copy_into() -> None:
    pytest.importorskip("transformers")
    net = patchclamp.open(tiny_bert(), {"input_ids": torch.randint(3, 90, (2, 8))})
    with pytest.raises(InputError, match=r"vocabulary.*unknown.*vocabulary="):
        SMALL.run(net)
    table = HeadTyping(num_rows=4, length=20, num_nulls=49, vocabulary=97).run(net)
    assert set(table["kind"]) == {str(k) for k in HeadKind} - {"copy"}


class NoAdapter(nn.Module):
    """A language model of a class that no adapter knows; its head 0 looks at its own token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), Attend("eager", num_heads=2)
        self.unembed = nn.Linear(16, 50)
        with torch.no_grad():
            self.embed.weight.copy_(8 * nn.functional.normalize(torch.randn(50, 16)))
            for weight in (self.mix.q.weight, self.mix.k.weight):
                weight.copy_(torch.eye(16))
            self.mix.q.weight[8:].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits: Tensor = self.unembed(x + self.mix(x))
        return logits


def test_attention_is_found_by_structure_where_no_adapter_knows_the_network() -> None:
    torch.manual_seed(0)
    net = patchclamp.open(NoAdapter().eval(), torch.randint(0, 50, (2, 8)))
    table = SMALL.run(net)
    assert table.height == 2 * 5  # without an adapter nobody knows what a head writes
    found = kinds_of(table)
    assert {HeadKind.CURRENT, HeadKind.DUPLICATE} <= set(found[0, 0])
    assert found[0, 1] == ()


def test_the_same_seed_gives_the_same_table_and_the_network_is_as_found() -> None:
    net, _ = opened("tiny_lm")
    before = snapshot(net.module)
    first, second = SMALL.run(net), SMALL.run(net)
    assert first.equals(second)
    assert snapshot(net.module) == before
    assert bool((first["low"] <= first["score"]).all() and (first["score"] <= first["high"]).all())


def test_networks_without_tokens_and_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="does not take token ids"):
        HeadTyping().run(opened("vit")[0])
    with pytest.raises(OptionError, match="too little to type heads"):
        HeadTyping(num_nulls=5).run(opened("tiny_lm")[0])

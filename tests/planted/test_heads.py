"""Heads whose work is planted by hand or known by training must be typed, and random ones not."""

from __future__ import annotations

from functools import cache

import polars as pl
import torch
from torch import nn

import patchclamp
from patchclamp.methods.circuits.heads.head_kinds import HeadKind
from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of
from patchclamp.net import Net
from patchclamp.specimens import build

CONTEXT, WIDTH, UNITS, VOCAB = 40, 128, 64, 88


def planted() -> nn.Module:
    """Layer 0: head 0 looks one back, head 1 at its own token's occurrences and copies it.
    Layer 1: untrained. Positions are written in the first 40 dimensions, tokens in the others."""
    torch.manual_seed(0)
    lm = build(
        "tiny_lm", vocab=VOCAB, context=CONTEXT, width=WIDTH, num_layers=2, num_heads=2, mlp_width=8
    ).eval()
    token = torch.zeros(VOCAB, WIDTH)
    token[:, CONTEXT:] = torch.eye(VOCAB)
    with torch.no_grad():
        lm.embed.weight.copy_(token)
        lm.position.weight.zero_()
        lm.position.weight[:, :CONTEXT] = torch.eye(CONTEXT)
        lm.unembed.weight.copy_(token)
        attn = lm.blocks[0].attn
        for p in attn.parameters():
            p.zero_()
        back = torch.arange(CONTEXT - 1)
        attn.q_proj.weight[back, back + 1] = 6.0  # query at i + 1 asks for key i
        attn.k_proj.weight[back, back] = 1.0
        mix = torch.linalg.qr(torch.randn(VOCAB, UNITS))[0].T  # tokens in the units of a head
        attn.q_proj.weight[UNITS:, CONTEXT:] = 6.0 * mix
        attn.k_proj.weight[UNITS:, CONTEXT:] = mix
        attn.v_proj.weight[UNITS:, CONTEXT:] = mix
        attn.o_proj.weight[CONTEXT:, UNITS:] = mix.T
        for p in lm.blocks[0].mlp.parameters():
            p.zero_()
    return lm


def opened(lm: nn.Module, vocab: int) -> Net:
    return patchclamp.open(lm, torch.randint(0, vocab, (2, 8)))


@cache
def bundled() -> pl.DataFrame:
    return HeadTyping().run(patchclamp.open("tiny-lm"))


def score(table: pl.DataFrame, layer: int, head: int, kind: HeadKind) -> float:
    return table.filter(layer=layer, head=head, kind=str(kind))["score"].item()


def test_planted_heads_are_typed_and_untrained_ones_beside_them_are_not() -> None:
    table = HeadTyping(length=CONTEXT).run(opened(planted(), VOCAB))
    found = kinds_of(table)
    assert found[0, 0] == (HeadKind.PREVIOUS,)
    assert set(found[0, 1]) == {HeadKind.CURRENT, HeadKind.DUPLICATE, HeadKind.COPY}
    assert found[1, 0] == found[1, 1] == ()
    assert score(table, 0, 0, HeadKind.PREVIOUS) > 0.95
    assert score(table, 0, 1, HeadKind.COPY) > 0.95


def test_the_heads_of_the_bundled_language_model_are_found() -> None:
    found = kinds_of(bundled())
    assert [h for h, kinds in found.items() if HeadKind.PREVIOUS in kinds] == [(0, 3)]
    induction = {h for h, kinds in found.items() if HeadKind.INDUCTION in kinds}
    assert {(1, 0), (1, 3)} <= induction
    assert all(layer == 1 for layer, _ in induction)
    assert score(bundled(), 1, 3, HeadKind.INDUCTION) > 0.8
    assert {HeadKind.INDUCTION, HeadKind.COPY} <= set(found[1, 3])


def test_random_weights_hold_no_typed_head() -> None:
    torch.manual_seed(11)
    table = HeadTyping(num_rows=24, length=48).run(opened(build("tiny_lm").eval(), 256))
    assert table.height == 2 * 4 * 6
    assert not table["found"].any()


def test_shuffled_weights_of_the_trained_model_hold_no_typed_head() -> None:
    """As large as the trained weights, but with no mechanism in them."""
    lm = patchclamp.open("tiny-lm").module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    table = HeadTyping(num_rows=24, length=48).run(opened(lm, 256))
    assert not table.filter(pl.col("kind").is_in(["previous", "induction", "duplicate"]))[
        "found"
    ].any()

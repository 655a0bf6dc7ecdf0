"""Closed forms of OV and QK, and planted copying heads."""

from __future__ import annotations

import pytest
import torch

import patchclamp
from patchclamp.methods.circuits.heads.head_spectra import (
    HeadSpectra,
    copying,
    effective_rank,
    ov,
    qk,
    singular_values,
)
from tests.networks import fresh, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("maker", [tiny_gpt2, tiny_llama])
def test_ov_is_what_a_head_writes_when_it_sees_one_token(maker: object) -> None:
    """A row of one token: attention is 1, so z is the value and OV times the norm is the output."""
    pytest.importorskip("transformers")
    ids = torch.tensor([[5], [9], [11]])
    net = patchclamp.open(maker(), {"input_ids": torch.arange(3, 17).reshape(2, 7)})
    family = net.anatomy_family
    layer = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    attn = f"{layer}.attn.c_attn:input" if family == "gpt2" else f"{layer}.self_attn.v_proj:input"
    names = [attn, "attn.1.out", "attn.1.q", "attn.1.k"]
    acts = net.record({"input_ids": ids}, names, engine="hooks")
    x = acts.tensor(attn)[:, 0]
    written = sum(x @ ov(net, 1, head) for head in range(4))
    assert torch.allclose(written, acts.tensor("attn.1.out")[:, 0], atol=1e-5)
    q, k = acts.tensor("attn.1.q")[:, 0], acts.tensor("attn.1.k")[:, 0]
    shared = q.shape[1] // k.shape[1]
    for head in range(4):
        expected = (q[:, head] @ k[:, head // shared].T) / q.shape[2] ** 0.5
        assert torch.allclose(x @ qk(net, 1, head) @ x.T, expected, atol=1e-5)


def test_singular_values_and_effective_rank_in_closed_form() -> None:
    left, right = torch.randn(30, 5), torch.randn(5, 30)
    expected = torch.linalg.svdvals((left @ right).double())[:5]
    assert torch.allclose(singular_values(left, right), expected, rtol=1e-5)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert copying(torch.tensor([2.0, 1.0])) == 1
    assert copying(torch.tensor([1j, -1j])) == 0
    assert copying(torch.tensor([-1.0])) == -1


def test_a_planted_copying_head_is_found_and_random_ones_are_not() -> None:
    lm, ids = fresh("tiny_lm")
    with torch.no_grad():
        lm.unembed.weight.copy_(lm.embed.weight)
        attn = lm.blocks[0].attn
        size = attn.head_dim
        attn.o_proj.weight[:, size : 2 * size] = attn.v_proj.weight[size : 2 * size].T
        attn.o_proj.weight[:, 2 * size : 3 * size] = -attn.v_proj.weight[2 * size : 3 * size].T
    table = HeadSpectra(num_nulls=39).run(patchclamp.open(lm, ids))
    planted = {(0, 1): 1, (0, 2): -1}
    for row in table.iter_rows(named=True):
        sign = planted.get((row["layer"], row["head"]), 0)
        if sign:
            assert row["copying"] * sign > 0.95
            assert row["p"] == pytest.approx(1 / 40)
        else:
            assert abs(row["copying"]) < 0.6
            assert row["p"] > 1 / 40
    assert len(table["ov_values"][0]) == 32


def test_a_dense_matrix_over_the_vocabulary_has_the_same_copying_score() -> None:
    lm, ids = fresh("tiny_lm")
    net = patchclamp.open(lm, ids)
    table = HeadSpectra(num_nulls=1).run(net)
    centred = lm.unembed.weight.double() * lm.norm.weight.double()
    centred = centred - centred.mean(1, keepdim=True)
    full = lm.embed.weight.double() @ ov(net, 1, 2).double() @ centred.T
    expected = copying(torch.linalg.eigvals(full.detach()))
    got = table.filter(layer=1, head=2)["copying"].item()
    assert got == pytest.approx(expected, abs=1e-6)

"""Parts add up exactly; a planted writer gets all of it; answers of other rows get none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.circuit import Node
from patchclamp.core.errors import EngineError, InputError, SiteError
from patchclamp.data.induction import repeats
from patchclamp.methods.circuits.heads.logit_attribution import LogitAttribution
from patchclamp.net import Net
from tests.networks import fresh, opened, tiny_gpt2, tiny_llama

IDS = torch.arange(3, 31).reshape(4, 7)
RIGHT, WRONG = torch.tensor([1, 5, 9, 40]), torch.tensor([2, 60, 7, 8])
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "tiny_lm": lambda: fresh("tiny_lm")[0],
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
}


def net_of(family: str, dtype: torch.dtype) -> tuple[Net, object]:
    inputs = IDS if family == "tiny_lm" else {"input_ids": IDS}
    return patchclamp.open(MAKERS[family]().to(dtype), inputs), inputs


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("tiny_lm", torch.float32), *((family, torch.float64) for family in MAKERS)],
)
def test_parts_and_constant_add_up_to_the_logit_difference(family: str, dtype: torch.dtype) -> None:
    if family != "tiny_lm":
        pytest.importorskip("transformers")
    net, inputs = net_of(family, dtype)
    for module in net.module.modules():  # biases that matter
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    method = LogitAttribution(position=4, num_nulls=3)
    made = method.run(net, inputs, RIGHT, WRONG)
    logits = net.run(inputs).output[:, 4]
    rows = torch.arange(4)
    expected = logits[rows, RIGHT] - logits[rows, WRONG]
    # Llama's norm works in float32 whatever the type of the model
    tolerance = 1e-4 if dtype is torch.float32 else 5e-6 if family == "llama" else 1e-9
    assert torch.allclose(made.difference, expected, atol=tolerance, rtol=0)
    assert torch.allclose(made.parts.sum(0) + made.constant, expected, atol=tolerance, rtol=0)
    by_source = method.by_source(net, inputs, RIGHT, WRONG)
    for n in range(2):
        heads = [i for i, w in enumerate(made.writers) if w.site == f"attn.{n}.z"]
        assert torch.allclose(by_source[n].sum(-1).T, made.parts[heads], atol=tolerance)


def test_writers_are_named_and_a_table_of_positions_is_told_apart() -> None:
    net, _ = opened("tiny_lm")
    made = LogitAttribution(num_nulls=3).run(net, IDS, RIGHT, WRONG)
    heads = [[Node(f"attn.{n}.z", h) for h in range(4)] + [Node(f"mlp.{n}.out")] for n in (0, 1)]
    assert made.writers == (Node("embed"), Node("position"), *heads[0], *heads[1])


def test_a_planted_writer_has_the_whole_difference_and_the_others_none() -> None:
    """All but one head write nothing, and that head writes the right answer's direction."""
    lm, _ = fresh("tiny_lm")
    with torch.no_grad():
        for block in lm.blocks:
            for part in (block.attn.o_proj, block.mlp.down):
                part.weight.zero_()
                part.bias.zero_()
        lm.embed.weight.mul_(1e-3)
        lm.position.weight.zero_()
        attn = lm.blocks[1].attn
        attn.v_proj.weight.zero_()
        attn.v_proj.bias.fill_(1.0)
        size = attn.head_dim
        attn.o_proj.weight[:, 2 * size : 3 * size] = lm.unembed.weight[77][:, None]
    net = patchclamp.open(lm, IDS)
    right, wrong = torch.full((4,), 77), torch.tensor([3, 4, 5, 6])
    made = LogitAttribution().run(net, IDS, right, wrong)
    table = made.table()
    assert table["writer"][0] == "attn.1.z[2]"
    assert table["effect"][0] == pytest.approx(float(made.difference.mean()), rel=0.01)
    assert table["effect"].abs()[1] < 0.01 * table["effect"][0]


def test_induction_heads_write_the_answer_and_the_wrong_answers_of_other_rows_do_not() -> None:
    net = patchclamp.open("tiny-lm")
    rows = repeats(24, length=80, periods=(20, 24, 31), prefixes=(2, 5), seed=3).input_ids
    ids, right = rows[:, :-1], rows[:, -1]
    wrong = (right - 32 + 11) % 95 + 32
    table = LogitAttribution(num_nulls=99).run(net, ids, right, wrong).table()
    by_name = {row["writer"]: row for row in table.iter_rows(named=True)}
    for name in ("attn.1.z[0]", "attn.1.z[3]"):
        assert by_name[name]["low"] > by_name[name]["null_high"]
        assert by_name[name]["p"] == pytest.approx(0.01)
    # control: pairs of tokens that have nothing to do with the rows; p is as chance has it
    ps = []
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        one, two = torch.randint(32, 127, (2, 24), generator=generator)
        control = LogitAttribution(num_nulls=39).run(net, ids, one, two)
        ps.append(control.nulls[control.writers.index(Node("attn.1.z", 3))].p)
    assert sum(p is not None and p <= 0.05 for p in ps) <= 3
    assert sum(p is not None and p > 0.5 for p in ps) >= 3
    # one pair for all rows: the null is drawn from random tokens instead
    shared = LogitAttribution(num_nulls=9).run(net, ids, right[:1].repeat(24), wrong[:1].repeat(24))
    assert "random pairs" in shared.nulls[0].kind


def test_bad_tokens_positions_and_networks_are_refused() -> None:
    net, _ = opened("tiny_lm")
    with pytest.raises(InputError, match="outside the vocabulary"):
        LogitAttribution().run(net, IDS, RIGHT, torch.full((4,), 256))
    with pytest.raises(InputError, match="no position 9"):
        LogitAttribution(position=9).run(net, IDS, RIGHT, WRONG)
    with pytest.raises(InputError, match="one token a row"):
        LogitAttribution().run(net, IDS, RIGHT[:2], WRONG)
    with pytest.raises(SiteError, match=r"norm\.final"):
        LogitAttribution().run(opened("vit")[0], opened("vit")[1], RIGHT[:3], WRONG[:3])


def test_a_stream_that_is_scaled_between_layers_is_refused() -> None:
    lm, _ = fresh("tiny_lm")
    forward = lm.blocks[0].forward
    lm.blocks[0].forward = lambda x: 0.5 * forward(x)
    net = patchclamp.open(lm, IDS)
    with pytest.raises(EngineError, match="does not add up"):
        LogitAttribution().run(net, IDS, RIGHT, WRONG)

"""A head that needs exactly two directions, and heads that a task needs only in part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patchclamp
from patchclamp.core.edit_kinds import edit_from_dict
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.data.induction import repeats
from patchclamp.methods.circuits.heads.low_rank import (
    HeadCompression,
    survival_table,
)
from patchclamp.net import Net
from tests.networks import fresh


class Difference:
    """logit(right) - logit(wrong) at the last position."""

    name = "logit difference"
    position = -1

    def __init__(self, right: Tensor, wrong: Tensor) -> None:
        self.right, self.wrong = right, wrong

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        at = torch.arange(len(rows))
        return output[at, self.right[rows]] - output[at, self.wrong[rows]]


def induction(num: int, seed: int) -> tuple[Tensor, Difference]:
    rows = repeats(num, length=64, periods=(16, 20, 24), prefixes=(0, 3, 6), seed=seed).input_ids
    right = rows[:, -1]
    return rows[:, :-1], Difference(right, (right - 32 + 7) % 95 + 32)


def two_directions() -> tuple[Net, Tensor, Difference]:
    """Values of head 1.0 vary in 32 dimensions, but only two of them reach the answer."""
    lm, _ = fresh("tiny_lm")
    torch.manual_seed(0)
    with torch.no_grad():
        for block in lm.blocks:
            for part in (block.attn.o_proj, block.mlp.down):
                part.weight.zero_()
                part.bias.zero_()
        attn = lm.blocks[1].attn
        size = attn.head_dim
        basis = torch.linalg.qr(torch.randn(128, size))[0].T
        attn.v_proj.weight[:size] = basis * torch.tensor([6.0, 6.0] + [0.3] * 30)[:, None]
        attn.v_proj.bias.zero_()
        attn.o_proj.weight[:, :2] = torch.randn(128, 2)
    ids = torch.randint(0, 256, (24, 6))
    net = patchclamp.open(lm, ids)
    logits = net.run(ids).output[:, -1]
    return net, ids, Difference(logits.argmax(1), logits.argmin(1))


def test_two_planted_directions_carry_the_task_and_random_ones_do_not() -> None:
    net, ids, metric = two_directions()
    method = HeadCompression(layer=1, head=0, slot="v", ranks=(1, 2, 32), num_nulls=19)
    made = {s.rank: s for s in method.run(net, ids, metric)}
    assert made[2].share is not None
    assert made[1].share is not None
    assert made[2].share > 0.98
    assert made[1].share < 0.9
    assert made[32].share == pytest.approx(1, abs=1e-4)
    assert made[32].variance == pytest.approx(1)
    null = made[2].null
    assert null is not None
    assert null.high is not None
    assert null.high < 0.5
    assert null.p == pytest.approx(0.05)
    edit = edit_from_dict(made[2].edits[0].to_dict())  # plain data that can be run again
    again = net.run(ids, edits=edit).output[:, -1]
    assert float(metric(again, torch.arange(24)).mean()) == pytest.approx(made[2].metric, rel=1e-4)


def test_previous_token_keys_need_few_directions_on_the_bundled_model() -> None:
    net = patchclamp.open("tiny-lm")
    ids, metric = induction(16, seed=1)
    other, other_metric = induction(16, seed=2)
    method = HeadCompression(layer=0, head=3, slot="k", ranks=(8,), num_nulls=5)
    table = survival_table(method.run(net, ids, metric, broad=(other, other_metric)))
    assert table["distribution"].to_list() == ["task", "broad"]
    assert min(table["share"].to_list()) > 0.9
    assert max(table["null_high"].to_list()) < 0.5


def test_a_head_that_does_not_matter_has_nothing_to_survive() -> None:
    net, ids, metric = two_directions()
    with pytest.raises(DataError, match=r"head 1\.2 does not matter here"):
        HeadCompression(layer=1, head=2, slot="v", ranks=(1,)).run(net, ids, metric)


def test_directions_of_a_task_are_a_partial_account_elsewhere() -> None:
    """Tokens of the task move one planted direction, those of the broad distribution another."""
    net, _, _ = two_directions()
    lm = net.module
    kind = (torch.arange(256) >= 128).long()
    with torch.no_grad():
        lm.position.weight.zero_()
        basis = lm.blocks[1].attn.v_proj.weight[:2] / 6.0
        lm.embed.weight.mul_(0.1).add_(torch.randn(256, 1) * basis[kind])
    task, broad = torch.randint(0, 128, (24, 6)), torch.randint(128, 256, (24, 6))

    def metric_of(ids: Tensor) -> Difference:
        logits = net.run(ids).output[:, -1]
        return Difference(logits.argmax(1), logits.argmin(1))

    method = HeadCompression(layer=1, head=0, ranks=(1,), positions=range(6), num_nulls=3)
    made = method.run(net, task, metric_of(task), broad=(broad, metric_of(broad)))
    on_task, elsewhere = made
    assert (on_task.distribution, elsewhere.distribution) == ("task", "broad")
    assert on_task.share is not None
    assert elsewhere.share is not None
    assert on_task.share > 0.95
    assert elsewhere.share < 0.3
    assert on_task.edits[0].where == {"head": [0], "position": list(range(6))}


def test_bad_options_are_refused() -> None:
    net, ids, metric = two_directions()
    with pytest.raises(OptionError, match="no such slot"):
        HeadCompression(layer=1, head=0, slot="z").run(net, ids, metric)
    with pytest.raises(OptionError, match="ranks must lie"):
        HeadCompression(layer=1, head=0, ranks=(33,)).run(net, ids, metric)
    with pytest.raises(SiteError, match="no head 4"):
        HeadCompression(layer=1, head=4).run(net, ids, metric)

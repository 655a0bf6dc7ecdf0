"""A network broken at one head is repaired by holding that head, and not by another."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import patchclamp
from patchclamp.core.edit_kinds import edit_from_dict
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.data.induction import repeats
from patchclamp.methods.circuits.comparing.repair import (
    Repair,
    attend_to,
    hold_outputs,
    hold_patterns,
)
from patchclamp.net import Net


class Difference:
    """logit(right) - logit(wrong) at the last position."""

    name = "logit difference"
    position = -1

    def __init__(self, right: Tensor, wrong: Tensor) -> None:
        self.right, self.wrong = right, wrong

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        at = torch.arange(len(rows))
        return output[at, self.right[rows]] - output[at, self.wrong[rows]]


@cache
def task() -> tuple[Tensor, Difference]:
    rows = repeats(16, length=64, periods=(16, 20, 24), prefixes=(0, 3, 6), seed=1).input_ids
    right = rows[:, -1]
    return rows[:, :-1], Difference(right, rows[:, -2])


@cache
def broken() -> Net:
    """The bundled model, whose previous-token head 0.3 has lost its queries."""
    lm = patchclamp.open("tiny-lm").module
    size = lm.blocks[0].attn.head_dim
    with torch.no_grad():
        lm.blocks[0].attn.q_proj.weight[3 * size :].zero_()
        lm.blocks[0].attn.q_proj.bias[3 * size :].zero_()
    return patchclamp.open(lm, torch.randint(0, 256, (2, 8)))


def one_back(length: int) -> Tensor:
    keys = torch.zeros(1, length, length, dtype=torch.bool)
    at = torch.arange(1, length)
    keys[0, at, at - 1] = True
    return keys


def test_the_broken_head_is_repaired_by_attention_and_random_heads_are_not() -> None:
    ids, metric = task()
    net = broken()
    made = Repair().run(net, ids, metric, [(0, 3)], attend_to(net, one_back(ids.shape[1])))
    assert made.accuracy_before < 0.7
    assert made.accuracy_after > 0.95
    assert made.gain == pytest.approx(made.after - made.before, rel=1e-4)
    assert made.interval.low > 3
    assert made.null.num == 7  # all other heads
    assert made.null.high is not None
    assert made.gain > made.null.high + 3
    assert made.null.p == pytest.approx(1 / 8)
    # control: another head of the layer, held in the same way
    control = Repair().run(net, ids, metric, [(0, 0)], attend_to(net, one_back(ids.shape[1])))
    assert control.gain < 0.3 * made.gain
    assert control.null.p is not None
    assert control.null.p > 1 / 8


def test_patterns_and_outputs_of_a_working_run_repair_it_too() -> None:
    ids, metric = task()
    net, working = broken(), patchclamp.open("tiny-lm")
    healthy = float(metric(working.run(ids).output[:, -1], torch.arange(16)).mean())
    for hold in (hold_patterns(working, ids), hold_outputs(working, ids)):
        made = Repair(num_nulls=3).run(net, ids, metric, [(0, 3)], hold)
        assert made.after == pytest.approx(healthy, rel=0.02)
        assert made.record[0]["values"] == hold.description
        assert made.record[0]["where"] == {"head": [3]}


def test_holding_at_the_run_s_own_values_changes_nothing() -> None:
    ids, metric = task()
    net = broken()
    made = Repair(num_nulls=3).run(net, ids, metric, [(0, 1), (1, 2)], hold_outputs(net, ids))
    assert made.gain == pytest.approx(0, abs=1e-4)
    assert made.null.mean == pytest.approx(0, abs=1e-4)


def test_positions_restrict_the_hold_and_edits_can_be_run_again() -> None:
    ids, _ = task()
    net, working = broken(), patchclamp.open("tiny-lm")
    hold = hold_outputs(working, ids, positions=[-2, 5])
    (edit,) = hold.edits([(0, 3)])
    acts = net.record(ids, "attn.0.z", edits=edit).tensor("attn.0.z")
    free = net.record(ids, "attn.0.z").tensor("attn.0.z")
    held = hold.values[0]
    assert torch.allclose(acts[:, [-2, 5], 3], held[:, [-2, 5], 3])
    assert torch.equal(acts[:, 6:60], free[:, 6:60])
    assert torch.equal(acts[:, :, :3], free[:, :, :3])
    again = net.run(ids, edits=edit_from_dict(edit.to_dict())).output
    assert torch.allclose(again, net.run(ids, edits=edit).output, atol=1e-5)


def test_attention_to_chosen_keys_in_closed_form() -> None:
    keys = torch.tensor([[[False, False], [True, True]]])
    hold = attend_to(broken(), keys)
    assert torch.equal(hold.values[0][0, 0], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


def test_bad_heads_and_masks_are_refused() -> None:
    ids, metric = task()
    net = broken()
    hold = attend_to(net, one_back(ids.shape[1]))
    with pytest.raises(SiteError, match=r"no head \(0, 9\)"):
        Repair().run(net, ids, metric, [(0, 9)], hold)
    with pytest.raises(OptionError, match="no null"):
        Repair().run(net, ids, metric, [], hold)
    every = [(n, h) for n in range(2) for h in range(4)]
    with pytest.raises(OptionError, match="no null"):
        Repair().run(net, ids, metric, every, hold)
    with pytest.raises(DataError, match="mask over"):
        attend_to(net, torch.zeros(1, 3, 4, dtype=torch.bool))

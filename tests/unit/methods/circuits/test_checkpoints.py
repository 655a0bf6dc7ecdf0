"""Heads planted as gained, lost, kept; two halves of one checkpoint; error rates."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.methods.circuits.comparing.checkpoints import Change, CheckpointDiff

HEADS = [(n, h) for n in range(4) for h in range(4)]


def effects(means: dict[tuple[int, int], float], *, num: int = 40, seed: int) -> Tensor:
    """Noise of unit size around each head's mean effect."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(HEADS), num, generator=generator)
    return noise * 0.5 + torch.tensor([means.get(h, 0.0) for h in HEADS])[:, None]


def test_planted_changes_are_named() -> None:
    before = effects({(0, 0): 1.0, (1, 1): 1.0, (2, 2): 1.0}, seed=0)
    after = effects({(0, 0): 1.0, (1, 1): 0.0, (2, 2): 3.0, (3, 3): -1.0}, seed=1)
    made = CheckpointDiff().run(before, after, HEADS)
    assert made.heads(Change.KEPT) == [(0, 0)]
    assert made.heads(Change.LOST) == [(1, 1)]
    assert made.heads(Change.CHANGED) == [(2, 2)]
    assert made.heads(Change.GAINED) == [(3, 3)]
    assert len(made.heads(Change.ABSENT)) == 12
    assert made.false_before == made.false_after == 0
    row = made.table.filter(layer=3, head=3).row(0, named=True)
    assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert row["low"] < row["difference"] < row["high"] < 0


def test_two_halves_of_one_checkpoint_give_no_head() -> None:
    means = {(0, 0): 1.0, (1, 1): -0.5, (2, 2): 0.3}
    wrong = 0
    for seed in range(12):
        whole = effects(means, num=80, seed=seed)
        made = CheckpointDiff(num_flips=199).run(whole[:, :40], whole[:, 40:], HEADS)
        found = [made.heads(c) for c in (Change.GAINED, Change.LOST, Change.CHANGED)]
        wrong += any(found)
    assert wrong <= 2  # five in a hundred, all heads together


def test_noise_alone_is_absent_in_both() -> None:
    made = [
        CheckpointDiff(num_flips=199).run(effects({}, seed=s), effects({}, seed=s + 50), HEADS)
        for s in range(6)
    ]
    assert sum(len(m.heads(Change.ABSENT)) != len(HEADS) for m in made) <= 2


def test_p_values_equal_those_of_all_sign_flips() -> None:
    """One head: the share of all 2^8 flips whose mean is as large."""
    values = torch.tensor([[1.0, 2.0, -0.5, 0.7, 1.2, 0.1, -0.2, 0.9]])
    flips = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
    exact = float(((flips * values).mean(1).abs() >= values.mean().abs() - 1e-6).float().mean())
    made = CheckpointDiff(num_flips=9999).run(torch.zeros(1, 8), values, [(0, 0)])
    assert made.table["p_after"].item() == pytest.approx(exact, abs=0.01)
    assert made.table["p_before"].item() == 1


def test_pairing_finds_a_change_that_examples_hide() -> None:
    """Examples differ much more than checkpoints do."""
    spread = 5 * torch.randn(1, 40)
    before = spread + 6
    after = before + 0.5 + 0.1 * torch.randn(1, 40)
    row = CheckpointDiff().run(before, after, [(0, 0)]).table.row(0, named=True)
    assert row["change"] == "changed"
    assert row["p"] < 0.01


def test_bad_effects_are_refused() -> None:
    good = effects({}, seed=0)
    with pytest.raises(DataError, match="same heads and examples"):
        CheckpointDiff().run(good, good[:, :20], HEADS)
    with pytest.raises(DataError, match="too few examples"):
        CheckpointDiff().run(good[:, :5], good[:, :5], HEADS)
    bad = good.clone()
    bad[3, 3] = float("nan")
    with pytest.raises(DataError, match="second checkpoint hold NaN"):
        CheckpointDiff().run(good, bad, HEADS)
    with pytest.raises(OptionError, match="sign flips"):
        CheckpointDiff(num_flips=9).run(good, good, HEADS)

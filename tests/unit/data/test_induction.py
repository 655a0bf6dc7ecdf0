"""Rows of repeating bytes: they repeat where they say, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import DataError
from patchclamp.data.induction import (
    HELD_OUT_PERIODS,
    HELD_OUT_PREFIXES,
    TRAINING_PERIODS,
    TRAINING_PREFIXES,
    repeats,
)


def test_every_row_repeats_with_its_period_after_its_prefix() -> None:
    rows = repeats(200, seed=0)
    for ids, prefix, period in zip(
        rows.input_ids.tolist(), rows.prefix.tolist(), rows.period.tolist(), strict=True
    ):
        body = ids[prefix:]
        assert body[period:] == body[:-period]


def test_prefix_and_first_occurrence_are_random() -> None:
    rows = repeats(400, periods=[32], prefixes=[8], seed=0).input_ids[:, :40]
    same = (rows[:, None, :] == rows[:, :, None]).double().mean(0)
    same.fill_diagonal_(0)
    # Of 400 pairs of 95 bytes, 4.2 are equal by chance (standard deviation 2.0).
    assert same.max() < 18 / 400
    assert rows.unique().tolist() == list(range(32, 127))


def test_repeated_marks_bytes_that_follow_from_those_before() -> None:
    rows = repeats(1, length=16, periods=[5], prefixes=[3], seed=0)
    assert rows.repeated[0].nonzero().flatten().tolist() == list(range(9, 16))


def test_source_is_followed_by_the_next_byte() -> None:
    rows = repeats(50, seed=0)
    following = rows.input_ids.gather(1, rows.source.clamp(min=0))[:, :-1]
    inside = (rows.source >= 0)[:, :-1]
    assert torch.equal(following[inside], rows.input_ids[:, 1:][inside])
    assert torch.equal(inside, rows.repeated[:, 1:])


def test_a_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert torch.equal(repeats(4, seed=1).input_ids, repeats(4, seed=1).input_ids)
    assert not torch.equal(repeats(4, seed=1).input_ids, repeats(4, seed=2).input_ids)


def test_drawing_leaves_the_global_generator_as_found() -> None:
    before = torch.get_rng_state()
    repeats(4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_shapes_are_not_in_training() -> None:
    assert not set(HELD_OUT_PERIODS) & set(TRAINING_PERIODS)
    assert not set(HELD_OUT_PREFIXES) & set(TRAINING_PREFIXES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 20, "periods": [15], "prefixes": [4]}, "too short to repeat"),
        ({"periods": [0]}, "could be drawn"),
        ({"prefixes": [-1]}, "could be drawn"),
    ],
)
def test_shapes_without_a_repeat_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        repeats(2, seed=0, **options)

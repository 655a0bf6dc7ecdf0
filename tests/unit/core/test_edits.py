"""Every kind of edit on plain tensors: closed forms, where, errors, dictionaries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr

from patchclamp import edits as E
from patchclamp.core.edit_kinds import KINDS, as_edits, edit_from_dict
from patchclamp.core.edits import Edit, Frame
from patchclamp.core.errors import EditError

SEQUENCE = Frame(label="resid_post.0", axes=("batch", "position", "unit"))
IMAGE = Frame(label="conv", axes=("batch", "channel", "row", "column"))
HEADS = Frame(label="attn.0.z", axes=("batch", "position", "head", "unit"))


def value(*shape: int) -> torch.Tensor:
    """Distinct numbers, none of them zero."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def test_zero_with_every_form_of_where() -> None:
    x = value(2, 4, 3)
    cases: list[tuple[dict[str, object], object]] = [
        ({}, (slice(None),)),
        ({"unit": 1}, (slice(None), slice(None), 1)),
        ({"position": -1}, (slice(None), -1)),
        ({"position": [0, -1]}, (slice(None), [0, 3])),
        ({"position": slice(1, 3)}, (slice(None), slice(1, 3))),
        ({"position": slice(None, None, 2)}, (slice(None), [0, 2])),
        ({"example": 1}, (1,)),
        ({"batch": 1}, (1,)),
        ({"example": 0, "position": 2, "unit": [0, 2]}, (0, 2, [0, 2])),
        ({"unit": np.int64(2)}, (slice(None), slice(None), 2)),
        ({"unit": np.array([0, 2])}, (slice(None), slice(None), [0, 2])),
        ({"unit": torch.tensor([0, 2])}, (slice(None), slice(None), [0, 2])),
        ({"unit": range(2)}, (slice(None), slice(None), [0, 1])),
    ]
    for where, index in cases:
        expected = x.clone()
        expected[index] = 0  # type: ignore[index]
        got = E.zero("s", **where).apply(x, SEQUENCE)  # type: ignore[arg-type]
        assert torch.equal(got, expected), where
    assert x.ne(0).all(), "the argument is left as it was"


def test_several_restricted_axes_select_their_product() -> None:
    x = value(2, 4, 3)
    got = E.zero("s", example=[0, 1], position=[1, 3], unit=[0, 2]).apply(x, SEQUENCE)
    expected = x.clone()
    expected[np.ix_([0, 1], [1, 3], [0, 2])] = 0
    assert torch.equal(got, expected)
    assert got.eq(0).sum() == 8


def test_units_are_channels_in_an_image_and_heads_are_an_axis() -> None:
    x = value(2, 3, 2, 2)
    got = E.zero("s", unit=1).apply(x, IMAGE)
    assert got[:, 1].eq(0).all()
    assert got[:, [0, 2]].ne(0).all()
    z = value(2, 3, 4, 2)
    made = E.zero("s", head=2).apply(z, HEADS)
    assert made[:, :, 2].eq(0).all()
    assert made[:, :, [0, 1, 3]].ne(0).all()


def test_mean_of_the_batch_over_examples_or_over_more() -> None:
    x = value(2, 4, 3)
    got = E.mean("s").apply(x, SEQUENCE)
    assert torch.equal(got, x.mean(0, keepdim=True).expand(2, 4, 3))
    got = E.mean("s", over=("example", "position")).apply(x, SEQUENCE)
    assert torch.equal(got, x.mean((0, 1), keepdim=True).expand(2, 4, 3))


def test_mean_of_reference_activations_of_another_batch_size() -> None:
    x, reference = value(2, 4, 3), value(5, 4, 3) * 3
    got = E.mean("s", reference, unit=[0, 2], position=1).apply(x, SEQUENCE)
    expected = x.clone()
    expected[:, 1, [0, 2]] = reference.mean(0)[1, [0, 2]]
    assert torch.allclose(got, expected, atol=1e-12)


def test_labelled_reference_activations_are_aligned_by_name() -> None:
    reference = value(2, 4, 3) * 3
    labelled = xr.DataArray(reference.numpy(), dims=("batch", "position", "unit"))
    turned = labelled.transpose("position", "unit", "batch")
    got = E.mean("s", turned).apply(value(2, 4, 3), SEQUENCE)
    assert torch.equal(got, E.mean("s", reference).apply(value(2, 4, 3), SEQUENCE))


def test_resample_within_the_batch_gives_nobody_its_own_and_uses_everyone_once() -> None:
    x = value(6, 2, 3)
    for seed in range(20):
        got = E.resample("s", seed=seed).apply(x, SEQUENCE)
        came_from = [int((x == row).flatten(1).all(1).nonzero()[0, 0]) for row in got]
        assert sorted(came_from) == list(range(6))
        assert all(a != b for a, b in enumerate(came_from))


def test_resample_is_fixed_by_its_seed() -> None:
    x = value(8, 2, 3)
    made = [E.resample("s", seed=s).apply(x, SEQUENCE) for s in (3, 3, 4)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_resample_draws_whole_rows_of_reference_activations() -> None:
    x, reference = value(4, 2, 3), -value(5, 2, 3)
    got = E.resample("s", reference).apply(x, SEQUENCE)
    rows = {tuple(r.flatten().tolist()) for r in reference}
    assert all(tuple(r.flatten().tolist()) in rows for r in got)


def test_resample_needs_two_examples() -> None:
    with pytest.raises(EditError, match=r"two examples; got 1.*hint: give reference"):
        E.resample("s").apply(value(1, 2, 3), SEQUENCE)


def test_patch_takes_the_same_part_of_a_whole_value_or_just_the_part() -> None:
    x, source = value(2, 4, 3), -value(2, 4, 3)
    expected = x.clone()
    expected[:, 1:3, 2] = source[:, 1:3, 2]
    where = {"position": slice(1, 3), "unit": 2}
    whole = E.patch("s", source, **where).apply(x, SEQUENCE)
    part = E.patch("s", source[:, 1:3, 2:3], **where).apply(x, SEQUENCE)
    assert torch.equal(whole, expected)
    assert torch.equal(part, expected)


def test_patch_from_one_example_broadcasts_to_the_batch() -> None:
    x, source = value(3, 4, 3), -value(1, 4, 3)
    got = E.patch("s", source, position=2).apply(x, SEQUENCE)
    assert torch.equal(got[:, 2], source[:, 2].expand(3, 3))
    assert torch.equal(got[:, [0, 1, 3]], x[:, [0, 1, 3]])


def test_patch_aligns_labelled_arrays_by_name() -> None:
    x, source = value(2, 4, 3), -value(2, 4, 3)
    labelled = xr.DataArray(source.numpy(), dims=("batch", "position", "unit"))
    turned = labelled.transpose("unit", "batch", "position")
    got = E.patch("s", turned, position=1).apply(x, SEQUENCE)
    assert torch.equal(got[:, 1], source[:, 1])
    unit_only = xr.DataArray(np.array([7.0, 8.0, 9.0]), dims=("unit",))
    assert torch.equal(E.patch("s", unit_only).apply(x, SEQUENCE)[1, 3], torch.tensor([7.0, 8, 9]))
    with pytest.raises(EditError, match="has an axis 'head'"):
        E.patch("s", xr.DataArray(np.zeros((2, 3)), dims=("batch", "head"))).apply(x, SEQUENCE)


def test_clamp_holds_or_limits() -> None:
    x = value(2, 4, 3)
    assert E.clamp("s", 5).apply(x, SEQUENCE).eq(5).all()
    assert torch.equal(E.clamp("s", low=4, high=9).apply(x, SEQUENCE), x.clamp(4, 9))
    assert torch.equal(E.clamp("s", high=9).apply(x, SEQUENCE), x.clamp(max=9))
    held = E.clamp("s", [1.0, 2.0], unit=[0, 2]).apply(x, SEQUENCE)
    assert held[..., 0].eq(1).all()
    assert held[..., 2].eq(2).all()
    assert torch.equal(held[..., 1], x[..., 1])


@pytest.mark.parametrize("options", [{}, {"value": 1.0, "low": 0.0}])
def test_clamp_needs_a_value_or_limits_and_not_both(options: dict[str, float]) -> None:
    with pytest.raises(EditError, match=r"needs a value, or limits, and not both.*hint: clamp"):
        E.clamp("s", **options)  # type: ignore[arg-type]


def test_steer_adds_along_the_unit_axis_also_where_channels_come_first() -> None:
    x, image = value(2, 4, 3), value(2, 3, 2, 2)
    direction = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    assert torch.equal(E.steer("s", direction, 0.5).apply(x, SEQUENCE), x + 0.5 * direction)
    got = E.steer("s", direction, 2.0).apply(image, IMAGE)
    assert torch.equal(got, image + 2 * direction[:, None, None])
    part = E.steer("s", direction, unit=[0, 2]).apply(x, SEQUENCE)
    assert torch.equal(part, x + direction), "the same part of a whole vector is taken"


def test_scale_by_a_number_and_by_a_vector() -> None:
    x = value(2, 4, 3)
    assert torch.equal(E.scale("s", -2).apply(x, SEQUENCE), x * -2)
    factors = [1.0, 0.0, 3.0]
    got = E.scale("s", factors).apply(x, SEQUENCE)
    assert torch.equal(got, x * torch.tensor(factors, dtype=torch.float64))


def test_noise_has_the_asked_for_size_and_is_fixed_by_its_seed() -> None:
    x = torch.zeros(200, 4, 30)
    got = E.noise("s", 0.25, seed=1).apply(x, SEQUENCE)
    assert abs(float(got.std()) - 0.25) < 0.01
    assert abs(float(got.mean())) < 0.01
    assert torch.equal(got, E.noise("s", 0.25, seed=1).apply(x, SEQUENCE))
    assert not torch.equal(got, E.noise("s", 0.25, seed=2).apply(x, SEQUENCE))


def test_noise_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    E.noise("s", 1.0).apply(value(2, 4, 3), SEQUENCE)
    E.resample("s").apply(value(2, 4, 3), SEQUENCE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_callback_gets_the_chosen_part_only() -> None:
    x = value(2, 4, 3)
    seen = []

    def negate(part: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(part.shape))
        return -part

    got = E.callback("s", negate, position=2).apply(x, SEQUENCE)
    assert seen == [(2, 1, 3)]
    assert torch.equal(got[:, 2], -x[:, 2])
    assert torch.equal(got[:, :2], x[:, :2])


def test_callback_may_work_in_place() -> None:
    x = value(2, 4, 3)
    assert torch.equal(E.callback("s", lambda p: p.neg_()).apply(x, SEQUENCE), -value(2, 4, 3))
    assert torch.equal(x, value(2, 4, 3))


@pytest.mark.parametrize("bad", [lambda p: p[:1], lambda p: p.tolist(), lambda p: None])
def test_callback_must_return_a_tensor_of_the_same_shape(bad: object) -> None:
    with pytest.raises(EditError, match=r"must return a tensor of the shape it got.*\(2, 4, 3\)"):
        E.callback("s", bad).apply(value(2, 4, 3), SEQUENCE)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mean", "resample", "patch", "clamp"])
def test_what_a_user_gave_never_shares_memory_with_the_result(kind: str) -> None:
    """An in-place operation downstream would write into the user's own array."""
    x, source = value(2, 4, 3), -value(2, 4, 3)
    made = {
        "mean": E.mean("s", source, over=()),
        "resample": E.resample("s", source),
        "patch": E.patch("s", source),
        "clamp": E.clamp("s", source),
    }[kind].apply(x, SEQUENCE)
    made.add_(100.0)  # fails for a broadcast tensor, and corrupts a shared one
    assert torch.equal(source, -value(2, 4, 3))
    assert torch.equal(x, value(2, 4, 3))


@pytest.mark.parametrize(
    "edit", [E.mean("s"), E.patch("s", 1.0), E.clamp("s", [1.0, 2.0, 3.0])], ids=lambda e: e.kind
)
def test_a_broadcast_result_can_be_changed_in_place_downstream(edit: Edit) -> None:
    edit.apply(value(2, 4, 3), SEQUENCE).relu_()


def test_the_type_of_the_value_is_kept() -> None:
    x = torch.ones(2, 4, 3, dtype=torch.float16)
    for edit in (E.zero("s"), E.patch("s", 1.5), E.steer("s", np.ones(3)), E.noise("s", 1.0)):
        assert edit.apply(x, SEQUENCE).dtype is torch.float16, edit.kind
    whole = torch.arange(24).reshape(2, 4, 3)
    assert E.scale("s", 0.5).apply(whole, SEQUENCE).dtype is torch.int64
    assert torch.equal(E.scale("s", 1.0).apply(whole, SEQUENCE), whole)


def test_a_mean_of_whole_numbers_is_refused() -> None:
    with pytest.raises(EditError, match="int64"):
        E.mean("s").apply(torch.arange(24).reshape(2, 4, 3), SEQUENCE)


# ---- errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (E.zero("s", channels=1), r"has no axis 'channels'; expected one of batch, position, unit"),
        (E.zero("s", positon=1), r"has no axis 'positon'.*nearest 'position'"),
        (E.zero("s", unit=3), r"index 3 is outside axis 'unit'.*expected -3 to 2"),
        (E.zero("s", unit=-4), r"index -4 is outside axis 'unit'"),
        (E.zero("s", unit=[0, 9]), r"index 9 is outside"),
        (E.zero("s", unit="one"), r"an index is an integer.*got 'one'"),
        (E.zero("s", unit=1.5), r"an index is an integer.*got 1.5"),
        (E.zero("s", unit=[True, False, True]), r"an index is an integer.*hint:.*mask"),
        (E.patch("s", torch.zeros(5, 4, 3)), r"does not fit.*got shape \(5, 4, 3\)"),
        (E.patch("s", torch.zeros(5)), r"broadcasts to \(batch=2, position=4, unit=3\)"),
        (E.patch("s", torch.zeros(5), unit=[0, 1]), r"unit=2\), or the whole site \(2, 4, 3\)"),
        (E.patch("s", torch.zeros(1, 2, 4, 3)), r"got shape \(1, 2, 4, 3\)"),
        (E.patch("s", None), r"patch on 's' needs values="),
        (E.steer("s", None), r"steer on 's' needs direction="),
        (E.patch("s", "zero"), r"an edit's value is not numeric"),
        (E.patch("s", [[1.0], [1.0, 2.0]]), r"an edit's value is not numeric"),
        (E.mean("s", torch.zeros(4, 3)), r"need all its axes; got shape \(4, 3\)"),
        (E.mean("s", over=("head",)), r"has no axis 'head'"),
        (E.callback("s", None), r"callback on 's' has no function"),  # type: ignore[arg-type]
    ],
)
def test_an_edit_that_cannot_be_applied_says_why(edit: Edit, message: str) -> None:
    with pytest.raises(EditError, match=message):
        edit.apply(value(2, 4, 3), SEQUENCE)


# ---- dictionaries -----------------------------------------------------------

ALL = [
    E.zero("s", position=-1, unit=[0, 2]),
    E.zero("s", position=slice(1, None, 2)),
    E.mean("s", over=("example", "position")),
    E.mean("s", value(2, 4, 3)),
    E.resample("s", seed=5),
    E.resample("s", value(3, 4, 3), seed=1, unit=1),
    E.patch("s", value(2, 4, 3), example=0),
    E.patch("s", xr.DataArray(value(2, 4, 3).numpy(), dims=("batch", "position", "unit"))),
    E.patch("s", xr.DataArray(-value(4, 2).numpy(), dims=("position", "batch"))),
    E.mean("s", xr.DataArray(-value(3, 4, 2).numpy(), dims=("unit", "position", "batch"))),
    E.clamp("s", 2.5),
    E.clamp("s", low=3.0, high=7.0),
    E.steer("s", np.array([1.0, 2.0, 3.0]), 0.5),
    E.scale("s", [0.5, 1.0, 2.0]),
    E.scale("s", 3),
    E.noise("s", 0.1, seed=2),
    E.zero("s", unit=np.int64(1)),
]


@pytest.mark.parametrize("edit", ALL, ids=[f"{e.kind}-{i}" for i, e in enumerate(ALL)])
def test_dictionary_round_trip_through_json_does_the_same(edit: Edit) -> None:
    again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert type(again) is type(edit)
    x = value(2, 4, 3)
    assert torch.equal(again.apply(x, SEQUENCE), edit.apply(x, SEQUENCE))
    assert again.to_dict() == edit.to_dict()


def test_every_kind_is_in_the_round_trip_except_the_callback() -> None:
    assert {e.kind for e in ALL} == set(KINDS) - {"callback"}


def test_a_callback_leaves_a_note_that_cannot_be_read_back() -> None:
    note = E.callback("s", torch.relu).to_dict()
    assert note["replayable"] is False
    with pytest.raises(EditError, match=r"cannot be read back.*hint: pass the function again"):
        edit_from_dict(note)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "zeroo", "site": "s"}, r"unknown kind of edit 'zeroo'.*nearest 'zero'"),
        ({"site": "s"}, r"unknown kind of edit 'None'.*expected one of zero, mean"),
        ({"kind": "zero"}, r"edit 'zero' names no site"),
        ({"kind": "scale", "site": "s", "facter": 2}, r"no option 'facter'.*nearest 'factor'"),
        ({"kind": "zero", "site": "s", "where": 3}, r"where= must map axes to indices; got int"),
        ({"kind": "zero", "site": "s", "where": {"unit": "a"}}, r"an index is an integer"),
        ({"kind": "zero", "site": "s", "where": {"unit": ["a"]}}, r"an index is an integer"),
        ({"kind": "zero", "site": "s", "where": {"unit": 1.5}}, r"an index is an integer"),
        ({"kind": "clamp", "site": "s"}, r"needs a value, or limits"),
    ],
)
def test_bad_dictionaries(data: dict[str, object], message: str) -> None:
    with pytest.raises(EditError, match=message):
        edit_from_dict(data)


def test_as_edits_takes_one_several_and_mixed() -> None:
    one, plain = E.zero("a"), {"kind": "scale", "site": "b", "factor": 2.0}
    assert as_edits(one) == [one]
    assert [e.site for e in as_edits(plain)] == ["b"]
    assert [e.site for e in as_edits([one, plain, (plain,)])] == ["a", "b", "b"]
    assert as_edits(()) == []
    for wrong in ("zero", 3, [3], None):
        with pytest.raises(EditError, match="edits are Edit objects or dictionaries"):
            as_edits(wrong)

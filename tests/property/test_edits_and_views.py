"""Views and edits over drawn shapes and indices, against numpy and against the whole sequence."""

from __future__ import annotations

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp import edits as E
from patchclamp.core.edit_kinds import edit_from_dict
from patchclamp.core.edits import Frame, Index, choose
from patchclamp.core.sites import View

settings.register_profile("quick", max_examples=120, deadline=None, derandomize=True)
settings.load_profile("quick")

AXES = ("batch", "position", "unit")


@st.composite
def views(draw: st.DrawFn) -> tuple[View, torch.Tensor]:
    """A view, with a value that it fits."""
    outer, inner = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    start, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    narrowed = draw(st.booleans())
    shape[axis] = outer * inner + (start + after if narrowed else 0)
    split = (axis, *draw(st.sampled_from([(outer, inner), (-1, inner), (outer, -1)])))
    narrow = (axis, start, outer * inner) if narrowed else None
    view = View(narrow=narrow, split=draw(st.sampled_from([split, None])))
    return view, torch.arange(float(np.prod(shape))).reshape(shape)


@given(views())
def test_read_then_write_is_the_identity(drawn: tuple[View, torch.Tensor]) -> None:
    view, raw = drawn
    assert torch.equal(view.write(raw, view.read(raw)), raw)


@given(views())
def test_write_then_read_gives_what_was_written_and_keeps_the_rest(
    drawn: tuple[View, torch.Tensor],
) -> None:
    view, raw = drawn
    part = -1 - view.read(raw)
    made = view.write(raw, part)
    assert torch.equal(view.read(made), part)
    assert int((made != raw).sum()) == part.numel()
    assert view.shape(tuple(raw.shape)) == tuple(part.shape)


def index(size: int) -> st.SearchStrategy[Index]:
    one = st.integers(-size, size - 1)
    bound = st.none() | st.integers(-size - 2, size + 2)
    step = st.sampled_from([None, 1, 2, 3, -1, -2])
    return st.one_of(
        one,
        st.lists(one, min_size=1, max_size=4, unique_by=lambda i: i % size),
        st.builds(slice, bound, bound, step),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, Index]]:
    shape = tuple(draw(st.integers(1, 5)) for _ in AXES)
    where = {
        axis: draw(index(size))
        for axis, size in zip(AXES, shape, strict=True)
        if draw(st.booleans())
    }
    return torch.arange(1.0, 1 + float(np.prod(shape))).reshape(shape), where


def numpy_rows(where: dict[str, Index], shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The same selection by numpy's own indexing, as an open mesh."""
    rows = []
    for axis, size in zip(AXES, shape, strict=True):
        wanted = where.get(axis, slice(None))
        rows.append(np.atleast_1d(np.arange(size)[wanted]))
    return np.ix_(*rows)


@given(cases())
def test_choosing_equals_numpys_indexing(case: tuple[torch.Tensor, dict[str, Index]]) -> None:
    x, where = case
    chosen = choose(x, Frame(label="s", axes=AXES), where)
    expected = x.numpy()[numpy_rows(where, x.shape)]
    assert chosen.empty == (expected.size == 0)
    assert np.array_equal(chosen.of(x).numpy(), expected)


@given(cases())
def test_an_edit_changes_what_was_chosen_and_nothing_else(
    case: tuple[torch.Tensor, dict[str, Index]],
) -> None:
    x, where = case
    kept = x.clone()
    expected = x.numpy().copy()
    expected[numpy_rows(where, x.shape)] *= -3
    got = E.scale("s", -3.0, **where).apply(x, Frame(label="s", axes=AXES))
    assert np.array_equal(got.numpy(), expected)
    assert torch.equal(x, kept)


@given(cases())
def test_patching_the_whole_or_the_part_is_the_same(
    case: tuple[torch.Tensor, dict[str, Index]],
) -> None:
    x, where = case
    frame = Frame(label="s", axes=AXES)
    source = -x
    expected = x.numpy().copy()
    rows = numpy_rows(where, x.shape)
    expected[rows] = source.numpy()[rows]
    part = source.numpy()[rows]
    for values in (part, source) if part.size != source.numel() else (part,):
        if part.size:
            got = E.patch("s", values, **where).apply(x, frame)
            assert np.array_equal(got.numpy(), expected)


@given(cases())
def test_dictionaries_keep_the_selection(case: tuple[torch.Tensor, dict[str, Index]]) -> None:
    x, where = case
    frame = Frame(label="s", axes=AXES)
    edit = E.zero("s", **where)
    again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert torch.equal(again.apply(x, frame), edit.apply(x, frame))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, list[int], Index]:
    """A length, where it is cut into windows, and positions counted from the start."""
    length = draw(st.integers(2, 12))
    cuts = draw(st.lists(st.integers(1, length - 1), unique=True, max_size=6))
    one = st.integers(0, length - 1)
    bound = st.none() | st.integers(0, length + 3)
    wanted = draw(
        st.one_of(
            one,
            st.lists(one, min_size=1, max_size=5, unique=True),
            st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 3])),
        )
    )
    return length, sorted(cuts), wanted


def in_windows(edit: E.Edit, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The edit applied window by window, as in generation with a cache."""
    starts, stops = [0, *cuts], [*cuts, x.shape[1]]
    made = []
    for start, stop in zip(starts, stops, strict=True):
        frame = Frame(label="s", axes=AXES, offset=start, windowed=True)
        made.append(edit.apply(x[:, start:stop], frame))
    return torch.cat(made, 1)


@given(sequences())
def test_windows_together_select_what_the_whole_sequence_does(
    case: tuple[int, list[int], Index],
) -> None:
    length, cuts, wanted = case
    x = torch.arange(1.0, 1 + 2 * length * 3).reshape(2, length, 3)
    whole = Frame(label="s", axes=AXES)
    for edit in (
        E.zero("s", position=wanted),
        E.steer("s", torch.tensor([1.0, -2.0, 3.0]), 2.0, position=wanted),
        E.patch("s", -x, position=wanted),
        E.patch("s", -x[:1], position=wanted, unit=[2, 0]),
    ):
        assert torch.equal(in_windows(edit, x, cuts), edit.apply(x, whole)), edit.kind


@given(sequences(), st.data())
def test_values_for_the_listed_positions_are_dealt_out_over_the_windows(
    case: tuple[int, list[int], Index], data: st.DataObject
) -> None:
    length, cuts, _ = case
    positions = data.draw(
        st.lists(st.integers(0, length - 1), min_size=1, max_size=length - 1, unique=True)
    )
    x = torch.arange(1.0, 1 + 2 * length * 3).reshape(2, length, 3)
    values = -100 * torch.arange(1.0, 1 + len(positions))[None, :, None].expand(2, -1, 3)
    edit = E.patch("s", values, position=positions)
    assert torch.equal(in_windows(edit, x, cuts), edit.apply(x, Frame(label="s", axes=AXES)))

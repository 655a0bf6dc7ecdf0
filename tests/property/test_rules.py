"""Bounds of drawn rules on drawn boxes, in drawn precision, against samples."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.rules.cases import CASES, KINDS, Case, boxes_of, hold_everything


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    double=st.booleans(),
    num=st.integers(1, 3),
)
def test_bounds_hold(case: Case, kind: str, seed: int, double: bool, num: int) -> None:
    """Ten thousand samples over boxes and elements, a third of all coordinates at corners."""
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    boxes = boxes_of(case, kind, dtype, num)
    size = num * boxes[0].lower[0].numel()
    hold_everything(case, boxes, 10_000 // size, dtype)

"""Names for axes from symbolic shapes."""

from __future__ import annotations

import pytest
from torch import nn

from patchclamp.engine.axes import channel_first, name_axes


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((), False, ()),
        (("batch",), False, ("batch",)),
        (("batch", 10), False, ("batch", "unit")),
        (("batch", "length"), False, ("batch", "position")),
        (("batch", "length", 64), False, ("batch", "position", "unit")),
        (("batch", "length+1", 64), False, ("batch", "position", "unit")),
        (("batch", 17, 64), False, ("batch", "position", "unit")),
        (("batch", 64, "length"), False, ("batch", "unit", "position")),
        (("batch", 64, 12), True, ("batch", "channel", "position")),
        (("batch", 16, 8, 8), False, ("batch", "channel", "row", "column")),
        (("batch", 16, 8, 8), True, ("batch", "channel", "row", "column")),
        (("batch", 16, 4, 8, 8), True, ("batch", "channel", "depth", "row", "column")),
        (("batch", 4, "length", "length"), False, ("batch", "head", "query", "key")),
        (("batch", "length", 4, 16), False, ("batch", "position", "head", "unit")),
        (("batch", 4, "length", 16), False, ("batch", "head", "position", "unit")),
        (("length", "batch", 64), False, ("position", "batch", "unit")),
        ((1, "batch", 64), False, ("position", "batch", "unit")),
        (("4*batch", "length"), False, ("batch", "position")),
        (("length", 64), False, ("position", "unit")),
        ((1, "length", 64), False, ("axis0", "position", "unit")),
        ((3, 3), False, ("axis0", "unit")),
    ],
)
def test_name_axes(shape: tuple[int | str, ...], channels: bool, expected: tuple[str, ...]) -> None:
    assert name_axes(shape, channels=channels) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 2, 1), True),
        (nn.ConvTranspose2d(2, 2, 1), True),
        (nn.BatchNorm2d(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.MaxPool2d(2), True),
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.Linear(2, 2), False),
        (nn.LayerNorm(2), False),
        (None, False),
    ],
)
def test_kinds_of_modules_with_channels_first(module: nn.Module | None, expected: bool) -> None:
    assert channel_first(module) is expected

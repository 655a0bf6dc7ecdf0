"""Edits that are certified, edits that must not be, and what lies between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.edit_certificate import edit_cannot_change
from patchclamp.core.edit_kinds import clamp, zero
from patchclamp.core.errors import BoundError
from patchclamp.net import Net


@pytest.fixture(scope="module")
def planted() -> tuple[Net, Tensor]:
    """Unit 0 decides the class; units 2 and 3 are read with a weight of 0.01 only.

    hidden = relu of (x, -x, y, -y); logits = (h0 + 0.01 h2, h1 + 0.01 h3).
    """
    first, second = nn.Linear(2, 4), nn.Linear(4, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        second.weight.copy_(torch.tensor([[1.0, 0, 0.01, 0], [0, 1, 0, 0.01]]))
        first.bias.zero_()
        second.bias.zero_()
    net = patchclamp.open(nn.Sequential(first, nn.ReLU(), second).eval(), torch.zeros(2, 2))
    return net, torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.15, -0.4]])


def test_units_that_hardly_matter(planted: tuple[Net, Tensor]) -> None:
    """|x| >= 0.9 in the first two boxes, and y is worth 0.021 at most: certified by hand."""
    net, x = planted
    for method in ("interval", "crown"):
        made = edit_cannot_change(net, x, 0.1, clamp("1", 0.0, unit=[2, 3]), method=method)
        assert made.certified.tolist() == [True, True, True]
        assert made.classes.tolist() == [0, 1, 0]
    torch.testing.assert_close(
        made.edited, torch.tensor([0.9, 0.9, 0.05]).double(), atol=1e-6, rtol=0
    )
    assert made.holds == "the reals"


def test_a_unit_that_decides(planted: tuple[Net, Tensor]) -> None:
    """Without units 0 and 2 nothing speaks for class 0; the second answer never needed them."""
    net, x = planted
    made = edit_cannot_change(net, x, 0.1, zero("1", unit=[0, 2]))
    assert made.certified.tolist() == [False, True, False]
    assert float(made.plain.min()) > 0


def test_unknown_near_a_boundary(planted: tuple[Net, Tensor]) -> None:
    """In a box across the boundary nothing is certified, not even an edit that does nothing."""
    net, x = planted
    made = edit_cannot_change(net, x, 0.2, clamp("1", low=-5.0, unit=2))
    assert made.certified.tolist() == [True, True, False]


def test_only_for_classes() -> None:
    net = patchclamp.open(nn.Linear(3, 1).eval(), torch.zeros(2, 3))
    with pytest.raises(BoundError, match="logits \\(batch, class\\)"):
        edit_cannot_change(net, torch.zeros(2, 3), 0.1, zero(":input", unit=0))

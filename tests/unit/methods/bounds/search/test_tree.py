"""The tree of a search, and cases gathered into goals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchclamp.methods.bounds.certificate.form import INPUT, LEAF
from patchclamp.methods.bounds.property import Case
from patchclamp.methods.bounds.search.goal import goals, outward
from patchclamp.methods.bounds.search.limits import Limits, OutOfMemoryError, OutOfTimeError
from patchclamp.methods.bounds.search.tree import Tree


def case(low: float, rows: list[list[float]], offsets: list[float]) -> Case:
    return Case(
        lower=np.full(2, low),
        upper=np.ones(2),
        rows=np.array(rows, dtype=float),
        offsets=np.array(offsets, dtype=float),
        input_rows=np.zeros((0, 2)),
        input_offsets=np.zeros(0),
    )


def test_cases_with_one_box_make_one_goal_in_order() -> None:
    found = goals(
        [case(0, [[1, 0]], [1]), case(-1, [[0, 1]], [2]), case(0, [[1, 1], [2, 0]], [3, 4])]
    )
    assert [g.cases for g in found] == [(0, 2), (1,)]
    assert found[0].owner.tolist() == [0, 1, 1]
    assert found[0].offsets.tolist() == [1, 3, 4]


def test_margin_is_the_smallest_over_cases_of_the_largest_row() -> None:
    (goal,) = goals([case(0, [[1, 0], [0, 1]], [0, 0]), case(0, [[-1, 0]], [0.5])])
    y = torch.tensor([[1.0, -2.0], [-1.0, -3.0], [0.75, 0.0]])
    # first case: max(y0, y1); second case: 0.5 - y0
    assert goal.margin(y).tolist() == [-0.5, -1.0, -0.25]


def test_preorder_puts_the_lower_side_first_and_proofs_pick_their_rows() -> None:
    tree = Tree(2)
    (low,), (high,) = tree.split(np.array([0]), np.array([1]), np.array([0.5]))
    (a,), (b,) = tree.split(np.array([high]), np.array([0]), np.array([0.25]))
    tree.close(np.array([low, a, b]), np.array([[0, 2], [1, 2], [0, 3]]))
    order = tree.preorder()
    assert order.tolist() == [0, low, high, a, b]
    proof = tree.proof(1, np.array([2, 3]), order)
    assert proof.layer.tolist() == [INPUT, LEAF, INPUT, LEAF, LEAF]
    assert proof.index.tolist() == [1, 0, 0, 0, 0]
    assert proof.point.tolist() == [0.5, 0, 0.25, 0, 0]
    assert proof.weights.tolist() == [[1, 0], [1, 0], [0, 1]]


def test_a_tree_grows_beyond_its_first_size() -> None:
    tree = Tree(1)
    ids = np.zeros(1, np.int64)
    for _ in range(12):
        low, high = tree.split(ids, np.zeros(len(ids), np.int64), np.full(len(ids), 0.5))
        ids = np.concatenate([low, high])
    tree.close(ids, np.zeros((len(ids), 1), np.int64))
    assert tree.num_nodes == 2**13 - 1
    assert (tree.layer[tree.preorder()] == LEAF).sum() == 2**12


def test_outward_boxes_contain_the_float64_ones() -> None:
    low = torch.rand(1000, 3, dtype=torch.float64) - 0.5
    high = low + 1e-9
    narrow, wide = outward(low, high, torch.float32)
    assert bool((narrow.double() <= low).all())
    assert bool((wide.double() >= high).all())
    same = outward(low, high, torch.float64)
    assert torch.equal(same[0], low)


def test_limits_stop_by_time_and_by_size() -> None:
    with pytest.raises(OutOfTimeError):
        Limits(seconds=-1).check()
    with pytest.raises(OutOfMemoryError):
        Limits(seconds=60, max_boxes=3).check(4)
    Limits(seconds=60, max_boxes=3).check(3)

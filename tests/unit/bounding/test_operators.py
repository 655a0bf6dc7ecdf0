"""Every operator of the table, called as captured networks call it: values and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.bounding.lowering import Lowered, merged
from patchclamp.bounding.sets import Box
from patchclamp.bounding.ways import Method, Way
from patchclamp.core.errors import BoundError
from patchclamp.rules.operators.builder import Builder
from patchclamp.rules.operators.table import TABLE
from patchclamp.rules.value import Value
from tests.unit.bounding.operator_cases import AFFINE, CALLS, CONSTANT, MOVING, Call, P

NUM_BOXES, NUM_POINTS = 2, 32


def perturbed(case: Call) -> list[P]:
    """What is perturbed in a call, in order."""
    leaves = pytree.tree_leaves((case.args, case.kwargs), is_leaf=lambda x: isinstance(x, P))
    return [x for x in leaves if isinstance(x, P)]


def filled(case: Call, values: Sequence[object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments with something in the place of what is perturbed."""
    fresh = iter(values)

    def put(x: object) -> object:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.double()
        return next(fresh) if isinstance(x, P) else x

    args, kwargs = pytree.tree_map(
        put, (case.args, case.kwargs), is_leaf=lambda x: isinstance(x, P)
    )
    return args, kwargs


def picked(case: Call, made: object) -> object:
    return made[case.pick] if isinstance(made, (list, tuple)) else made


def lowered(case: Call, *, exact: bool) -> Lowered:
    """The call alone as a network."""
    b = Builder(torch.float64, [], "here", torch.float64)
    names = (f"x{i}" for i in count())
    leaves = [b.leaf(p.shape, next(names)) for p in perturbed(case)]
    args, kwargs = filled(case, leaves)
    made = picked(case, TABLE[case.target](b, *args, **kwargs))
    assert isinstance(made, Value)
    network = Lowered(tuple(b.values), {v.name: v for v in leaves}, made, torch.float64)
    return merged(network, exact=exact)


def boxes(case: Call, share: float = 0.5) -> dict[str, Box]:
    """Random boxes that take up a share of where the operator is defined."""
    made = {}
    for i, p in enumerate(perturbed(case)):
        size = (NUM_BOXES, *p.shape)
        radius = torch.rand(size, dtype=torch.float64) * share * (p.high - p.low) / 2
        centre = (
            p.low + radius + torch.rand(size, dtype=torch.float64) * (p.high - p.low - 2 * radius)
        )
        made[f"x{i}"] = Box((centre - radius).clamp(min=p.low), (centre + radius).clamp(max=p.high))
    return made


def points(box: Box) -> Tensor:
    """(NUM_POINTS, NUM_BOXES, *shape): a third of all coordinates at an end, whole corners too."""
    share = torch.rand(NUM_POINTS, *box.lower.shape, dtype=torch.float64)
    share = torch.where(torch.rand_like(share) < 0.3, share.round(), share)
    share[0], share[1] = 0, 1
    share[2:12] = share[2:12].round()
    return torch.maximum(
        torch.minimum(box.lower + share * (box.upper - box.lower), box.upper), box.lower
    )


def values(case: Call, given: dict[str, Tensor]) -> Tensor:
    """What the operator itself gives, point by point: (M, elements)."""
    rows = []
    for i in range(len(next(iter(given.values())))):
        args, kwargs = filled(case, [x[i].clone() for x in given.values()])
        made = picked(case, case.target(*args, **kwargs))  # type: ignore[operator]  # an operator
        assert isinstance(made, Tensor)
        rows.append(made.flatten())
    return torch.stack(rows)


def bounds(network: Lowered, sets: dict[str, Box], method: Method) -> tuple[Tensor, Tensor]:
    index = torch.arange(torch.Size(network.output.shape).numel())
    found = Way(network, sets, method, num_steps=3).run(None, index)
    return found.lower, found.upper


def test_every_operator_is_called() -> None:
    missing = {str(t) for t in TABLE} - {str(c.target) for c in CALLS + CONSTANT}
    assert not missing


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_operator(case: Call) -> None:
    """The lowered call gives the operator's values, and its bounds hold on samples and points."""
    sets = boxes(case)
    sampled = {name: points(box) for name, box in sets.items()}
    flat = {name: x.flatten(0, 1) for name, x in sampled.items()}
    wanted = values(case, flat)
    for exact in (True, False):
        network = lowered(case, exact=exact)
        made = network.forward(flat).flatten(1)
        hidden = wanted.isinf() & (wanted < 0)  # masked scores are only very low here
        assert bool((made[hidden] < -1e8).all())
        torch.testing.assert_close(made[~hidden], wanted[~hidden], rtol=1e-9, atol=1e-9)
    network = lowered(case, exact=True)
    wanted = wanted.unflatten(0, (NUM_POINTS, NUM_BOXES))
    kept = wanted.isfinite()
    slack = 1e-14 * (1 + wanted.abs())
    for method in (Method.INTERVAL, Method.CROWN, Method.FORWARD):
        lower, upper = bounds(network, sets, method)
        assert bool((lower <= wanted + slack)[kept].all()), method
        assert bool((upper >= wanted - slack)[kept].all()), method


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_radius_0_encloses_the_value(case: Call) -> None:
    """Bounds at a point hold the float64 value and little else."""
    centres = {name: (box.lower + box.upper) / 2 for name, box in boxes(case).items()}
    sets = {name: Box(x, x) for name, x in centres.items()}
    wanted = values(case, centres)
    kept = wanted.isfinite()
    for method in (Method.INTERVAL, Method.CROWN):
        lower, upper = bounds(lowered(case, exact=True), sets, method)
        assert bool(((lower <= wanted) & (upper >= wanted))[kept].all()), method
        assert float((upper - lower)[kept].max()) < 1e-6


@pytest.mark.parametrize("case", MOVING + AFFINE, ids=str)
def test_affine_operators_are_exact(case: Call) -> None:
    """Interval arithmetic and going backwards agree, and the ends are taken at corners."""
    sets = boxes(case)
    network = lowered(case, exact=True)
    found = [bounds(network, sets, m) for m in (Method.INTERVAL, Method.CROWN)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    row = torch.eye(found[0][0].shape[1], dtype=torch.float64)
    way = Way(network, sets, Method.CROWN, keep_linear=True)
    made = way.run(None, torch.arange(len(row)))
    assert made.below is not None
    at = {
        name: torch.where(A > 0, sets[name].lower[:, None], sets[name].upper[:, None])
        for name, A in made.below.rows.items()
    }
    for i in range(min(len(row), 6)):
        value = values(case, {name: at[name][:, i] for name in sets})
        torch.testing.assert_close(value[:, i], found[0][0][:, i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CONSTANT, ids=str)
def test_what_only_takes_a_shape_is_a_constant(case: Call) -> None:
    b = Builder(torch.float64, [], "here", torch.float64)
    args, kwargs = filled(case, [b.leaf(p.shape, "x") for p in perturbed(case)])
    made = TABLE[case.target](b, *args, **kwargs)
    args, kwargs = filled(
        case, [torch.zeros(p.shape, dtype=torch.float64) for p in perturbed(case)]
    )
    wanted = case.target(*args, **kwargs)  # type: ignore[operator]  # an operator
    assert isinstance(made, Tensor)
    assert torch.equal(made, wanted)


def test_a_single_number_is_refused() -> None:
    b = Builder(torch.float64, [], "loss")
    with pytest.raises(BoundError, match="single number, without axes, at 'loss'"):
        TABLE[torch.ops.aten.select.int](b, b.leaf((3,), "x"), 0, 1)

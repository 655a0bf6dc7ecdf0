"""Bounds of drawn networks on drawn sets: they hold, shrink with the set, and order by method."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.sets import Box, PerturbedSet
from patchclamp.bounding.ways import Linear, Method, Way
from tests.unit.bounding.random_networks import FAMILIES, network, points, sets, smaller

NETWORKS = st.sampled_from(FAMILIES)
SEEDS = st.integers(0, 2**31)
NORMS = st.sampled_from([1, 2, math.inf])
NUM_POINTS = 2000


def bounds(
    of: Lowered, on: dict[str, PerturbedSet], method: Method, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    index = torch.arange(torch.Size(of.output.shape).numel())
    found = Way(of, on, method, num_steps=3).run(rows, index)
    return found.lower, found.upper


def values(of: Lowered, at: dict[str, Tensor]) -> Tensor:
    """(num, N, elements)."""
    flat = {name: x.flatten(0, 1) for name, x in at.items()}
    return of.forward(flat).flatten(1).unflatten(0, next(iter(at.values())).shape[:2])


def at_points(linear: Linear, at: dict[str, Tensor]) -> Tensor:
    total = linear.constant[None]
    for name, A in linear.rows.items():
        total = total + torch.einsum(
            "nri,sni->snr", A.flatten(2).expand(2, -1, -1), at[name].flatten(2)
        )
    return total


@settings(max_examples=6, deadline=None)
@given(family=NETWORKS, seed=SEEDS, radius=st.floats(1e-4, 0.2), norm=NORMS)
def test_bounds_hold_on_samples(family: object, seed: int, radius: float, norm: float) -> None:
    """4000 samples of every output and of random rows of them; linear bounds at each sample."""
    torch.manual_seed(seed)
    of = network(family)  # type: ignore[arg-type]  # one of the families
    on = sets(of, radius, norm)
    at = {name: points(x, NUM_POINTS) for name, x in on.items()}
    wanted = values(of, at)
    slack = 1e-13 * (1 + wanted.abs().max())
    rows = torch.randn(1, 3, *of.output.shape, dtype=torch.float64)
    combined = torch.einsum("rj,snj->snr", rows[0].flatten(1), wanted)
    for method in Method:
        if method is Method.ALPHA and family is FAMILIES[3]:
            continue  # as slow as all others together, and `crown` is within it
        lower, upper = bounds(of, on, method)
        assert bool(((lower <= wanted + slack) & (upper >= wanted - slack)).all()), method
        lower, upper = bounds(of, on, method, rows)
        slack_of_rows = slack * float(rows.abs().sum())
        assert bool((lower <= combined + slack_of_rows).all()), method
        assert bool((upper >= combined - slack_of_rows).all()), method
    for method in (Method.CROWN, Method.FORWARD):
        index = torch.arange(torch.Size(of.output.shape).numel())
        found = Way(of, on, method, keep_linear=True).run(None, index)
        assert found.below is not None
        assert found.above is not None
        assert bool((at_points(found.below, at) <= wanted + slack).all()), method
        assert bool((at_points(found.above, at) >= wanted - slack).all()), method


@settings(max_examples=6, deadline=None)
@given(family=NETWORKS, seed=SEEDS)
def test_radius_0_encloses_the_value(family: object, seed: int) -> None:
    torch.manual_seed(seed)
    of = network(family)  # type: ignore[arg-type]  # one of the families
    centres = {name: box.hull().lower for name, box in sets(of, 0.0, math.inf).items()}
    on: dict[str, PerturbedSet] = {name: Box(x, x) for name, x in centres.items()}
    wanted = values(of, {name: x[None] for name, x in centres.items()})[0]
    for method in Method:
        lower, upper = bounds(of, on, method)
        assert bool(((lower <= wanted) & (upper >= wanted)).all()), method
        assert float((upper - lower).max()) < 1e-8, method


@settings(max_examples=6, deadline=None)
@given(
    family=NETWORKS, seed=SEEDS, radius=st.floats(1e-3, 0.2), share=st.floats(0, 0.9), norm=NORMS
)
def test_order(family: object, seed: int, radius: float, share: float, norm: float) -> None:
    """Intervals shrink with their set; no method is looser than the simpler one."""
    torch.manual_seed(seed)
    of = network(family)  # type: ignore[arg-type]  # one of the families
    on = sets(of, radius, norm)
    within = {name: smaller(x, share) for name, x in on.items()}
    looser = bounds(of, on, Method.INTERVAL)
    slack = 1e-10 * (1 + max(float(side.abs().max()) for side in looser))
    inner = bounds(of, within, Method.INTERVAL)
    assert bool((inner[0] >= looser[0] - slack).all())
    assert bool((inner[1] <= looser[1] + slack).all())
    for method in (Method.CROWN, Method.ALPHA):
        found = bounds(of, on, method)
        assert bool((found[0] >= looser[0] - slack).all()), method
        assert bool((found[1] <= looser[1] + slack).all()), method
        looser = found

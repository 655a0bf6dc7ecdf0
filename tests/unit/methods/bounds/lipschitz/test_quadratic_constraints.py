"""Increments of real activations satisfy what is claimed of them; of others they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz import (
    Activation,
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Linear,
    Residual,
    gelu,
    leaky_relu,
    max_min,
    relu,
    sigmoid,
    silu,
    tanh,
)
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import (
    Increment,
    increment,
    quadratic_form,
)

WIDTH = 6
ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "relu": relu,
    "leaky_relu": lambda: leaky_relu(0.2),
    "steep_leaky_relu": lambda: leaky_relu(1.7),
    "tanh": tanh,
    "sigmoid": sigmoid,
    "gelu": gelu,
    "silu": silu,
    "max_min": max_min,
    "sort_of_3": lambda: GroupSort(size=3),
    "sort_of_6": lambda: GroupSort(size=6, descending=True),
    "householder": lambda: Householder(directions=torch.randn(2, 3)),
}


def _violation(activation: Activation, found: Increment, x: Tensor, y: Tensor) -> float:
    """By how much the increments from x to y break the claim; (pair, unit) each."""
    u, made = x - y, activation(x) - activation(y)
    free = made - u @ found.keep.value.T
    # lift has orthonormal columns before centring, so that w can be read off.
    w = free @ found.lift.value
    unexplained = (free - w @ found.lift.value.T).abs().max()
    v = u @ found.probe.value.T
    gap = w.square() - found.cross.value * v * w - found.square.value * v.square()
    groups = torch.zeros(len(x), WIDTH, dtype=torch.float64).index_add_(1, found.group, gap)
    return max(float(unexplained), float(groups.max()))


def _pairs(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (lower + torch.rand(4000, WIDTH, dtype=torch.float64) * (upper - lower) for _ in "xy")
    corners = torch.rand(4000, WIDTH) < 0.3
    return torch.where(corners, lower, x), torch.where(corners.flip(0), upper, y)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_pair_of_inputs_satisfies_the_constraints(name: str) -> None:
    activation = ACTIVATIONS[name]()
    ends = torch.full((WIDTH,), 3.0, dtype=torch.float64)
    assert _violation(activation, increment(activation, WIDTH), *_pairs(-ends, ends)) < 1e-12


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0])
def test_pairs_within_bounds_satisfy_the_tighter_ones(name: str, radius: float) -> None:
    activation = ACTIVATIONS[name]()
    middle = torch.randn(WIDTH, dtype=torch.float64)
    bounds = middle - radius, middle + radius
    found = increment(activation, WIDTH, bounds)
    assert _violation(activation, found, *_pairs(*bounds)) < 1e-12


def test_the_check_finds_constraints_that_are_too_tight() -> None:
    ends = torch.full((WIDTH,), 3.0, dtype=torch.float64)
    pairs = _pairs(-ends, ends)
    wrong = increment(replace(relu(), slopes=(0.0, 0.9)), WIDTH)
    assert _violation(relu(), wrong, *pairs) > 0.1
    assert _violation(GroupSort(size=3), increment(max_min(), WIDTH), *pairs) > 0.1
    assert _violation(tanh(), increment(tanh(), WIDTH, (ends, ends + 1)), *pairs) > 0.1
    sorting = GroupSort(size=6)
    on = torch.arange(WIDTH).double(), torch.arange(WIDTH).double() + 0.5
    assert _violation(sorting, increment(sorting, WIDTH, on), *pairs) > 0.1


def test_known_units_have_no_variable() -> None:
    lower = torch.tensor([-2.0, 1, -1, 0, -3, -1], dtype=torch.float64)
    upper = torch.tensor([-1.0, 2, 1, 4, 0, 0.5], dtype=torch.float64)
    found = increment(relu(), WIDTH, (lower, upper))
    assert found.lift.value.nonzero()[:, 0].tolist() == [2, 5]
    assert found.keep.value.diagonal().tolist() == [0, 1, 0, 1, 0, 0]
    ordered = torch.tensor([0.0, 2, 5, 5, 6, 5.5], dtype=torch.float64)
    found = increment(max_min(), WIDTH, (ordered, ordered + 1))
    assert len(found.group) == 2
    assert found.keep.value[:2, :2].tolist() == [[0, 1], [1, 0]]


def test_the_form_of_a_chain_reproduces_its_increments() -> None:
    torch.manual_seed(3)
    inner = Residual((Linear(torch.randn(6, 6)), max_min()), (relu(),))
    chain = Chain((Linear(torch.randn(6, 4)), leaky_relu(), inner, Linear(torch.randn(2, 6))), 4)
    form = quadratic_form(chain)
    x, y = torch.randn(2, 50, 4, dtype=torch.float64)
    parts = [increment(a, 6) for a in chain.activations]
    states = [_inputs_of_activations(chain, z) for z in (x, y)]
    made = [x - y]
    for a, part, at, to in zip(chain.activations, parts, *states, strict=True):
        made.append((a(at) - a(to) - (at - to) @ part.keep.value.T) @ part.lift.value)
    variables = torch.cat(made, 1)
    probed = torch.cat(
        [(at - to) @ p.probe.value.T for p, at, to in zip(parts, *states, strict=True)], 1
    )
    assert torch.allclose(variables @ form.probes.value.T, probed)
    assert torch.allclose(variables @ form.output.value.T, chain(x) - chain(y))
    assert form.num_variables == 4 + 6 + 6 + 3
    assert form.num_groups == 15


def _inputs_of_activations(chain: Chain, x: Tensor) -> list[Tensor]:
    first, leaky, inner, _ = chain.layers
    assert isinstance(inner, Residual)
    assert isinstance(inner.body[0], Linear)
    a = first(x)
    b = leaky(a)
    return [a, b, inner.body[0](b)]


def test_bad_bounds_are_refused() -> None:
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    with pytest.raises(InputError, match="do not fit"):
        increment(relu(), WIDTH, (zeros[:2], zeros[:2]))
    with pytest.raises(InputError, match="above upper"):
        increment(relu(), WIDTH, (zeros + 1, zeros))
    with pytest.raises(InputError, match="NaN"):
        increment(relu(), WIDTH, (zeros, zeros * float("nan")))
    with pytest.raises(InputError, match="1 ranges for 2 activations"):
        quadratic_form(Chain((relu(), relu()), WIDTH), [(zeros, zeros)])


def test_an_unknown_activation_is_refused() -> None:
    class Other(Activation):
        def __call__(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="activation Other"):
        increment(Other(), 2)
    assert isinstance(relu(), Elementwise)

"""Chains refuse what does not fit, by name."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz import (
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Linear,
    Residual,
    max_min,
    relu,
)


def test_a_chain_computes_what_its_layers_say() -> None:
    x = torch.tensor([[1.0, 3.0, -2.0, -5.0]])
    assert Chain((max_min(),), 4)(x).tolist() == [[3, 1, -2, -5]]
    assert Chain((GroupSort(size=4),), 4)(x).tolist() == [[-5, -2, 1, 3]]
    mirror = Householder(directions=torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
    assert Chain((mirror,), 4)(x).tolist() == [[3, 1, -2, 5]]
    twice = Linear(2 * torch.eye(4), torch.ones(4))
    assert Chain((Residual((twice, relu())),), 4)(x).tolist() == [[4, 10, -2, -5]]


def test_activations_are_listed_skip_first() -> None:
    a, b, c = relu(), max_min(), relu()
    chain = Chain((a, Residual((c,), (b,))), 2)
    assert [id(x) for x in chain.activations] == [id(a), id(b), id(c)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "without layers"),
        ((Linear(torch.ones(2, 3)),), "takes 3 units"),
        ((GroupSort(size=3),), "GroupSort of size 3 cannot take 4"),
        ((Householder(directions=torch.ones(3, 2)),), r"shape \(3, 2\) cannot take 4"),
        ((Householder(directions=torch.zeros(2, 2)),), "zero"),
        ((Residual((Linear(torch.ones(2, 4)),)),), r"widths \(4, 2\)"),
        ((Elementwise(name="odd", function=torch.sin, slopes=(1.0, -1.0)),), "'odd'"),
        ((torch.nn.ReLU(),), "got ReLU"),
    ],
)
def test_what_does_not_fit_is_refused(layers: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chain(layers, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_bad_weights_are_refused(bad: float) -> None:
    weight = torch.ones(2, 2, dtype=torch.float64)
    weight[0, 1] = bad
    with pytest.raises(InputError, match="weight holds"):
        Linear(weight)
    with pytest.raises(InputError, match="bias holds"):
        Linear(torch.ones(2, 2), weight[0])
    with pytest.raises(InputError, match="does not fit"):
        Linear(torch.ones(2, 2), torch.ones(3))

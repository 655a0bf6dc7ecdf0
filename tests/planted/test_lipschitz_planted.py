"""A steep place is planted in a flat network: the search must find it, on the right box only."""

from __future__ import annotations

import pytest
import torch

from patchclamp.methods.bounds.lipschitz import Chain, Linear, Lipschitz, Method, Norm, relu

pytest.importorskip("cvxpy", reason="LipSDP is an optional extra")

STEEP = 7.0


def _planted() -> Chain:
    """x1 plus STEEP (x2 - 1) where x2 is above 1."""
    first = Linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, -1.0]))
    return Chain((first, relu(), Linear(torch.tensor([[1.0, -1.0, STEEP]]))), 2)


@pytest.mark.parametrize("method", [Method.RECURSIVE, Method.LIPSDP])
@pytest.mark.parametrize(
    ("norm", "steep", "flat"), [(Norm.L2, (1 + STEEP**2) ** 0.5, 1.0), (Norm.LINF, 1 + STEEP, 1.0)]
)
def test_steep_where_planted_and_flat_elsewhere(
    method: Method, norm: Norm, steep: float, flat: float
) -> None:
    chain, bound = _planted(), Lipschitz(norm=norm, method=method)
    everywhere = bound.run(chain)
    assert everywhere.lower == pytest.approx(steep, rel=1e-6)
    assert everywhere.upper >= steep
    above = bound.run(chain, box=(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 2.0])))
    assert (above.lower, above.upper) == (pytest.approx(steep), pytest.approx(steep))
    below = bound.run(chain, box=(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.9])))
    assert (below.lower, below.upper) == (pytest.approx(flat), pytest.approx(flat))

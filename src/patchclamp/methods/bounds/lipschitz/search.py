"""Lower bounds: the largest gradient norm that a search over inputs finds.

Almost everywhere the norm of a chain's Jacobian is at most its Lipschitz constant. Samples
come first; the best are then moved at random, by less and less, which also works where
gradients of the norm are zero (piecewise linear chains).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz.layers import Chain
from patchclamp.methods.bounds.lipschitz.norm_product import Norm
from patchclamp.methods.bounds.lipschitz.ranges import Box

_SCALES = (0.1, 1.0, 10.0)
_CHUNK_ELEMENTS = 2**24
_ROUNDING = 1e-9
"""The result is lowered by this share, far more than the Jacobian's rounding in float64."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How long to look for steep places.

    Attributes:
        num_samples: random inputs: normal at three scales, or uniform in the box.
        num_rounds: rounds of moving the best.
        num_kept: how many are moved in each round, eight ways each.
        seed: of the samples and moves.
    """

    num_samples: int = 256
    num_rounds: int = 10
    num_kept: int = 16
    seed: int = 0


def steepest(
    chain: Chain,
    norm: Norm,
    search: Search,
    *,
    box: Box | None = None,
    samples: Tensor | None = None,
) -> tuple[float, Tensor]:
    """The largest Jacobian norm found, and where.

    Args:
        box: stay strictly inside; its sides of zero width stay where they are.
        samples: inputs of one's own, (sample, num_inputs), tried besides the random ones.

    Randomness: the seed. The global random state is not used.
    Fails when: steep places are rare; the value is then merely small. It is computed in
        float64 and lowered by 1e-9 of itself, which is no proof.

    Raises:
        InputError: samples of the wrong shape.
    """
    generator = torch.Generator().manual_seed(search.seed)
    points = _start(chain, search, box, generator)
    if samples is not None:
        given = samples.detach().to("cpu", torch.float64).flatten(1)
        if given.shape[1] != chain.num_inputs:
            raise InputError(
                f"samples of {given.shape[1]} elements", expected=f"{chain.num_inputs}"
            )
        points = torch.cat([points, _inside(given, box)])
    values = _norms(chain, points, norm)
    reach = 1.0
    for _ in range(search.num_rounds):
        best = values.topk(min(search.num_kept, len(values))).indices
        points, values = points[best], values[best]
        size = points.abs().mean(1, keepdim=True) if box is None else (box[1] - box[0]) / 2
        moves = torch.randn((8, *points.shape), generator=generator, dtype=torch.float64)
        moved = _inside((points + reach * size * moves).flatten(0, 1), box)
        points = torch.cat([points, moved])
        values = torch.cat([values, _norms(chain, moved, norm)])
        reach *= 0.6
    top = values.argmax()
    return float(values[top]) * (1 - _ROUNDING), points[top]


def _start(chain: Chain, search: Search, box: Box | None, generator: torch.Generator) -> Tensor:
    shape = search.num_samples, chain.num_inputs
    if box is not None:
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return _inside(box[0] + share * (box[1] - box[0]), box)
    scales = torch.tensor(_SCALES, dtype=torch.float64).repeat(shape[0])[: shape[0], None]
    return scales * torch.randn(shape, generator=generator, dtype=torch.float64)


def _inside(points: Tensor, box: Box | None) -> Tensor:
    """Into the box without its faces, where a kink's slope may be that of the outside."""
    if box is None:
        return points
    margin = 1e-6 * (box[1] - box[0])
    return torch.minimum(torch.maximum(points, box[0] + margin), box[1] - margin)


def _norms(chain: Chain, points: Tensor, norm: Norm) -> Tensor:
    """Norm of the Jacobian at every point; (point,)."""
    step = max(1, _CHUNK_ELEMENTS // (chain.num_inputs * chain.num_outputs * 4))
    jacobian = torch.func.vmap(torch.func.jacrev(chain))
    found = []
    for chunk in points.split(step):
        rows = jacobian(chunk).detach()
        if norm is Norm.L2:
            found.append(torch.linalg.matrix_norm(rows, 2))
        else:
            found.append(rows.abs().sum(2).max(1).values)
    return torch.cat(found)

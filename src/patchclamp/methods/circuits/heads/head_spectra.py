"""OV and QK as matrices: what a head moves and how it compares, from its weights alone.

Singular values of what a head moves (OV) and of how it compares (QK), their effective
rank, and whether OV copies tokens.
Sources: Elhage et al. 2021 (OV, QK, copying by eigenvalues); Roy & Vetterli 2007
(effective rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.findings import Null
from patchclamp.methods.circuits.heads.weights import (
    key_head,
    layers_of,
    output_projection,
    projection,
    unembedding,
)
from patchclamp.methods.statistics import permutation_null
from patchclamp.net import Net


def ov(net: Net, layer: int, head: int) -> Float[Tensor, "width width"]:
    """What a head writes of what it reads, biases left out: `written = stream @ ov`."""
    into, out = _ov_factors(net, layer, head)
    return into @ out


def qk(net: Net, layer: int, head: int) -> Float[Tensor, "width width"]:
    """How a head compares: `score = query_stream @ qk @ key_stream`, biases left out.

    Rotary positions turn queries and keys afterwards; this is the product at distance 0.
    """
    query, key = _qk_factors(net, layer, head)
    return query @ key


def _ov_factors(net: Net, layer: int, head: int) -> tuple[Tensor, Tensor]:
    out = output_projection(net, layer).weight
    value = projection(net, layer, "v")
    return value.weight[:, key_head(net, head, out.shape[0], value.num_heads)], out[head]


def _qk_factors(net: Net, layer: int, head: int) -> tuple[Tensor, Tensor]:
    query, key = projection(net, layer, "q"), projection(net, layer, "k")
    shared = key_head(net, head, query.num_heads, key.num_heads)
    return query.weight[:, head] / query.weight.shape[2] ** 0.5, key.weight[:, shared].T


def singular_values(
    left: Float[Tensor, "width unit"], right: Float[Tensor, "unit width"]
) -> Float[Tensor, "unit"]:
    """Singular values of `left @ right`, in float64, without making the large product."""
    _, r = torch.linalg.qr(left.double())
    _, s = torch.linalg.qr(right.T.double())
    values: Tensor = torch.linalg.svdvals(r @ s.T)
    return values


def effective_rank(values: Float[Tensor, "unit"]) -> float:
    """Exponential of the entropy of the singular values as shares; 0 for a zero matrix."""
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    share = values / total
    return float((-torch.xlogy(share, share).sum()).exp())


def copying(eigenvalues: Tensor) -> float:
    """Sum of the eigenvalues over the sum of their sizes: 1 copies, -1 inverts; 0 for none."""
    size = float(eigenvalues.abs().sum())
    return float(eigenvalues.real.sum()) / size if size else 0.0


@dataclass(frozen=True, kw_only=True)
class HeadSpectra:
    """Spectrum, effective rank and copying score of every head, from its weights.

    The copying score is that of the path embedding -> OV -> final norm's gain ->
    unembedding, a matrix over the vocabulary whose nonzero eigenvalues are those of a
    small matrix over the head's units. The null is the same head with random values
    weights of the same spectrum (turned at random), and says how far from 0 chance goes.

    Shapes: a row of the table for each (layer, head).
    Units: singular values as the weights have them (QK divided by the root of the head's
        units); copying between -1 and 1.
    Randomness: the null's rotations, by `seed`.
    Cost: one product of embedding and unembedding, then small matrices.
    Raises: SiteError without an adapter, or without unembedding.
    Fails when: norms between embedding and head change directions much: gains of the
        norms inside the layers are left out. `HeadTyping`'s copy score goes through the network.
    Source: see the module docstring.
    """

    num_nulls: int = 99
    seed: int = 0

    def run(self, net: Net) -> pl.DataFrame:
        """Columns: layer, head, ov_values, ov_rank, qk_values, qk_rank, copying, null_low,
        null_high, p (two-sided)."""
        generator = torch.Generator().manual_seed(self.seed)
        out = unembedding(net)
        embed = net.module.get_submodule(net.taps("embed")[0].site.module).get_parameter("weight")
        read = out.centre((out.gain[:, None] * out.unembed).T).T.double()
        closing = read @ embed.detach().double()  # (W, W): from a head's output to its input
        listed = []
        for layer in layers_of(net):
            for head in range(output_projection(net, layer).weight.shape[0]):
                value, write = (x.double() for x in _ov_factors(net, layer, head))
                query, key = _qk_factors(net, layer, head)
                back = write @ closing
                score = copying(torch.linalg.eigvals(back @ value))
                null = self._null(score, back, value, generator)
                moved, compared = singular_values(value, write), singular_values(query, key)
                listed.append(
                    {
                        "layer": layer,
                        "head": head,
                        "ov_values": moved.tolist(),
                        "ov_rank": effective_rank(moved),
                        "qk_values": compared.tolist(),
                        "qk_rank": effective_rank(compared),
                        "copying": score,
                        "null_low": null.low,
                        "null_high": null.high,
                        "p": null.p,
                    }
                )
        return pl.DataFrame(listed)

    def _null(self, score: float, back: Tensor, value: Tensor, generator: torch.Generator) -> Null:
        """Value weights with the same singular values that read random directions."""
        _, r = torch.linalg.qr(value)
        drawn = []
        for _ in range(self.num_nulls):
            start = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            drawn.append(copying(torch.linalg.eigvals(back @ torch.linalg.qr(start)[0] @ r)))
        kind = "value weights of the same spectrum that read random directions"
        return permutation_null(score, torch.tensor(drawn), kind, two_sided=True)

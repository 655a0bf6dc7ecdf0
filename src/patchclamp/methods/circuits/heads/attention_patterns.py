"""Attention patterns of every head, by layer, and where each head looks most.

Patterns are found by structure in the captured graph, so any attention will do: fused or
written out, grouped, with or without an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.errors import OptionError, SiteError
from patchclamp.net import Net

_NAME = re.compile(r"attn\.(\d+)\.pattern")


def patterns(
    net: Net, inputs: object, *, batch_size: int = 16
) -> dict[int, Float[Tensor, "row head query key"]]:
    """Layer -> attention pattern. Rows of a pattern sum to 1.

    Raises:
        SiteError: no attention was found in this network.
    """
    names = {name: _NAME.fullmatch(name) for name in net.sites.aliases}
    layers = {name: int(found[1]) for name, found in names.items() if found is not None}
    if not layers:
        raise SiteError(
            f"no attention was found in {net.name}",
            hint="net.coverage() says what was found and whether the graph was captured",
        )
    acts = net.record(inputs, list(layers), batch_size=batch_size)
    return {layer: acts.tensor(name) for name, layer in sorted(layers.items(), key=lambda x: x[1])}


def is_causal(found: Mapping[int, Tensor]) -> bool:
    """Whether no head of any layer looks ahead."""
    return all(bool((pattern.triu(1) == 0).all()) for pattern in found.values())


@dataclass(frozen=True, kw_only=True)
class AttentionPatterns:
    """The strongest attention of every head, and how widely it spreads.

    `spread` is the exponential of the entropy in nats, averaged over queries: the number
    of keys over which a head spreads its attention (1 is one key).

    Shapes: a row of the table for each (layer, head, row, rank).
    Units: attention, a share of 1.
    Randomness: none.  Cost: one forward pass with fused attention written out.
    Raises: SiteError if no attention is found; OptionError for `top` below 1.
    Fails when: attention is taken for influence: a head can attend to a value that it
        then ignores. Observed, not intervened.
    Source: patterns as in Vaswani et al. 2017; Clark et al. 2019 for the entropy.
    """

    top: int = 3
    batch_size: int = 16

    def run(self, net: Net, inputs: object) -> pl.DataFrame:
        """Columns: layer, head, row, rank, query, key, attention, spread."""
        if self.top < 1:
            raise OptionError("top must be at least 1", got=str(self.top))
        parts = []
        for layer, pattern in patterns(net, inputs, batch_size=self.batch_size).items():
            rows, heads, queries, keys = pattern.shape
            num = min(self.top, queries * keys)
            best, where = pattern.flatten(2).topk(num, dim=-1)
            entropy = -torch.xlogy(pattern, pattern).sum(-1)
            spread = entropy.exp().mean(-1)
            row, head, rank = torch.meshgrid(
                torch.arange(rows), torch.arange(heads), torch.arange(num), indexing="ij"
            )
            parts.append(
                pl.DataFrame(
                    {
                        "layer": torch.full((row.numel(),), layer).numpy(),
                        "head": head.flatten().numpy(),
                        "row": row.flatten().numpy(),
                        "rank": rank.flatten().numpy(),
                        "query": (where // keys).flatten().numpy(),
                        "key": (where % keys).flatten().numpy(),
                        "attention": best.flatten().double().numpy(),
                        "spread": spread[..., None].expand_as(best).flatten().double().numpy(),
                    }
                )
            )
        return pl.concat(parts)

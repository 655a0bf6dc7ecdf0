"""A small decoder transformer over bytes: the network in which induction heads are studied.

Pre-norm blocks, learned positions that are added to the embeddings, separate
query, key, value and output projections, and a two-layer perceptron. Two layers
are the least in which an induction head can form, because it needs a
previous-token head below it.

Shapes: input_ids (batch, length) in 0..vocab - 1, length <= context;
logits (batch, length, vocab).
Sources: Vaswani et al. 2017; Radford et al. 2019 (pre-norm); Olsson et al. 2022 (induction).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor, nn

from patchclamp.core.errors import OptionError

INIT_STD = 0.02
"""Standard deviation of all weights at the start, as in GPT-2."""


@dataclass(frozen=True, kw_only=True)
class TinyLMConfig:
    """The anatomy of a `TinyLM`, under the names that adapters look for."""

    vocab: int
    context: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Attention(nn.Module):
    """Causal self-attention, with fewer key and value heads than query heads if asked for.

    Shapes: (batch, length, width) to the same.
    """

    def __init__(self, config: TinyLMConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        query_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, query_width)
        self.k_proj = nn.Linear(config.width, kv_width)
        self.v_proj = nn.Linear(config.width, kv_width)
        self.o_proj = nn.Linear(query_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.num_kv_heads != self.num_heads:
            shared = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(z.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between. Shapes: (batch, length, width) to the same."""

    def __init__(self, config: TinyLMConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.act = nn.GELU()
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class Block(nn.Module):
    """x + attn(norm1(x)), then + mlp(norm2(.)). Shapes: (batch, length, width) to the same."""

    def __init__(self, config: TinyLMConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class TinyLM(nn.Module):
    """The decoder. `config` states its anatomy.

    There is no length check in `forward`: it would become a guard in a captured
    graph. A longer input than `context` fails in the position table.

    Shapes: input_ids (batch, length); logits (batch, length, vocab).
    """

    def __init__(
        self,
        vocab: int = 256,
        context: int = 128,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads or num_heads % (num_kv_heads or num_heads):
            raise OptionError(
                "heads do not divide evenly",
                got=f"width={width}, num_heads={num_heads}, num_kv_heads={num_kv_heads}",
                expected="num_heads divides width, and num_kv_heads divides num_heads",
            )
        self.config = TinyLMConfig(
            vocab=vocab,
            context=context,
            width=width,
            mlp_width=4 * width if mlp_width is None else mlp_width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=width // num_heads,
        )
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.unembed(self.norm(x))
        return logits

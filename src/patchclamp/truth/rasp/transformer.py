"""The plain transformer that programs are compiled into.

Attention and a rectified perceptron in every block, added to the residual stream, with
no normalisation; each attention looks at all places or only at earlier ones. Names
follow the bundled language model, so that one form of addresses serves for both. The
weights are zero until a compiler fills them in; they are kept in float64, because what
leaks through a sharp softmax is far below the rounding of float32.

Shapes: input_ids (batch, length), length <= context; logits (batch, length, class).
Source: Vaswani et al. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """The anatomy of a `PlantedTransformer`, under the names that adapters look for."""

    vocab: int
    context: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_classes: int
    causal: bool

    @property
    def num_kv_heads(self) -> int:
        """Every query head has a key and value head of its own."""
        return self.num_heads


class PlantedAttention(nn.Module):
    """Self-attention, heads side by side. Shapes: (batch, length, width) to the same."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.causal = config.causal
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, dtype=torch.float64)
        self.k_proj = nn.Linear(config.width, inner, dtype=torch.float64)
        self.v_proj = nn.Linear(config.width, inner, dtype=torch.float64)
        self.o_proj = nn.Linear(inner, config.width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.o_proj(z.transpose(1, 2).reshape(batch, length, -1))
        return out


class PlantedMLP(nn.Module):
    """Two linear layers with a rectifier between. Shapes: (batch, length, width) to the same."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, dtype=torch.float64)
        self.act = nn.ReLU()
        self.down = nn.Linear(config.mlp_width, config.width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class PlantedBlock(nn.Module):
    """x + attn(x), then + mlp(.). Shapes: (batch, length, width) to the same."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.attn = PlantedAttention(config)
        self.mlp = PlantedMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y: Tensor = x + self.mlp(x)
        return y


class PlantedTransformer(nn.Module):
    """The network, all zeros. `config` states its anatomy; see the module docstring."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width, dtype=torch.float64)
        self.position = nn.Embedding(config.context, config.width, dtype=torch.float64)
        self.blocks = nn.ModuleList(PlantedBlock(config) for _ in range(config.num_layers))
        self.unembed = nn.Linear(config.width, config.num_classes, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def layer(self, n: int) -> PlantedBlock:
        """Block `n`."""
        block = self.blocks[n]
        assert isinstance(block, PlantedBlock)
        return block

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.unembed(x)
        return logits

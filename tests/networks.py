"""Small networks for the tests of the engines: real anatomies, and one trap each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.net import Net
from patchclamp.specimens import build

SPECIMENS: dict[str, Callable[[], Tensor]] = {
    "digits_cnn": lambda: torch.rand(3, 1, 8, 8),
    "digits_mlp": lambda: torch.rand(3, 1, 8, 8),
    "lstm": lambda: torch.randint(0, 256, (3, 6)),
    "resnet": lambda: torch.rand(3, 1, 8, 8),
    "spiking": lambda: torch.rand(3, 1, 8, 8) * 2,
    "tiny_lm": lambda: torch.randint(0, 256, (3, 7)),
    "vit": lambda: torch.rand(3, 1, 8, 8),
}
"""Every specimen and how to draw inputs for it."""


def fresh(name: str) -> tuple[nn.Module, Tensor]:
    """A newly made specimen in evaluation mode, and inputs; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"num_steps": 3} if name == "spiking" else {}
        module = build(name, **options).eval()
        for child in module.modules():  # batch norm that does something
            if isinstance(child, nn.BatchNorm2d):
                child.running_mean.normal_(std=0.2)
                child.running_var.uniform_(0.5, 1.5)
        return module, SPECIMENS[name]()


@cache
def opened(name: str) -> tuple[Net, Tensor]:
    """A specimen, opened once for the whole run; tests must leave it as found."""
    module, inputs = fresh(name)
    return patchclamp.open(module, inputs), inputs


def tiny_llama(**options: object) -> nn.Module:
    """A random Llama with grouped-query attention: 4 query heads, 2 key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def tiny_gpt2(**options: object) -> nn.Module:
    """A random GPT-2: queries, keys and values from one fused projection."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **options,
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def tiny_bert(**options: object) -> nn.Module:
    """A random BERT encoder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        **options,
    )
    return _seeded(lambda: BertModel(config))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return make().eval()


class TwoLinear(nn.Module):
    """y = b(a(x)): closed forms by hand. Shapes: (batch, 3) to (batch, 2), hidden (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class InPlace(nn.Module):
    """A module's value is changed in place by the next operation, by module and by method."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(x)))
        y.add_(1.0).relu_()
        return self.third(y)


class ViewWrite(nn.Module):
    """Writes through a view, which needs the whole graph to be traced again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, :2].mul_(2.0)
        y[:, 3] = 0.5
        return self.second(y)


class DoubledSlope(torch.autograd.Function):
    """Identity forward; a backward that no tracing of the forward could guess."""

    @staticmethod
    def forward(ctx: object, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] * ctx.factor, None  # type: ignore[attr-defined]


class Surrogate(nn.Module):
    """The network's gradient is 7 times that of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(DoubledSlope.apply(self.first(x), 7.0))


class Blocked(nn.Module):
    """A gate computed under no_grad: gradients must not pass through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            gate = torch.sigmoid(y.sum(1, keepdim=True))
        return self.second(y * gate)


class Difference(nn.Module):
    """Two inputs; zero when both are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lin(x) - 2 * self.lin(y)


class Counting(nn.Module):
    """Scales by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.lin(x) * self.calls


class Remembering(nn.Module):
    """Subtracts the first input that it ever saw."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x
        return self.lin(x - self.first.mean(0, keepdim=True))


class Random(nn.Module):
    """Adds noise also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.randn(3)


class RunningBuffer(nn.Module):
    """Adds to a buffer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.total.add_(y.detach().mean(0))
        return y + self.total


class ReplacedBuffer(nn.Module):
    """Puts a new tensor in the place of its buffer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        self.total = self.total + y.detach().mean(0)
        return y + self.total


class DataDependent(nn.Module):
    """Takes one of two ways by the sign of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.up = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return self.up(y) if y.sum() > 0 else -y


class Dropping(nn.Module):
    """Dropout and casts to the type that is there already: nothing to see in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).to(torch.float32).contiguous()
        return self.second(F.dropout(self.drop(y), 0.3, self.training))


class Reused(nn.Module):
    """One module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.lin(x))
        return self.head(x)


class Keyword(nn.Module):
    """Its child is called with keyword arguments only."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, *, left: Tensor, right: Tensor, gain: float = 1.0) -> Tensor:
            return self.lin(left) + gain * right

    def __init__(self) -> None:
        super().__init__()
        self.mix = self.Mix()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(left=x, right=x * 2, gain=3.0))


class DictOutput(nn.Module):
    """Gives a dictionary; its child too."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"up": self.lin(x), "down": -x}

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.Parts()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made = self.parts(x)
        return {"logits": self.head(made["up"] + made["down"]), "hidden": made["up"]}


@dataclass
class Answer:
    """An output that torch knows nothing about."""

    logits: Tensor
    hidden: Tensor


class DataclassOutput(nn.Module):
    """Gives a plain dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Answer:
        hidden = self.first(x)
        return Answer(logits=self.head(hidden), hidden=hidden)


class LengthFirst(nn.Module):
    """Takes and gives (length, batch, unit)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.lin(x))
        return self.head(y + y.mean(0, keepdim=True))


class Attend(nn.Module):
    """Self-attention on its own. `how` is "fused", "causal", "masked", "grouped", or written
    out: "eager", "permuted" (keys laid out for the product at once) or "einsum"."""

    def __init__(self, how: str, num_heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.how, self.num_heads = how, num_heads
        self.num_kv = num_heads // 2 if how == "grouped" else num_heads
        head = width // num_heads
        self.q = nn.Linear(width, num_heads * head)
        self.k = nn.Linear(width, self.num_kv * head)
        self.v = nn.Linear(width, self.num_kv * head)
        self.o = nn.Linear(num_heads * head, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.num_kv, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.num_kv, -1)).transpose(1, 2)
        if self.how == "eager":
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            z = torch.softmax(scores, -1) @ v
        elif self.how == "permuted":
            k = self.k(x).unflatten(-1, (self.num_kv, -1)).permute(0, 2, 3, 1)
            z = torch.softmax(q @ k * q.shape[-1] ** -0.5, -1) @ v
        elif self.how == "einsum":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            z = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)
            return self.o(z.flatten(2))
        elif self.how == "masked":
            length = x.shape[1]
            distance = torch.arange(length)[:, None] - torch.arange(length)[None]
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=-0.5 * distance.abs().to(x.dtype))
        else:
            z = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.how == "causal", enable_gqa=self.how == "grouped"
            )
        return self.o(z.transpose(1, 2).flatten(2))

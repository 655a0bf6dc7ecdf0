"""One small network for each way of building one that has misled methods tied to modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.net import Net

NUM, SIZE = 3, 6


class Functional(nn.Module):
    """Layers around a body that is a function."""

    def __init__(self, body: Callable[[Functional, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE, width), nn.Linear(width, 3)
        self.middle, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.batch = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.activation = nn.ReLU()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, self.first(x)))


class Pictures(nn.Module):
    """Convolutions, norm, pooling of both kinds, flattening and concatenation."""

    def __init__(self, body: Callable[[Pictures, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.batch = nn.BatchNorm2d(4)
        self.body = body
        self.last = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            self.body(self, self.first(x.unflatten(1, (1, SIZE, 1)).expand(-1, -1, -1, SIZE)))
        )


class Tokens(nn.Module):
    """Attention among the elements of the input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(1, width), nn.Linear(width, 3 * width)
        self.place = nn.Parameter(torch.randn(SIZE, width))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None]) + self.place
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)
        )
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(h.mean(1))


def in_place(m: Functional, h: Tensor) -> Tensor:
    h = h * 1.5
    h += 0.1
    F.relu_(h)
    return m.middle(h).relu_()


def written(m: Functional, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :3] = F.relu(h[:, 3:6]) * 2
    return F.relu(m.middle(h))


def pooled(m: Pictures, h: Tensor) -> Tensor:
    h = F.max_pool2d(F.relu(m.batch(h)), 2, stride=1)
    return torch.cat([F.avg_pool2d(m.second(h), 2).flatten(1), h.amax((2, 3))], 1)


def own_norm(m: Functional, h: Tensor) -> Tensor:
    return F.gelu((h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt())


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "functional relu": lambda: Functional(lambda m, h: F.relu(m.middle(torch.relu(h)))),
    "one relu module used three times": lambda: Functional(
        lambda m, h: m.activation(m.middle(m.activation(m.middle(m.activation(h)))))
    ),
    "written in place": lambda: Functional(in_place),
    "part of a value written over": lambda: Functional(written),
    "residual sum": lambda: Functional(lambda m, h: h + m.middle(F.relu(h)) + F.relu(h)),
    "gelu": lambda: Functional(lambda m, h: F.gelu(m.middle(F.gelu(h, approximate="tanh")))),
    "silu": lambda: Functional(lambda m, h: F.silu(m.middle(F.silu(h)))),
    "relu6": lambda: Functional(lambda m, h: F.relu6(4 * m.middle(F.relu6(5 * h)))),
    "sigmoid and tanh": lambda: Functional(lambda m, h: torch.sigmoid(m.middle(h.tanh()))),
    "batch norm": lambda: Functional(lambda m, h: F.relu(m.batch(m.middle(F.relu(m.batch(h)))))),
    "layer norm": lambda: Functional(lambda m, h: m.norm(h) + m.middle(F.relu(m.norm(3 * h)))),
    "norm written out": lambda: Functional(own_norm),
    "gated product": lambda: Functional(lambda m, h: F.silu(m.gate(h)) * m.middle(h)),
    "softmax written out": lambda: Functional(
        lambda m, h: m.middle(h).exp() / m.middle(h).exp().sum(-1, keepdim=True)
    ),
    "maximum of two": lambda: Functional(lambda m, h: torch.maximum(m.middle(h), m.gate(h))),
    "pooling and concatenation": lambda: Pictures(pooled),
    "attention": Tokens,
}


@cache
def made(name: str) -> tuple[nn.Module, Net, Tensor]:
    """As `fresh`, opened and captured once for all; tests leave it as found."""
    return fresh(name)


def fresh(name: str) -> tuple[nn.Module, Net, Tensor]:
    """A structure with random weights in float64, opened, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        module, x = STRUCTURES[name](), torch.randn(NUM, SIZE)
        module(x)  # fills what is lazy, and the norms' statistics
        module = module.eval().double()
    return module, patchclamp.open(module, x.double()), x.double()

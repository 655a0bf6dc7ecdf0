"""Random networks as rules, built operator by operator: no capture, so that tests can have many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered, merged
from patchclamp.bounding.sets import Around, Ball, Box, PerturbedSet
from patchclamp.rules.operators.builder import Builder
from patchclamp.rules.operators.table import TABLE
from patchclamp.rules.value import Value

aten = torch.ops.aten


def drawn(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * size


@dataclass
class Maker:
    """A builder that is called with operators."""

    b: Builder

    def __call__(self, target: object, *args: object, **kwargs: object) -> Value:
        made = TABLE[target](self.b, *args, **kwargs)
        assert isinstance(made, Value)
        return made

    def leaf(self, name: str, *shape: int) -> Value:
        return self.b.leaf(shape, name)

    def linear(self, x: Value, width: int) -> Value:
        num = x.shape[-1]
        return self(
            aten.linear.default, x, drawn(width, num, size=num**-0.5), drawn(width, size=0.3)
        )


ACTIVATIONS = (
    aten.relu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.sin.default,
    aten.elu.default,
    aten.abs.default,
)


def mlp(m: Maker) -> Value:
    x = m.leaf("x", 1, 4)
    for _ in range(2):
        x = m(_any(ACTIVATIONS), m.linear(x, 6))
    return m.linear(x, 3)


def convolutional(m: Maker) -> Value:
    x = m.leaf("x", 1, 2, 4, 4)
    x = m(aten.conv2d.default, x, drawn(3, 2, 3, 3, size=0.3), drawn(3, size=0.2), [1, 1], [1, 1])
    x = m(aten.batch_norm.default, x, *(drawn(3).exp() for _ in range(4)), False, 0.1, 1e-5, False)
    x = m(aten.max_pool2d.default, m(aten.relu.default, x), [2, 2])
    x = m(aten.adaptive_avg_pool2d.default, x, [1, 2])
    return m.linear(m(aten.flatten.using_ints, x, 1), 3)


def residual(m: Maker) -> Value:
    x = m.leaf("x", 1, 4)
    for _ in range(2):
        x = m(aten.add.Tensor, x, m.linear(m(_any(ACTIVATIONS), m.linear(x, 5)), 4))
    return m(aten.cat.default, [x, m(aten.neg.default, x)], 1)


def attention(m: Maker) -> Value:
    x = m.leaf("x", 1, 3, 4)
    x = m(aten.layer_norm.default, x, [4], drawn(4), drawn(4), 1e-2)
    parts = [m(aten.view.default, m.linear(x, 4), [1, 1, 3, 4]) for _ in range(3)]
    z = m(aten.scaled_dot_product_attention.default, *parts, None, 0.0, bool(torch.rand(()) < 0.5))
    return m(aten.add.Tensor, x, m.linear(m(aten.view.default, z, [1, 3, 4]), 4))


def gated(m: Maker) -> Value:
    x = m.leaf("x", 1, 4)
    y = m(aten.mul.Tensor, m(aten.silu.default, m.linear(x, 5)), m.linear(x, 5))
    return m(aten.softmax.int, m.linear(y, 3), -1)


def weights(m: Maker) -> Value:
    """A weight and a bias are perturbed, and the input too."""
    x, w, c = m.leaf("x", 1, 3), m.leaf("w", 4, 3), m.leaf("c", 4)
    return m.linear(m(_any(ACTIVATIONS), m(aten.linear.default, x, w, c)), 2)


FAMILIES: tuple[Callable[[Maker], Value], ...] = (
    mlp,
    convolutional,
    residual,
    attention,
    gated,
    weights,
)


def _any(x: tuple[object, ...]) -> object:
    return x[int(torch.randint(len(x), ()))]


def network(family: Callable[[Maker], Value]) -> Lowered:
    """One network of a family, from torch's generator."""
    b = Builder(torch.float64, [], family.__name__)
    output = family(Maker(b))
    leaves = {v.name: v for v in b.values if v.rule is None}
    return merged(Lowered(tuple(b.values), leaves, output, torch.float64), exact=True)


def sets(given: Lowered, radius: float, norm: float, num: int = 2) -> dict[str, PerturbedSet]:
    """Neighbourhoods of random points."""
    around = Around(radius, norm)
    return {name: around.at(drawn(num, *v.shape)) for name, v in given.leaves.items()}


def smaller(of: PerturbedSet, share: float) -> PerturbedSet:
    """The same set shrunk towards its middle."""
    if isinstance(of, Ball):
        return Ball(of.centre, float(torch.as_tensor(of.radius).max()) * share, of.norm)
    low, high = of.hull()
    middle, radius = (low + high) / 2, (high - low) / 2 * share
    return Box(middle - radius, middle + radius)


def points(of: PerturbedSet, num: int) -> Tensor:
    """(num, N, *shape), corners and the surface of a ball among them."""
    low, high = of.hull()
    share = torch.rand(num, *low.shape, dtype=torch.float64)
    share = torch.where(torch.rand_like(share) < 0.3, share.round(), share)
    share[: num // 5] = share[: num // 5].round()
    x = torch.maximum(torch.minimum(low + share * (high - low), high), low)
    if not isinstance(of, Ball):
        return x
    step = x - of.centre
    length = torch.linalg.vector_norm(step.flatten(2), of.norm, dim=2)
    limit = torch.as_tensor(of.radius, dtype=torch.float64) * (1 - 1e-12)
    scale = (limit / length.clamp(min=1e-300)).clamp(max=1)
    return of.centre + step * scale.reshape(*scale.shape, *(1,) * (x.ndim - 2))

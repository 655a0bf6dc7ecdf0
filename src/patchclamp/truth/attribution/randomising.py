"""Maps of a network whose weights are made random, layer by layer: a map that stays is not of it.

A map that explains what a network learnt must change when what it learnt is destroyed. Two
orders: *cascading*, from the output down, everything above staying random; *independent*, one
layer at a time. Maps are compared with those of the whole network, example by example, by rank
correlation and by structural similarity; both are of absolute maps.

The user's network is never touched: a copy is.

A layer is a module with weights of its own. Its random weights are its own, put in another
order, so that their sizes stay what they were; a layer whose weights are all equal therefore
stays as it is, and is left out and named.

Source: Adebayo et al. 2018, arXiv 1810.03292. They draw weights anew, as before training.
Structural similarity: Wang et al. 2004, IEEE Trans. Image Process. 13(4).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from patchclamp.core.errors import EngineError, InputError, OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import SPACE, Attribution, Explainer
from patchclamp.model.inputs import Call
from patchclamp.net import Net
from patchclamp.truth.attribution.base import Score

WINDOW = 7
"""Side of the window of structural similarity, at most."""

_C1, _C2 = 0.01**2, 0.03**2


class Order(StrEnum):
    """Which layers are random together."""

    CASCADING = "cascading"
    INDEPENDENT = "independent"


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """Maps after some layers were made random, compared with those before.

    Attributes:
        layer: the last one that was made random.
        num_random: how many are.
        spearman: rank correlation, chance 0.
        ssim: structural similarity of maps from 0 to 1; None where maps have no rows and columns.
        num_empty: all-zero maps: they say nothing, and count as unlike (0).
    """

    layer: str
    num_random: int
    spearman: Score
    ssim: Score | None
    num_empty: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Randomised:
    """All steps, the output's layer first.

    Attributes:
        unchanged: layers that no order of their weights changes; they were left out.
    """

    method: str
    order: Order
    steps: tuple[Step, ...]
    unchanged: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RandomiseLayers:
    """Compare a method's maps with those of copies with random layers.

    Shapes: inputs and maps as the method's; similarities one for each example.
    Randomness: by `seed`.  Cost: one run of the method for each layer, and one more.
    Raises: EngineError if the network has no weights to make random; else what the method raises.
    Fails when: maps are alike for another reason than the network: two maps that both follow the
        image's edges correlate. Controls (Sobel) show how much that is.
    Source: Adebayo et al. 2018, arXiv 1810.03292.

    Attributes:
        order: cascading or independent.
        num_layers: at most so many, evenly spaced, the last and the first among them; None: all.
        seed: of the weights' new order.
    """

    order: Order = Order.CASCADING
    num_layers: int | None = None
    seed: int = 0

    def run(
        self,
        method: Explainer,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Randomised:
        """Maps of the network, and of each copy."""
        if self.num_layers is not None and self.num_layers < 1:
            raise OptionError("num_layers is at least 1", got=str(self.num_layers))
        call = net.call(inputs)
        layers, unchanged = changeable(net, call)
        plain = method.run(net, call, target, at=at)
        before = heat_of(plain)
        shown = _spread(len(layers), self.num_layers)
        steps: list[Step] = []
        progress.start(f"{method.name}, layers made random", len(shown), "layers")
        for last in shown:
            which = layers[: last + 1] if self.order is Order.CASCADING else [layers[last]]
            other = method.run(randomised(net, call, which, self.seed), call, target, at=at)
            steps.append(_compared(layers[last], len(which), plain, before, heat_of(other)))
            progress.advance()
        progress.finish()
        return Randomised(
            method=method.name, order=self.order, steps=tuple(steps), unchanged=unchanged
        )


def randomised(net: Net, call: Call, layers: list[str], seed: int) -> Net:
    """A copy of the network in which these layers' weights are in another order.

    A layer gets the same new order whichever others are made random with it. Weights that
    several layers share change in all of them.
    """
    module = copy.deepcopy(net.module)
    with torch.no_grad():
        for name in layers:
            generator = torch.Generator().manual_seed(_seed(name, seed))
            for p in module.get_submodule(name).parameters(recurse=False):
                order = torch.randperm(p.numel(), generator=generator).to(p.device)
                p.copy_(p.flatten()[order].reshape(p.shape))
    return Net(dataclasses.replace(net.loaded, module=module), call)


def changeable(net: Net, call: Call) -> tuple[list[str], tuple[str, ...]]:
    """Layers that run on these inputs, the output's first, and those that no order changes."""
    ran = _ran(net, call)
    layers: list[str] = []
    same: list[str] = []
    for name in ran:
        parts = list(net.module.get_submodule(name).parameters(recurse=False))
        alike = all(bool((p == p.flatten()[0]).all()) for p in parts if p.numel())
        (same if alike else layers).append(name)
    if not layers:
        raise EngineError(f"{net.name} has no weights that could be made random")
    return layers, tuple(same)


def _ran(net: Net, call: Call) -> list[str]:
    """Modules with weights of their own, by when they ran last, the latest first.

    A part whose weights its parent uses without calling it (of `nn.MultiheadAttention`, say)
    counts as run with its parent, if that has weights too.
    """
    owners = {
        name: m
        for name, m in net.module.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    when: dict[str, int] = {}
    clock = itertools.count()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            when[name] = next(clock)

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in owners.items()]
    try:
        with torch.no_grad():
            net.hooks.run(call)
    finally:
        for handle in handles:
            handle.remove()
    for name in owners:
        parent = name.rpartition(".")[0]
        if name not in when and parent in when:
            when[name] = when[parent]
    return sorted(when, key=lambda name: -when[name])


def heat_of(maps: Attribution) -> Tensor:
    """The map's heat in float64; refused if it is not finite."""
    heat = maps.heat().detach().double()
    if not bool(torch.isfinite(heat).all()):
        raise InputError(f"{maps.method} holds NaN or infinity")
    return heat


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of each example; 0 where a map is the same everywhere.

    Shapes: (num, ...) both; returns (num,).
    """
    x, y = (_centred(_ranks(t.flatten(1))) for t in (a, b))
    size = x.norm(dim=1) * y.norm(dim=1)
    return torch.where(size > 0, (x * y).sum(1) / size.where(size > 0, torch.ones_like(size)), 0.0)


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Of maps scaled to at most 1, over flat windows: (num, row, column) both; returns (num,)."""
    side = min(WINDOW, *a.shape[1:])
    x, y = (
        (t / t.flatten(1).amax(1).clamp(min=torch.finfo(t.dtype).tiny)[:, None, None])[:, None]
        for t in (a, b)
    )

    def mean(t: Tensor) -> Tensor:
        return avg_pool2d(t, side, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy = (mean(t * t) - m * m for t, m in ((x, mx), (y, my)))
    both = mean(x * y) - mx * my
    made = (2 * mx * my + _C1) * (2 * both + _C2)
    made = made / ((mx * mx + my * my + _C1) * (vx.clamp(min=0) + vy.clamp(min=0) + _C2))
    return made.flatten(1).mean(1)


def _compared(
    layer: str, num_random: int, plain: Attribution, before: Tensor, after: Tensor
) -> Step:
    empty = (after == 0).flatten(1).all(1)
    alike = rank_correlation(before, after)
    ssim = None
    if before.ndim == 3 and sum(a in SPACE for a in plain.axes) == 2:
        rows = structural_similarity(before, after).where(~empty, 0.0)
        ssim = Score.of(rows, 0.0)
    return Step(
        layer=layer,
        num_random=num_random,
        spearman=Score.of(alike, 0.0),
        ssim=ssim,
        num_empty=int(empty.sum()),
    )


def _spread(num: int, most: int | None) -> list[int]:
    """Numbers from 0 to num - 1, evenly spaced, at most so many."""
    if most is None or most >= num:
        return [*range(num)]
    if most == 1:
        return [num - 1]
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]


def _seed(name: str, seed: int) -> int:
    """A seed of this layer's own, the same in every process."""
    return (sum((i + 1) * b for i, b in enumerate(name.encode())) * 1_000_003 + seed) % 2**63


def _ranks(x: Tensor) -> Tensor:
    """Ranks within each row, ties at their mean."""
    ordered = x.sort(1).values.contiguous()
    low = torch.searchsorted(ordered, x.contiguous(), side="left")
    high = torch.searchsorted(ordered, x.contiguous(), side="right")
    return (low + high).double() / 2


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)

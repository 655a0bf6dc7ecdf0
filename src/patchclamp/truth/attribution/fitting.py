"""Training the small networks of the benches: two architectures and one loop.

Seconds on one core, deterministic under a seed, and the caller's random state stays as it was.
With a `radius` the loop trains on the worst points that projected gradient ascent finds in an
L2 ball around every example (Madry et al. 2018, arXiv 1706.06083).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from patchclamp.core.errors import EngineError, OptionError
from patchclamp.truth.attribution.base import Build

OVERSHOOT = 2.5
"""How far all steps together may lead, in radii: enough to come back along the sphere."""

GROWING = 0.5
"""Share of the epochs in which the radius grows to its full size; from the full radius at once
training often ends at one class for everything."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: AdamW, one cycle of the rate, and possibly adversaries.

    Attributes:
        epochs, rows: passes over the examples, and examples in a step.
        rate, decay: the largest rate, and AdamW's weight decay.
        radius: of the L2 ball that adversaries are looked for in; 0 for none.
        steps: of the adversary.
    """

    epochs: int = 20
    rows: int = 128
    rate: float = 3e-3
    decay: float = 0.1
    radius: float = 0.0
    steps: int = 5

    def __post_init__(self) -> None:
        if min(self.epochs, self.rows, self.steps) < 1:
            raise OptionError(
                "epochs, rows and steps are at least 1",
                got=f"{self.epochs}, {self.rows}, {self.steps}",
            )
        if not (self.rate > 0 and self.decay >= 0 and 0 <= self.radius < math.inf):
            raise OptionError(
                "the rate is positive, decay and radius are at least 0",
                got=f"{self.rate:g}, {self.decay:g}, {self.radius:g}",
            )


def perceptron(shape: tuple[int, ...], num_classes: int, /, *, width: int = 256) -> nn.Module:
    """Two hidden layers of rectified units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


def convolutional(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    """Three convolutions with pooling, then two linear layers that know the place."""
    channels, rows, columns = _image(shape)
    if min(rows, columns) < 4:
        raise OptionError("the network pools by 4", got=str(shape), expected="sides of 4 or more")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (rows // 4) * (columns // 4), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def anywhere(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    """Three convolutions and the largest value of each channel: what is there, not where."""
    channels, _, _ = _image(shape)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def fitted(
    build: Build, inputs: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, *, seed: int
) -> nn.Module:
    """A trained network in eval mode, without gradients for its weights.

    Shapes: inputs (num, *feature), labels (num,).
    Randomness: by `seed`.  Cost: epochs x num forward-backwards, times 1 + steps with adversaries.
    Raises: EngineError if the loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[]):  # dropout of the caller's architecture draws there
        torch.manual_seed(seed)
        module = build(tuple(inputs.shape[1:]), num_classes).train()
        _train(module, inputs, labels, recipe, torch.Generator().manual_seed(seed))
    return module.eval().requires_grad_(False)


def _train(
    module: nn.Module, inputs: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), recipe.rate, weight_decay=recipe.decay)
    num_steps = recipe.epochs * math.ceil(len(inputs) / recipe.rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=num_steps)
    loss = torch.zeros(())
    for epoch in range(recipe.epochs):
        radius = recipe.radius * min(1.0, (epoch + 1) / (GROWING * recipe.epochs))
        for at in torch.randperm(len(inputs), generator=generator).split(recipe.rows):
            x, y = inputs[at], labels[at]
            if radius > 0:
                x = worst(module, x, y, radius, recipe.steps)
            with torch.enable_grad():
                loss = cross_entropy(module(x), y)
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            schedule.step()
        if not bool(torch.isfinite(loss)):
            raise EngineError("training diverged", got=f"epoch {epoch}", hint="a smaller rate")


def worst(module: nn.Module, x: Tensor, labels: Tensor, radius: float, steps: int) -> Tensor:
    """Points in the L2 balls around `x` with a higher loss, by projected gradient ascent."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(module(point), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, point)
        delta = delta + slope * (radius * OVERSHOOT / steps) / _norm(slope)
        delta = delta * (radius / _norm(delta)).clamp(max=1)
    return (x + delta).detach()


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = x.flatten(1).norm(dim=1).clamp(min=1e-12)
    return norm.reshape(-1, *[1] * (x.ndim - 1))


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise OptionError(
            "this network takes images", got=str(shape), expected="(channel, row, column)"
        )
    return shape[0], shape[1], shape[2]

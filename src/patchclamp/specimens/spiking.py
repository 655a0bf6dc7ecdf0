"""A leaky integrate-and-fire network with a Python time loop and a surrogate gradient.

The same modules are called at every time step, and the spike is a custom
`autograd.Function` whose gradient a naive graph capture loses.

    u[t] = decay * u[t - 1] * (1 - s[t - 1]) + I[t],   s[t] = 1 if u[t] > threshold else 0

Shapes: a static image (batch, 1, row, column), shown for `num_steps` steps as a
constant current, or a spike train (batch, step, unit), one step per time step;
logits (batch, class) are the readout's mean potential over time.
Source: Neftci, Mostafa & Zenke 2019 (surrogate gradients); fast sigmoid of Zenke & Ganguli 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SLOPE = 10.0
"""Steepness of the surrogate: its width is about 1 / SLOPE of the threshold."""


class Spike(torch.autograd.Function):
    """Heaviside step forward; derivative of a fast sigmoid backward.

    Shapes: any; `excess` is the potential less the threshold.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(excess: Tensor) -> Tensor:
        return (excess > 0).to(excess.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (excess,) = ctx.saved_tensors
        surrogate: Tensor = gradients[0] / (1 + SLOPE * excess.abs()) ** 2
        return surrogate


class LeakyIntegrateAndFire(nn.Module):
    """One step of a population. The state is passed in and out, never kept in the module.

    Shapes: current, membrane (batch, unit); returns spikes and membrane, both (batch, unit),
    the membrane after the reset to zero of the units that fired.
    """

    def __init__(self, decay: float, threshold: float) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold

    def forward(self, current: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        potential = self.decay * membrane + current
        spikes: Tensor = Spike.apply(potential - self.threshold)  # type: ignore[no-untyped-call]  # torch's own signature
        # The reset carries no gradient, as is usual: its own surrogate would fight the spike's.
        return spikes, potential * (1 - spikes.detach())


class SpikingNet(nn.Module):
    """Two spiking layers and a leaky readout that does not fire.

    Shapes: images (batch, 1, row, column) or spikes (batch, step, unit); logits (batch, class).
    """

    def __init__(
        self,
        num_inputs: int = 64,
        hidden: int = 64,
        num_classes: int = 10,
        num_steps: int = 8,
        decay: float = 0.9,
        threshold: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_steps, self.hidden, self.decay = num_steps, hidden, decay
        self.linear1 = nn.Linear(num_inputs, hidden)
        self.lif1 = LeakyIntegrateAndFire(decay, threshold)
        self.linear2 = nn.Linear(hidden, hidden)
        self.lif2 = LeakyIntegrateAndFire(decay, threshold)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        static = inputs.dim() == 4
        frame = inputs.flatten(1) if static else inputs[:, 0]
        membrane1 = frame.new_zeros(frame.shape[0], self.hidden)
        membrane2 = torch.zeros_like(membrane1)
        readout = frame.new_zeros(frame.shape[0], self.head.out_features)
        total = torch.zeros_like(readout)
        num_steps = self.num_steps if static else inputs.shape[1]
        for step in range(num_steps):
            current = frame if static else inputs[:, step]
            spikes1, membrane1 = self.lif1(self.linear1(current), membrane1)
            spikes2, membrane2 = self.lif2(self.linear2(spikes1), membrane2)
            readout = self.decay * readout + self.head(spikes2)
            total = total + readout
        return total / num_steps

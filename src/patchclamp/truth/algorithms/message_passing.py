"""A plain message-passing network: linear maps with rectifiers, aggregation by max or min.

One step is one or more *rounds*. In a round every node turns its state into a message,
takes the largest or smallest message of the nodes that have an arc to it, and makes
its new state from its old one and from that. All nodes share all weights.

    message_u = relu(W_m h_u + b_m)
    taken_v   = max or min over arcs u -> v of (message_u + scale * length_uv)
    h_v       = relu(W_u [h_v, taken_v] + b_u)

`scale` is a constant of each message unit, so that lengths of arcs can be added along
the way (with min: the shortest-path semiring). A node with no arc to it takes 0 under
max and `NONE` under min; message units may be seen by their own node too, as by an arc
of length 0.

Shapes: features (row, node, unit); graph (node, node) or (row, node, node), entry
[u, v] the length of the arc u -> v and infinity where there is none; output
(row, node, unit).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError

NONE = 2.0**18
"""What stands for infinity in messages: finite, so that all arithmetic stays exact."""


class Aggregate(StrEnum):
    """How messages become one."""

    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, kw_only=True)
class RoundSize:
    """Sizes and constants of one round.

    Attributes:
        message, state_in, state_out: numbers of units.
        aggregate: how messages become one.
        scales: factor of an arc's length, one number a message unit.
        sees_itself: message units that also reach their own node.
    """

    message: int
    state_in: int
    state_out: int
    aggregate: Aggregate
    scales: tuple[float, ...]
    sees_itself: tuple[int, ...] = ()


class Round(nn.Module):
    """Messages, aggregation and update; see the module docstring."""

    scales: Tensor
    sees_itself: Tensor

    def __init__(self, size: RoundSize) -> None:
        super().__init__()
        self.aggregate = size.aggregate
        self.message = nn.Linear(size.state_in, size.message)
        self.update = nn.Linear(size.state_in + size.message, size.state_out)
        own = torch.zeros(size.message, dtype=torch.bool)
        own[list(size.sees_itself)] = True
        self.register_buffer("scales", torch.tensor(size.scales))
        self.register_buffer("sees_itself", own)

    def forward(self, state: Tensor, graph: Tensor) -> Tensor:
        sent = torch.relu(self.message(state)).unsqueeze(2)  # row, sender, receiver, unit
        own = torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)
        arc = torch.isfinite(graph).unsqueeze(-1)
        itself = own.unsqueeze(-1) & self.sees_itself
        length = torch.where(arc & ~itself, graph.unsqueeze(-1), 0.0)
        carried = sent + self.scales * length
        if self.aggregate is Aggregate.MAX:
            taken = torch.where(arc | itself, carried, 0.0).amax(1)
        else:
            taken = torch.where(arc | itself, carried, NONE).amin(1)
        return torch.relu(self.update(torch.cat([state, taken], -1)))


class MessagePassing(nn.Module):
    """The network: `encode`, then the rounds in turn, `num_steps` times, then `readout`.

    Every round is a child under its own name, so that its maps are `{round}.message`
    and `{round}.update`. `graph` may be given to the network for good, to `forward`, or both
    (then the latter counts).

    Raises:
        OptionError: it has a graph from neither.
    """

    graph: Tensor | None

    def __init__(
        self,
        num_features: int,
        rounds: Mapping[str, RoundSize],
        num_outputs: int,
        num_steps: int,
        graph: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_steps, self.round_names = num_steps, tuple(rounds)
        sizes = [*rounds.values()]
        self.encode = nn.Linear(num_features, sizes[0].state_in)
        for name, size in rounds.items():
            self.add_module(name, Round(size))
        self.readout = nn.Linear(sizes[-1].state_out, num_outputs)
        self.register_buffer("graph", graph)

    def round(self, name: str) -> Round:
        """The round of this name."""
        found = self.get_submodule(name)
        assert isinstance(found, Round)
        return found

    def forward(self, features: Tensor, graph: Tensor | None = None) -> Tensor:
        graph = self.graph if graph is None else graph
        if graph is None:
            raise OptionError(
                "the network has no graph", hint="network(features, graph), or graph= when made"
            )
        if graph.ndim == 2:
            graph = graph.unsqueeze(0)
        state = torch.relu(self.encode(features))
        for _ in range(self.num_steps):
            for name in self.round_names:
                state = self.round(name)(state, graph)
        output: Tensor = self.readout(state)
        return output


def randomised(network: MessagePassing, seed: int) -> MessagePassing:
    """Control: the same network with every weight matrix and bias shuffled within itself.

    Shuffling keeps every size that a weight has, and loses what it is for.
    """
    found = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return found

"""From an algorithm's plan to the weights of a message-passing network, and to its circuit.

A plan names units: the features of a node, its state, its messages, its outputs. `compiled`
gives them random places and gains among decoys (see `patchclamp.truth.planting`) and
writes the weights. Gains are powers of two and all numbers are whole, so that float32
arithmetic is exact. Decoys here are dead ends and silent units.

The circuit is unrolled: `{round}.update@3[7]` is unit 7 of the state after the fourth
call of that round's update. Messages, through their aggregation, and the state before
write into an update; the state writes into messages. An edge stands for all nodes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.circuit import Node
from patchclamp.core.errors import OptionError
from patchclamp.truth.algorithms.message_passing import Aggregate, MessagePassing, RoundSize
from patchclamp.truth.planted_circuit import Family
from patchclamp.truth.planting import Layer, Space, generator_of, lay_out, write
from patchclamp.truth.wiring import INPUT, OutputSum, Wire, Wired, nodes

GAINS = (0.5, 1.0, 2.0)
SPREAD = 0.5
"""Of decoys: below 1, so that what feeds back through them dies out."""

TOLERANCE = 1e-3
"""All true values are whole numbers times powers of two."""

Features = Callable[[torch.Generator, int, int], Tensor]
Graphs = Callable[[torch.Generator, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round: `message` reads the state; `update` the state and the messages.

    Attributes:
        scales: factor of an arc's length for message units, where it is not 0.
        sees_itself: message units that also reach their own node.
    """

    message: Layer
    update: Layer
    aggregate: Aggregate
    scales: Mapping[str, float]
    sees_itself: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm as named units.

    Attributes:
        features: names of a node's inputs, in the order that `draw` gives.
        encode: units of the first state.
        rounds: one step.
        readout: outputs.
        num_steps: enough steps for this many nodes.
        graph: a random graph of so many nodes.
        draw: random features (row, node, feature) for so many rows and nodes.
    """

    name: str
    description: str
    features: tuple[str, ...]
    encode: Layer
    rounds: Mapping[str, RoundPlan]
    readout: Layer
    num_steps: Callable[[int], int]
    graph: Graphs
    draw: Features


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """An algorithm's network; `outputs` and `inputs` say where its features and outputs lie."""

    module: MessagePassing
    wires: tuple[Wire, ...]
    inputs: Space
    outputs: Space

    def features(self, drawn: Tensor, names: tuple[str, ...]) -> Tensor:
        """Features in the network's own order; its other inputs are 0."""
        x = drawn.new_zeros(*drawn.shape[:-1], self.inputs.size)
        x[..., [self.inputs.places[name] for name in names]] = drawn
        return x

    def output(self, made: Tensor, name: str) -> Tensor:
        """One named output: (row, node)."""
        return made[..., self.outputs.places[name]]


def compiled(
    plan: Algorithm, num_steps: int, *, seed: int = 0, graph: Tensor | None = None
) -> Compiled:
    """The network of a plan.

    Raises:
        OptionError: fewer than 2 steps: calls would have no number.
    """
    if num_steps < 2:
        raise OptionError("a compiled algorithm takes at least 2 steps", got=str(num_steps))
    generator = generator_of(plan.name, seed)

    def laid(names: list[str], dead_ends: int) -> Space:
        return lay_out(names, generator, dead_ends=dead_ends, silent=1, gains=GAINS)

    inputs = lay_out(plan.features, generator, dead_ends=1)
    outputs = lay_out([*plan.readout], generator, dead_ends=1)
    # A step starts in the space in which the last round ends, and the encoder's.
    last = [*plan.rounds.values()][-1]
    states = [laid([*last.update], 2)]
    messages = []
    for number, rounds in enumerate(plan.rounds.values()):
        messages.append(laid([*rounds.message], 1))
        is_last = number == len(plan.rounds) - 1
        states.append(states[0] if is_last else laid([*rounds.update], 2))
    sizes = {
        name: _size(planned, states[k], messages[k], states[k + 1])
        for k, (name, planned) in enumerate(plan.rounds.items())
    }
    module = MessagePassing(inputs.size, sizes, outputs.size, num_steps, graph).eval()
    true = {"encode": write(module.encode, plan.encode, [inputs], states[0], generator)}
    for k, (name, planned) in enumerate(plan.rounds.items()):
        before, sent, after = states[k], messages[k], states[k + 1]
        maps = module.round(name)
        true[f"{name}.message"] = write(
            maps.message, planned.message, [before], sent, generator, spread=SPREAD
        )
        true[f"{name}.update"] = write(
            maps.update, planned.update, [before, sent], after, generator, spread=SPREAD
        )
    true["readout"] = write(module.readout, plan.readout, [states[-1]], outputs, generator)
    wires = _unrolled(module, [*plan.rounds], num_steps, true)
    return Compiled(module=module, wires=wires, inputs=inputs, outputs=outputs)


def _size(planned: RoundPlan, before: Space, message: Space, after: Space) -> RoundSize:
    scales = [0.0] * message.size
    for name, scale in planned.scales.items():
        scales[message.places[name]] = scale * message.gains[name]
    itself = [message.places[name] for name in planned.sees_itself]
    return RoundSize(
        message=message.size,
        state_in=before.size,
        state_out=after.size,
        aggregate=planned.aggregate,
        scales=tuple(scales),
        # A silent decoy stays 0 where no arc comes in only if its own node sees it.
        sees_itself=(*itself, *message.silent),
    )


def _unrolled(
    module: MessagePassing,
    rounds: list[str],
    num_steps: int,
    true: Mapping[str, frozenset[tuple[int, int]]],
) -> tuple[Wire, ...]:
    wires: list[Wire] = []

    def call(path: str, number: int | None, writers: tuple[Node, ...]) -> tuple[Node, ...]:
        weight = module.get_submodule(path).get_parameter("weight")
        wire = Wire(
            module=path,
            call=number or 0,
            address=path if number is None else f"{path}@{number}",
            writers=writers,
            num_outputs=weight.shape[0],
            true=true[path],
        )
        wires.append(wire)
        return wire.outputs

    state = call("encode", None, nodes(INPUT, module.encode.in_features))
    for step in range(num_steps):
        for name in rounds:
            sent = call(f"{name}.message", step, state)
            state = call(f"{name}.update", step, (*state, *sent))
    call("readout", None, state)
    return tuple(wires)


def wire_algorithm(plan: Algorithm, seed: int = 0, num_nodes: int = 5, num_pairs: int = 6) -> Wired:
    """A plan's network on one random graph, with pairs that differ in a node's features.

    The metric is the sum of the outputs over all nodes.

    Raises:
        OptionError: fewer than 2 nodes.
    """
    if num_nodes < 2:
        raise OptionError("a graph for a planted algorithm has nodes", got=str(num_nodes))
    generator = generator_of(f"{plan.name} on a graph", seed)
    graph = plan.graph(generator, num_nodes)
    num_steps = max(2, plan.num_steps(num_nodes))
    network = compiled(plan, num_steps, seed=seed, graph=graph)
    clean, corrupt = (
        network.features(plan.draw(generator, num_pairs, num_nodes), plan.features)
        for _ in range(2)
    )
    units = tuple(network.outputs.places.values())
    return Wired(
        name=f"{plan.name}/{seed}",
        family=Family.MESSAGE_PASSING,
        module=network.module,
        wires=network.wires,
        clean=clean,
        corrupt=corrupt,
        metric=OutputSum(units=units, name="sum of outputs over all nodes"),
        inputs=network.inputs.places,
        ends=tuple(network.wires[-1].outputs[unit] for unit in units),
        tolerance=TOLERANCE,
        description=plan.description,
    )


# ---- inputs -----------------------------------------------------------------------


def source_and_index(generator: torch.Generator, num_rows: int, num_nodes: int) -> Tensor:
    """One source a row, and numbers 1 to `num_nodes` in random order: (row, node, 2)."""
    sources = torch.randint(num_nodes, (num_rows,), generator=generator)
    orders = [torch.randperm(num_nodes, generator=generator) + 1 for _ in range(num_rows)]
    is_source = torch.nn.functional.one_hot(sources, num_nodes)
    return torch.stack([is_source, torch.stack(orders)], -1).float()


def random_graph(
    generator: torch.Generator,
    num_nodes: int,
    *,
    chance: float = 0.4,
    both_ways: bool = False,
    lengths: tuple[int, int] = (1, 1),
) -> Tensor:
    """Arcs drawn apart, with whole lengths: (node, node), infinity where there is none."""
    drawn = torch.rand(num_nodes, num_nodes, generator=generator) < chance
    length = torch.randint(
        lengths[0], lengths[1] + 1, (num_nodes, num_nodes), generator=generator
    ).float()
    if both_ways:
        drawn = drawn.triu(1) | drawn.triu(1).T
        length = length.triu(1) + length.triu(1).T
    drawn.fill_diagonal_(False)
    return torch.where(drawn, length, torch.inf)

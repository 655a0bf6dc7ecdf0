"""Perceptrons, convolutional and recurrent networks: they compute what they say, and only
through the edges that are called true."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Edge
from patchclamp.core.errors import OptionError
from patchclamp.methods.circuits.network.wiring import wire
from patchclamp.truth.planted_circuit import Family
from patchclamp.truth.planted_layers import CNNS, KINDS, MLPS, RECURRENT, plant_layers, wired
from patchclamp.truth.planting import Space, Unit, lay_out, write
from patchclamp.truth.wiring import Wired, possible_edges

SEEDS = (0, 1)

NUM_STRUCTURAL = {  # counted by hand from the plans, layer by layer
    "chain": 2 + 2 + 1 + 1,
    "majority": 6 + 2,
    "select": 3 + 4 + 2,
    "largest": 2 + 3 + 2,
    "parity": 5 + 6 + 2,
    "corner": 2 + 2 + 1,
    "upright": 2 + 2,
    "opponent": 2 + 1 + 1,
    "latch": 2 + 3 * (2 + 4) + 2,
    "toggle": 2 + (4 + 8) + 2 * (4 + 16) + 4,
    "coincidence": 2 + 3 + 4 + 4 + 2,
    "delay": 2 + 3 + 1,
}


def measured(w: Wired, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return w.metric(w.module(inputs), torch.arange(len(inputs)))


def features(w: Wired) -> dict[str, Tensor]:
    return {name: w.clean[:, place] for name, place in w.inputs.items()}


# ---- they compute what they say ---------------------------------------------------

BY_HAND: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "chain": lambda x: x["a"] + 0.5 * x["b"] + 0.2,
    "majority": lambda x: (x["a"] + x["b"] + x["c"] >= 2).float(),
    "select": lambda x: torch.where(x["which"] > 0.5, x["a"], x["b"]),
    "largest": lambda x: torch.maximum(x["a"], x["b"]),
    "parity": lambda x: (x["a"] + x["b"] + x["c"]) % 2,
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_perceptrons_compute_their_function(name: str, seed: int) -> None:
    w = wired(name, seed)
    expected = BY_HAND[name](features(w))
    assert expected.std() > 0.1
    torch.testing.assert_close(measured(w, w.clean), expected, atol=1e-5, rtol=0)


def steps(w: Wired, name: str) -> Tensor:
    """A feature at every step: (row, step)."""
    return w.clean[:, w.inputs[name] :: 3]


STEPWISE: dict[str, Callable[[Wired], Tensor]] = {
    "latch": lambda w: steps(w, "x").amax(1),
    "toggle": lambda w: steps(w, "x").sum(1) % 2,
    "coincidence": lambda w: (steps(w, "x") * steps(w, "y")).sum(1),
    "delay": lambda w: w.clean[:, w.inputs["x"]] + 0.5 * w.clean[:, w.inputs["y"]],
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("seed", SEEDS)
def test_recurrent_networks_compute_their_function(name: str, seed: int) -> None:
    w = wired(name, seed)
    expected = STEPWISE[name](w)
    assert expected.std() > 0.1
    torch.testing.assert_close(measured(w, w.clean), expected, atol=1e-5, rtol=0)


def square(w: Wired, channel: str, rows: slice, columns: slice) -> Tensor:
    drawing = torch.zeros(1, *w.clean.shape[1:])
    drawing[0, w.inputs[channel], rows, columns] = 1
    return measured(w, drawing)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_corner_network_sees_corners_only(seed: int) -> None:
    w, every = wired("corner", seed), slice(None)
    assert square(w, "ink", slice(2, 6), slice(2, 6)).item() == pytest.approx(0.55, abs=1e-5)
    assert square(w, "ink", slice(2, 6), every).item() == 0  # an upper edge, no left one
    assert square(w, "ink", every, slice(2, 6)).item() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_upright_network_weighs_left_against_upper_edges(seed: int) -> None:
    w, every = wired("upright", seed), slice(None)
    left, upper = square(w, "ink", every, slice(3, 6)), square(w, "ink", slice(3, 6), every)
    assert left.item() == pytest.approx(2.7, abs=1e-4)  # three cells of height 0.9
    torch.testing.assert_close(left, -upper)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_opponent_network_sees_one_colour_without_the_other(seed: int) -> None:
    w = wired("opponent", seed)
    inside = slice(3, 5)
    assert square(w, "red", inside, inside).item() > 0.5
    assert square(w, "green", inside, inside).item() == pytest.approx(0, abs=1e-6)
    both = torch.zeros(1, *w.clean.shape[1:])
    both[0, [w.inputs["red"], w.inputs["green"]], 3:5, 3:5] = 1
    assert measured(w, both).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["majority", "corner", "toggle"])
def test_control_random_weights_compute_something_else(name: str) -> None:
    w = wired(name)
    with torch.no_grad():
        before = measured(w, w.clean)
        for parameter in w.module.parameters():
            order = torch.randperm(parameter.numel())
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    after = measured(w, w.clean)
    assert (after - before).abs().mean() > 0.1


# ---- the edges --------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_but_true_edges_has_any_effect(name: str, seed: int) -> None:
    w = wired(name, seed)
    circuit = w.planted()
    effects = {e: float(v.abs().max()) for e, v in w.effects(possible_edges(w.wires)).items()}
    others = [effect for e, effect in effects.items() if e not in circuit.structural]
    assert len(others) > len(circuit.structural)
    assert max(others) == 0
    assert min(effects[e] for e in circuit.active) > 0.1  # far above the tolerance
    assert max((effects[e] for e in circuit.structural - circuit.active), default=0) < 1e-5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_true_edges_are_those_of_the_plan(name: str, seed: int) -> None:
    circuit = plant_layers(name, seed)
    assert len(circuit.structural) == NUM_STRUCTURAL[name]
    assert len(circuit.active) >= 0.8 * len(circuit.structural)


def test_there_are_many_distinct_networks_of_three_families() -> None:
    circuits = [plant_layers(name, seed) for name in KINDS for seed in SEEDS]
    truths = {frozenset(map(str, c.structural)) for c in circuits}
    assert len(truths) == len(circuits) >= 15
    assert {c.family for c in circuits} == {Family.MLP, Family.CNN, Family.RECURRENT}
    again = plant_layers("chain", 1)
    torch.testing.assert_close(again.clean, circuits[1].clean, rtol=0, atol=0)
    assert again.structural == circuits[1].structural


@pytest.mark.parametrize("name", ["parity", "corner", "upright", "toggle", "delay"])
def test_methods_see_the_same_edges_under_the_same_names(name: str) -> None:
    w = wired(name)
    net = patchclamp.open(w.module, w.clean)
    assert net.capture_error() is None
    seen = wire(net, "layers")
    theirs = {
        Edge(seen.writers[j], seen.readers[i].node, seen.readers[i].slot)
        for i, j in np.argwhere(seen.possible)
    }
    assert theirs == set(possible_edges(w.wires))
    for each in w.wires:
        assert each.address in net.sites


def test_patching_an_edge_into_the_output_is_its_weight_times_the_change() -> None:
    w = wired("chain", 3)
    values: list[Tensor] = []
    handle = w.module.get_submodule("head").register_forward_hook(
        lambda module, args, output: values.append(args[0])
    )
    for x in (w.clean, w.corrupt):
        measured(w, x)
    handle.remove()
    head = w.wires[-1]
    weight = w.module.get_submodule("head").get_parameter("weight").detach()
    for i, writer in enumerate(head.writers):
        edge = Edge(writer, w.ends[0])
        expected = weight[w.ends[0].unit, i] * (values[1] - values[0])[:, i]
        effect = w.effects([edge])[edge]
        torch.testing.assert_close(effect, torch.stack([expected, -expected]))


# ---- decoys -----------------------------------------------------------------------


def test_decoys_are_read_and_alive_but_move_nothing() -> None:
    draw = torch.Generator().manual_seed(5)
    inputs = Space(places={"x": 0}, gains={"x": 1.0}, size=2)
    middle = lay_out("y", draw, dead_ends=3, silent=2, constant=2, gains=(2.0,))
    out = Space(places={"z": 0}, gains={"z": 1.0}, size=1)
    first, second = nn.Linear(2, middle.size), nn.Linear(middle.size, 1)
    true = write(first, {"y": Unit({"x": 3.0}, 1.0)}, [inputs], middle, draw)
    assert true == {(0, middle.places["y"])}
    write(second, {"z": Unit({"y": 1.0}, 0.5)}, [middle], out, draw)
    x = torch.rand(50, 2)
    with torch.no_grad():
        hidden = torch.relu(first(x))
        torch.testing.assert_close(second(hidden)[:, 0], 3 * x[:, 0] + 1.5)
    assert (hidden[:, middle.silent] == 0).all()
    assert (hidden[:, middle.constant] == 1).all()
    assert (second.weight[0, [*middle.silent, *middle.constant]] != 0).all()
    dead = set(range(middle.size)) - {*middle.places.values(), *middle.silent, *middle.constant}
    assert (second.weight[0, list(dead)] == 0).all()
    assert (first.weight[list(dead)] != 0).all()


def test_dead_ends_change_as_much_as_true_units() -> None:
    w = wired("parity", 0)
    with torch.no_grad():
        change = (w.module[:2](w.clean) - w.module[:2](w.corrupt)).abs().mean(0)
    true = {e.writer.unit for e in w.planted().structural if e.writer.site == "fc0"}
    others = torch.stack([c for unit, c in enumerate(change) if unit not in true])
    assert others.max() > 0.3 * change.max()


# ---- errors -----------------------------------------------------------------------


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="majority"):
        plant_layers("majorty")
    assert {*MLPS, *CNNS, *RECURRENT} == KINDS.keys()


def test_a_plan_that_does_not_fit_is_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    space = lay_out("a", draw)
    with pytest.raises(OptionError, match="nothing makes"):
        write(nn.Linear(1, 1), {"a": Unit({"b": 1.0})}, [space], space, draw)
    with pytest.raises(OptionError, match="no place"):
        write(nn.Linear(1, 1), {"c": Unit({})}, [space], space, draw)
    with pytest.raises(OptionError, match="bias"):
        write(nn.Linear(1, 1, bias=False), {}, [space], space, draw)

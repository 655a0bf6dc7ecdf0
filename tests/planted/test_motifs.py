"""Motifs: they compute what they say, only through true edges, and are as hard as they are said
to be: each first-order score, worked out here with plain autograd, is blind where it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchclamp.core.circuit import Edge, Node
from patchclamp.core.errors import OptionError
from patchclamp.truth.motifs import MOTIFS, Form, Pairs, feature_pairs, motif, wired_motif
from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.rasp.edges import Pass, edge_effects, mlp
from patchclamp.truth.rasp.edges import possible_edges as stream_edges
from patchclamp.truth.rasp.transformer import PlantedTransformer
from patchclamp.truth.wiring import possible_edges

TABLE: dict[str, Callable[[int, int], float]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "backup": lambda a, b: a | b,
    "cancelling": lambda a, b: b,
    "inhibition": lambda a, b: a & (1 - b),
    "gate": lambda a, b: a & b,
}


def output(circuit: PlantedCircuit, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        made = circuit.module(inputs)
    seen = made if circuit.metric.position is None else made[:, circuit.metric.position]
    return circuit.metric(seen, torch.arange(len(inputs)))


def network(circuit: PlantedCircuit) -> PlantedTransformer:
    assert isinstance(circuit.module, PlantedTransformer)
    return circuit.module


# ---- what they compute ------------------------------------------------------------


@pytest.mark.parametrize("name", MOTIFS)
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_output_is_the_motif(name: str, form: Form, seed: int) -> None:
    circuit = motif(name, seed, form)
    for inputs, features in zip(
        (circuit.clean, circuit.corrupt), feature_pairs(Pairs.ALL, 3), strict=True
    ):
        expected = torch.tensor([float(TABLE[name](*row)) for row in features.tolist()])
        if name == "gate" and form is Form.MLP:
            expected = features[:, 0] * (features[:, 1] + 0.5)  # 0.5 shows that it is open
        atol = 1e-3 if name == "gate" else 1e-5  # a soft gate leaks
        torch.testing.assert_close(
            output(circuit, inputs).float(), expected.float(), atol=atol, rtol=0
        )


def test_pairs_hold_every_change_of_the_features() -> None:
    clean, corrupt = feature_pairs(Pairs.ALL, 2)
    changes = Counter(tuple((y - x).abs().tolist()) for x, y in zip(clean, corrupt, strict=True))
    assert changes == {(1, 0): 8, (0, 1): 8, (1, 1): 8}
    circuit = motif("or", 0, "mlp", pairs="together", repeats=2)
    assert output(circuit, circuit.clean).tolist() == pytest.approx([1, 1])
    assert output(circuit, circuit.corrupt).tolist() == pytest.approx([0, 0], abs=1e-6)


# ---- their edges ------------------------------------------------------------------

_CARRIED = {"embed>head:v": 2, "position>head:q": 2, "position>head:k": 2}
_THROUGH_MLP = {**_CARRIED, "head>mlp:": 2, "mlp>logits:": 1}
KINDS_OF_EDGES = {
    "and": _THROUGH_MLP,
    "or": _THROUGH_MLP,
    "xor": _THROUGH_MLP,
    "inhibition": _THROUGH_MLP,
    "backup": {**_THROUGH_MLP, "head>logits:": 1},
    "cancelling": dict.fromkeys((*_CARRIED, "head>logits:"), 3),
    "gate": {
        "embed>head:v": 2,
        "position>head:q": 1,  # the gate is asked by its writer, not by the place
        "position>head:k": 2,
        "head>head:q": 1,
        "head>logits:": 1,
    },
}


def kind(node: Node) -> str:
    return {"attn": "head", "mlp": "mlp"}.get(node.site.split(".")[0], node.site)


@pytest.mark.parametrize("name", MOTIFS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_edges_in_a_transformer_are_those_of_the_plan(name: str, seed: int) -> None:
    circuit = motif(name, seed)
    found = Counter(f"{kind(e.writer)}>{kind(e.reader)}:{e.slot}" for e in circuit.structural)
    assert found == KINDS_OF_EDGES[name]
    # Places are the same in both inputs, so that nothing is moved by where a head looks.
    assert circuit.structural - circuit.active == {
        e for e in circuit.structural if e.writer == Node("position")
    }


@pytest.mark.parametrize("name", MOTIFS)
def test_nothing_but_true_edges_has_any_effect(name: str) -> None:
    circuit = motif(name, 1)
    effects = edge_effects(
        network(circuit),
        circuit.clean,
        circuit.corrupt,
        circuit.metric,
        stream_edges(network(circuit)),
    )
    assert max(v for e, v in effects.items() if e not in circuit.structural) < 1e-9
    assert min(effects[e] for e in circuit.active) > 0.4
    wired = wired_motif(name, 1, *feature_pairs(Pairs.ALL, 1))
    planted = wired.planted()
    assert planted.structural == planted.active
    changes = {e: v.abs().max() for e, v in wired.effects(possible_edges(wired.wires)).items()}
    assert max(v for e, v in changes.items() if e not in planted.structural) == 0


@pytest.mark.parametrize("form", Form)
def test_seeds_draw_other_places_and_sizes(form: Form) -> None:
    circuits = [motif("xor", seed, form) for seed in range(6)]
    assert len({frozenset(map(str, c.structural)) for c in circuits}) >= 5
    again = motif("xor", 3, form)
    assert again.structural == circuits[3].structural
    assert torch.equal(again.clean, circuits[3].clean)
    assert {c.family for c in circuits} == {Family(form.value)}


def test_decoys_write_as_much_as_true_heads() -> None:
    circuit = motif("and", 0)
    clean, corrupt = Pass(), Pass()
    with torch.no_grad():
        clean.run(network(circuit), circuit.clean)
        corrupt.run(network(circuit), circuit.corrupt)
    true = {e.writer for e in circuit.structural}
    heads = [node for node in clean.written if kind(node) == "head"]
    change = {n: float((clean.written[n] - corrupt.written[n])[:, -1].norm()) for n in heads}
    decoys = [change[n] for n in heads if n not in true]
    assert len(decoys) >= 2
    assert max(decoys) > 0.3 * max(change.values())


def test_control_shuffled_weights_compute_no_motif() -> None:
    circuit = motif("and", 0)
    before = output(circuit, circuit.clean)
    with torch.no_grad():
        for parameter in circuit.module.parameters():
            order = torch.randperm(parameter.numel())
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    assert (output(circuit, circuit.clean) - before).abs().max() > 0.1


# ---- blindness --------------------------------------------------------------------

CLEAN, CORRUPT, ALONG = (0.0,), (1.0,), tuple((k + 0.5) / 20 for k in range(20))


def first_order(circuit: PlantedCircuit, points: tuple[float, ...]) -> dict[Edge, float]:
    """Size of the score of the edges from true heads to the true perceptron: the change of what a
    head writes, times the slope of the metric averaged over points between the embeddings."""
    module = network(circuit)
    clean, corrupt = Pass(), Pass()
    with torch.no_grad():
        clean.run(module, circuit.clean)
        corrupt.run(module, circuit.corrupt)
    edges = [e for e in circuit.structural if kind(e.writer) == "head" and kind(e.reader) == "mlp"]
    reader = edges[0].reader
    slope = sum(slope_at(circuit, reader, at) for at in points) / len(points)
    found = {}
    for edge in edges:
        change = corrupt.written[edge.writer] - clean.written[edge.writer]
        found[edge] = float((change * slope).sum((1, 2)).abs().max())
    return found


def slope_at(circuit: PlantedCircuit, reader: Node, at: float) -> Tensor:
    """Slope of the metric at the input of a perceptron, between clean (0) and corrupt (1)."""
    module, caught = network(circuit), []
    number = next(n for n in range(module.config.num_layers) if mlp(n) == reader)

    def mix(embed: torch.nn.Module, args: tuple[Tensor], value: Tensor) -> Tensor:
        return value + at * (embed.forward(circuit.corrupt) - value)

    def catch(perceptron: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        caught.append(torch.zeros_like(args[0], requires_grad=True))
        return (args[0] + caught[0],)  # a copy of its own: the stream also goes past it

    handles = [
        module.embed.register_forward_hook(mix),
        module.layer(number).mlp.register_forward_pre_hook(catch),
    ]
    made = module(circuit.clean)[:, circuit.metric.position]
    for handle in handles:
        handle.remove()
    total = circuit.metric(made, torch.arange(len(made))).sum()
    (slope,) = torch.autograd.grad(total, caught)
    return slope


BLIND = {
    "and": {CORRUPT},
    "or": {CLEAN},
    "xor": {ALONG},
    "backup": {CLEAN, CORRUPT, ALONG},
    "inhibition": {CLEAN, CORRUPT, ALONG},
}


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("points", [CLEAN, CORRUPT, ALONG], ids=["clean", "corrupt", "along"])
@pytest.mark.parametrize("seed", [0, 1])
def test_slopes_are_blind_where_the_module_says(
    name: str, points: tuple[float, ...], seed: int
) -> None:
    circuit = motif(name, seed, pairs=Pairs.TOGETHER)
    scores = first_order(circuit, points)
    assert len(scores) == 2
    assert scores.keys() <= circuit.active  # exact patching in both directions sees them
    if points in BLIND[name]:
        assert max(scores.values()) < 1e-9
    else:
        assert min(scores.values()) > 0.4


@pytest.mark.parametrize("name", BLIND)
def test_every_motif_is_seen_by_slopes_averaged_on_the_way_once_features_change_alone(
    name: str,
) -> None:
    circuit = motif(name, pairs=Pairs.ALL)
    assert min(first_order(circuit, ALONG).values()) > 0.4


SEEN = {  # (noising, denoising): edges into the motif's unit that exact patching sees
    "and": (2, 0),
    "or": (0, 2),
    "backup": (1, 1),
    "inhibition": (1, 1),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_direction_alone_is_blind(name: str, seed: int) -> None:
    wired = wired_motif(name, seed, *feature_pairs(Pairs.TOGETHER, 2))
    planted = wired.planted()
    readers = Counter(e.reader for e in planted.structural if e.reader.site == "fc1")
    unit = next(reader for reader, num in readers.items() if num == 2)
    effects = wired.effects(e for e in planted.structural if e.reader == unit)
    seen = [{e for e, v in effects.items() if v[d].abs().max() > 0.1} for d in (0, 1)]
    assert (len(seen[0]), len(seen[1])) == SEEN[name]
    assert seen[0] | seen[1] == effects.keys()  # both directions together miss nothing


def test_cancelling_hides_from_patching_at_the_feature_but_not_at_edges() -> None:
    circuit = motif("cancelling", 0)
    clean, corrupt = feature_pairs(Pairs.ALL, 3)
    only_a = (clean[:, 1] == corrupt[:, 1]).nonzero()[:, 0]
    shift = output(circuit, circuit.corrupt) - output(circuit, circuit.clean)
    assert shift[only_a].abs().max() < 1e-9
    into = [e for e in circuit.active if e.reader == Node("logits")]
    effects = edge_effects(
        network(circuit),
        circuit.clean[only_a],
        circuit.corrupt[only_a],
        circuit.metric,
        into,
    )
    assert sorted(effects.values()) == pytest.approx([0, 1, 1], abs=1e-9)


def test_an_open_gate_is_nearly_flat_in_its_query() -> None:
    circuit = motif("gate", 0, pairs=Pairs.TOGETHER)
    (edge,) = (e for e in circuit.active if e.slot == "q")
    module = network(circuit)
    n, h, size = int(edge.reader.site.split(".")[1]), edge.reader.unit, module.config.head_dim
    assert h is not None
    attn, rows, caught = module.layer(n).attn, slice(h * size, (h + 1) * size), []
    handle = attn.q_proj.register_forward_hook(lambda m, args, out: caught.append(out))
    made = module(circuit.clean)[:, circuit.metric.position]
    handle.remove()
    (slope,) = torch.autograd.grad(circuit.metric(made, torch.arange(len(made))).sum(), caught)
    clean, corrupt = Pass(), Pass()
    with torch.no_grad():
        clean.run(module, circuit.clean)
        corrupt.run(module, circuit.corrupt)
    change = corrupt.written[edge.writer] - clean.written[edge.writer]
    score = ((change @ attn.q_proj.weight[rows].T) * slope[..., rows]).sum((1, 2))
    exact = edge_effects(module, circuit.clean, circuit.corrupt, circuit.metric, [edge])[edge]
    assert exact > 0.99
    assert 0 < float(score.detach().abs().max()) < 0.02


# ---- errors -----------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="backup"):
        motif("bakcup")
    with pytest.raises(OptionError, match="pairs"):
        motif("and", repeats=0)

"""MIB's JSON: its form by hand, round trips, shared key heads, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from patchclamp.core.circuit import Circuit, Edge, Node, Provenance, Reader, circuit_of
from patchclamp.core.errors import DataError
from patchclamp.methods.circuits.comparing.exchange import from_mib, to_mib


def scored(num_layers: int, num_heads: int, kv_heads: int, extra: tuple[Node, ...] = ()) -> Circuit:
    """Random scores on all edges; the larger ones kept."""
    shared = num_heads // kv_heads
    writers, readers, seen = [Node("embed"), *extra], [], []
    for n in range(num_layers):
        readers_n = [Reader(Node(f"attn.{n}.z", h), "q") for h in range(num_heads)]
        for slot in "kv":
            site = f"attn.{n}.z" if shared == 1 else f"attn.{n}.{slot}"
            readers_n += [Reader(Node(site, g), slot) for g in range(kv_heads)]
        seen += [len(writers)] * len(readers_n)
        writers += [Node(f"attn.{n}.z", h) for h in range(num_heads)]
        readers += [*readers_n, Reader(Node(f"mlp.{n}.out"))]
        seen.append(len(writers))
        writers.append(Node(f"mlp.{n}.out"))
    readers.append(Reader(Node("logits")))
    seen.append(len(writers))
    possible = np.arange(len(writers))[None] < np.array(seen)[:, None]
    scores = np.random.default_rng(0).normal(size=possible.shape) * possible
    return Circuit(
        writers=tuple(writers),
        readers=tuple(readers),
        possible=possible,
        kept=possible & (np.abs(scores) > 1.5),
        scores=scores,
    )


def test_the_form_by_hand() -> None:
    base = scored(1, 1, 1)
    edges = [Edge.parse("embed->attn.0.z[0]<v>"), Edge.parse("attn.0.z[0]->logits")]
    made = circuit_of(edges, base.writers, base.readers, base.possible, Provenance())
    on, off = {"score": 1.0, "in_graph": True}, {"score": 0.0, "in_graph": False}
    assert json.loads(to_mib(made, width=8)) == {
        "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {
            "input": {"in_graph": True},
            "a0.h0": {"in_graph": True},
            "m0": {"in_graph": False},
            "logits": {"in_graph": True},
        },
        "edges": {
            "input->a0.h0<q>": off,
            "input->a0.h0<k>": off,
            "input->a0.h0<v>": on,
            "input->m0": off,
            "a0.h0->m0": off,
            "input->logits": off,
            "a0.h0->logits": on,
            "m0->logits": off,
        },
    }


def test_the_round_trip_keeps_edges_scores_and_mask() -> None:
    circuit = scored(3, 4, 4)
    again = from_mib(to_mib(circuit, width=32))
    assert again.writers == circuit.writers
    assert again.readers == circuit.readers
    assert (again.possible == circuit.possible).all()
    assert (again.kept == circuit.kept).all()
    assert (again.scores == circuit.scores).all()
    # 12 heads' 3 inputs, MLPs and logits of 3 layers with 4 heads, counted by hand
    assert (
        len(json.loads(to_mib(circuit, width=32))["edges"]) == 12 * (1 + 6 + 11) + 5 + 10 + 15 + 16
    )


def test_shared_key_heads_are_written_for_every_query_head_and_put_together_again() -> None:
    circuit = scored(2, 6, 2)
    text = to_mib(circuit, width=32)
    edges = json.loads(text)["edges"]
    score = circuit.scores[circuit.readers.index(Reader(Node("attn.1.k", 1), "k")), 0]
    parts = [edges[f"input->a1.h{h}<k>"]["score"] for h in (3, 4, 5)]
    assert parts == [pytest.approx(score / 3)] * 3
    again = from_mib(text, num_kv_heads=2)
    assert again.readers == circuit.readers
    assert np.allclose(again.scores, circuit.scores, rtol=1e-12, atol=0)
    assert (again.kept == circuit.kept).all()
    apart = from_mib(text)
    assert Reader(Node("attn.1.z", 5), "k") in apart.readers
    edges["input->a0.h0<k>"]["in_graph"] = not edges["input->a0.h1<k>"]["in_graph"]
    data = {**json.loads(text), "edges": edges}
    data["nodes"] = {name: {"in_graph": True} for name in data["nodes"]}
    with pytest.raises(DataError, match="disagree about"):
        from_mib(json.dumps(data), num_kv_heads=2)


def test_parallel_blocks_have_no_edge_from_attention_to_their_mlp() -> None:
    circuit = scored(2, 2, 2)
    possible = circuit.possible.copy()
    for n in range(2):
        row = circuit.readers.index(Reader(Node(f"mlp.{n}.out")))
        for h in range(2):
            possible[row, circuit.writers.index(Node(f"attn.{n}.z", h))] = False
    parallel = Circuit(
        writers=circuit.writers,
        readers=circuit.readers,
        possible=possible,
        kept=circuit.kept & possible,
        scores=circuit.scores * possible,
    )
    text = to_mib(parallel, width=4)
    assert json.loads(text)["cfg"]["parallel_attn_mlp"] is True
    assert (from_mib(text).possible == possible).all()


def test_a_table_of_positions_is_refused_or_merged() -> None:
    circuit = scored(1, 2, 2, extra=(Node("position"),))
    with pytest.raises(DataError, match=r"one input node.*position.*merge_inputs"):
        to_mib(circuit, width=4)
    edges = json.loads(to_mib(circuit, width=4, merge_inputs=True))["edges"]
    assert edges["input->logits"]["score"] == pytest.approx(circuit.scores[-1, :2].sum())
    assert edges["input->logits"]["in_graph"] == bool(circuit.kept[-1, :2].any())


def test_scores_of_nodes_and_edges_without_scores_are_read() -> None:
    data = json.loads(to_mib(scored(1, 1, 1), width=4))
    data["nodes"] = {name: {"in_graph": True, "score": math.nan} for name in data["nodes"]}
    data["edges"] = {"input->m0": {"in_graph": True}}
    circuit = from_mib(json.dumps(data), task="ioi")
    assert [str(e) for e in circuit.edges()] == ["embed->mlp.0.out"]
    assert circuit.num_possible == 8
    assert circuit.record.task == "ioi"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cfg"), "not a circuit in MIB's form"),
        (lambda d: d["cfg"].pop("n_heads"), "lacks counts"),
        (lambda d: d["nodes"].update({"a0.h7": {"in_graph": True}}), "no node 'a0.h7'"),
        (lambda d: d["nodes"]["m0"].update({"neurons": [1]}), "mask over neurons"),
        (lambda d: d["nodes"].update({"m0": {}}), "does not say"),
        (lambda d: d["edges"].update({"m0->a0.h0<q>": {"in_graph": False}}), "no edge 'm0->a0"),
        (lambda d: d["edges"].update({"input->a0.h0": {"in_graph": False}}), "no edge 'input->a0"),
        (lambda d: d["edges"].update({"input>m0": {"in_graph": False}}), "cannot be read"),
        (lambda d: d["edges"].update({"input->m0": {"in_graph": 1}}), "cannot be read"),
        (
            lambda d: (
                d["nodes"]["m0"].update({"in_graph": False}),
                d["edges"].update({"m0->logits": {"in_graph": True}}),
            ),
            "its node 'm0' is not",
        ),
    ],
)
def test_damaged_files_are_refused(change: object, message: str) -> None:
    data = json.loads(to_mib(scored(1, 2, 2), width=4))
    change(data)
    with pytest.raises(DataError, match=message):
        from_mib(json.dumps(data))


def test_what_the_form_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match="not JSON"):
        from_mib("{")
    with pytest.raises(DataError, match="cannot share"):
        from_mib(to_mib(scored(1, 4, 4), width=4), num_kv_heads=3)
    nodes = (Node(":input", 0),)
    flat = circuit_of([], nodes, (Reader(Node("first", 0)),), np.ones((1, 1), bool), Provenance())
    with pytest.raises(DataError, match="for transformers"):
        to_mib(flat, width=4)
    base = scored(1, 1, 1)
    at = [Node("embed"), *base.writers[1:-1], Node("mlp.0.out", None, 3)]
    edge = Edge(at[-1], Node("logits"))
    placed = circuit_of([edge], at, base.readers, base.possible, Provenance())
    with pytest.raises(DataError, match="no positions"):
        to_mib(placed, width=4)

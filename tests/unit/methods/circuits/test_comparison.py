"""Overlap by hand, a shared circuit against independent ones, and parts that do not match."""

from __future__ import annotations

import numpy as np
import pytest

from patchclamp.core.circuit import Circuit, Edge, Node, Provenance, Reader, circuit_of
from patchclamp.core.errors import DataError
from patchclamp.methods.circuits.comparing.comparison import CircuitComparison, aligned
from patchclamp.methods.circuits.comparing.exchange import from_mib, to_mib


def empty(num_layers: int = 3, num_heads: int = 4, extra: tuple[Node, ...] = ()) -> Circuit:
    """All edges of a transformer, none kept."""
    writers, readers = [Node("embed"), *extra], []
    seen: list[list[bool]] = []
    for n in range(num_layers):
        before = len(writers)
        for h in range(num_heads):
            for slot in "qkv":
                readers.append(Reader(Node(f"attn.{n}.z", h), slot))
                seen.append([True] * before)
        writers += [Node(f"attn.{n}.z", h) for h in range(num_heads)]
        readers.append(Reader(Node(f"mlp.{n}.out")))
        seen.append([True] * len(writers))
        writers.append(Node(f"mlp.{n}.out"))
    readers.append(Reader(Node("logits")))
    seen.append([True] * len(writers))
    possible = np.array([row + [False] * (len(writers) - len(row)) for row in seen])
    return circuit_of([], writers, readers, possible, Provenance())


def drawn(base: Circuit, num: int, seed: int) -> Circuit:
    """A circuit of `num` random edges."""
    flat = np.flatnonzero(base.possible.ravel())
    kept = np.zeros(base.possible.size, dtype=bool)
    kept[np.random.default_rng(seed).choice(flat, num, replace=False)] = True
    return base.with_kept(kept.reshape(base.possible.shape))


def kept(base: Circuit, *edges: str) -> Circuit:
    listed = [Edge.parse(e) for e in edges]
    return circuit_of(listed, base.writers, base.readers, base.possible, Provenance())


def test_overlap_by_hand() -> None:
    base = empty(2, 2)
    a = kept(base, "embed->attn.0.z[0]<q>", "attn.0.z[0]->attn.1.z[1]<k>", "attn.1.z[1]->logits")
    b = kept(base, "embed->attn.0.z[0]<q>", "attn.0.z[0]->mlp.1.out", "mlp.1.out->logits")
    kinds = {(0, 0): ("previous",), (1, 1): ("induction", "copy")}
    table = CircuitComparison(num_nulls=19).run(a, b, kinds)
    rows = {row["level"]: row for row in table.iter_rows(named=True)}
    assert list(rows) == [
        "edge", "node", "head", "head: copy", "head: induction", "head: previous",
    ]  # fmt: skip
    edge = rows["edge"]
    assert (edge["num_a"], edge["num_b"], edge["shared"]) == (3, 3, 1)
    assert edge["jaccard"] == pytest.approx(1 / 5)
    assert edge["share_of_a"] == pytest.approx(1 / 3)
    node = rows["node"]  # embed, 0.0, logits are shared; 1.1 and mlp.1 are not
    assert (node["num_a"], node["num_b"], node["shared"]) == (4, 4, 3)
    assert rows["head"]["jaccard"] == pytest.approx(1 / 2)
    assert rows["head: previous"]["jaccard"] == 1
    assert rows["head: induction"]["jaccard"] == 0


def test_a_planted_shared_part_is_found_and_independent_circuits_are_not_alike() -> None:
    base = empty()
    shared = drawn(base, 30, seed=0)
    a = base.with_kept(shared.kept | drawn(base, 15, seed=1).kept)
    b = base.with_kept(shared.kept | drawn(base, 15, seed=2).kept)
    method = CircuitComparison(num_nulls=99)
    edge = method.run(a, b).row(0, named=True)
    assert edge["level"] == "edge"
    assert edge["low"] > edge["null_high"]
    assert edge["p"] == pytest.approx(0.01)
    ps = [
        method.run(drawn(base, 45, seed=10 + s), drawn(base, 45, seed=50 + s))["p"][0]
        for s in range(10)
    ]
    assert sum(p <= 0.05 for p in ps) <= 2
    assert max(ps) > 0.3


def test_a_circuit_equals_itself_and_chance_keeps_the_kinds_of_edges() -> None:
    base = empty()
    a = drawn(base, 40, seed=3)
    assert CircuitComparison(num_nulls=19).run(a, a)["jaccard"].to_list() == [1.0, 1.0, 1.0]
    # Both keep all edges of one group: within groups nothing can move, so chance gives all.
    full = base.with_kept(
        np.array([[r.slot == "q" and r.node.site == "attn.2.z" for _ in base.writers]
                  for r in base.readers])
    )  # fmt: skip
    row = CircuitComparison(num_nulls=19).run(full, full).row(0, named=True)
    assert row["jaccard"] == 1
    assert row["null_mean"] > 0.4  # distances 0 to 3 of queries: much above 16 of 300 edges


def test_a_table_of_positions_is_left_out_and_other_differences_are_refused() -> None:
    plain, extended = empty(2, 2), empty(2, 2, extra=(Node("position"),))
    a = kept(plain, "embed->logits", "mlp.0.out->logits")
    b = kept(extended, "position->logits", "mlp.0.out->logits")
    left, right = aligned(a, b)
    assert left.writers == right.writers == plain.writers
    assert (left.num_edges, right.num_edges) == (2, 1)
    with pytest.raises(DataError, match=r"different parts.*attn\.0\.z\[2\]"):
        CircuitComparison().run(a, drawn(empty(2, 3), 5, seed=0))
    with pytest.raises(DataError, match="keeps no edge"):
        CircuitComparison().run(a, plain)
    possible = plain.possible.copy()
    possible[-1, 0] = False
    fewer = circuit_of(
        [Edge.parse("mlp.0.out->logits")], plain.writers, plain.readers, possible, Provenance()
    )
    with pytest.raises(DataError, match="only one of the two networks has this edge"):
        CircuitComparison().run(a, fewer)


def test_networks_without_layers_are_compared_by_reader_site() -> None:
    writers = [Node(":input", i) for i in range(4)] + [Node("first", i) for i in range(5)]
    readers = [Reader(Node("first", j)) for j in range(5)] + [
        Reader(Node("second", j)) for j in range(3)
    ]
    possible = np.zeros((8, 9), dtype=bool)
    possible[:5, :4], possible[5:, 4:] = True, True
    base = circuit_of([], writers, readers, possible, Provenance())
    a = kept(base, ":input[0]->first[1]", "first[1]->second[2]")
    row = CircuitComparison(num_nulls=199).run(a, a).row(0, named=True)
    assert row["jaccard"] == 1
    assert row["null_mean"] < 0.2
    assert CircuitComparison(num_nulls=9).run(a, a)["level"].to_list() == ["edge", "node"]


def test_circuits_read_back_from_the_exchange_form_compare_as_equal() -> None:
    a = drawn(empty(), 20, seed=4)
    b = from_mib(to_mib(a, width=16))
    assert CircuitComparison(num_nulls=9).run(a, b)["jaccard"].to_list() == [1.0, 1.0, 1.0]

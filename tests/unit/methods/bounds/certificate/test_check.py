"""The checker accepts proofs, and nothing that is not one."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from patchclamp.core.errors import DataError
from patchclamp.methods.bounds.certificate.check import CheckResult, check
from patchclamp.methods.bounds.certificate.form import (
    INPUT,
    LEAF,
    CaseProof,
    Certificate,
    Mode,
)
from patchclamp.methods.bounds.certificate.replay import Replay
from patchclamp.methods.bounds.certificate.tree import walk
from patchclamp.methods.bounds.property import Property
from tests.unit.methods.bounds.certificate.small_networks import conv_residual, mlp
from tests.unit.methods.bounds.certificate.small_proofs import (
    PROPERTY_FILE,
    NotProvedError,
    bisect,
    certificate,
    divide_neurons,
    true_property,
)

DATA = mlp([3, 10, 8, 3], seed=21)[0]


@cache
def planted(mode: Mode) -> tuple[Property, Certificate]:
    """Two true cases and their proofs, which take more than one leaf each."""
    replay = Replay(DATA)
    size = (0.5, 0.3) if mode is Mode.INPUT else (0.4, 0.4)
    prop = true_property(replay, *size, num_cases=2)
    search = bisect if mode is Mode.INPUT else divide_neurons
    proofs = [search(replay, case) for case in prop.cases]
    assert all(len(proof.layer) >= 3 for proof in proofs)
    assert len(proofs[0].layer) >= 9
    return prop, certificate(DATA, *proofs)


def verdict(cert: Certificate, prop: Property, data: bytes = DATA) -> CheckResult:
    return check(cert, data, prop, PROPERTY_FILE)


@pytest.mark.parametrize("mode", Mode)
def test_planted_proof_is_valid(mode: Mode) -> None:
    prop, cert = planted(mode)
    result = verdict(cert, prop)
    assert result.valid, result.failures
    assert result.failures == ()
    assert result.num_cases == 2
    assert result.num_leaves == sum(len(proof.weights) for proof in cert.cases)


def test_proof_for_a_residual_network_and_packed_files() -> None:
    data = conv_residual(seed=1)
    replay = Replay(data)
    prop = true_property(replay, 0.02, 0.05)
    cert = certificate(data, bisect(replay, prop.cases[0], 8))
    result = check(cert, gzip.compress(data), prop, gzip.compress(PROPERTY_FILE))
    assert result.valid, result.failures


@pytest.mark.parametrize("mode", Mode)
def test_false_property_never_closes(mode: Mode) -> None:
    """A property with a counterexample: neither search ends, and the old proof fails."""
    prop, cert = planted(mode)
    replay = Replay(DATA)
    search = bisect if mode is Mode.INPUT else divide_neurons
    false = falsified(prop)
    for case in false.cases:
        with pytest.raises(NotProvedError):
            search(replay, case, 8 if mode is Mode.INPUT else 3)
    result = verdict(cert, false)
    assert not result.valid
    assert "not closed" in result.failures[0]


def falsified(prop: Property) -> Property:
    """Offsets lowered until some sampled input is a counterexample."""
    rng, network = np.random.default_rng(0), Replay(DATA).network
    cases = []
    for case in prop.cases:
        x = case.lower + (case.upper - case.lower) * rng.random((4000, len(case.lower)))
        margin = (network.forward(x) @ case.rows.T + case.offsets).max(axis=1)
        moved = replace(case, offsets=case.offsets - margin.min() - 0.01)
        at = x[margin.argmin()]
        assert (network.forward(at[None])[0] @ case.rows.T + moved.offsets <= -0.005).all()
        cases.append(moved)
    return replace(prop, cases=tuple(cases))


# Mutations.


def with_case(cert: Certificate, number: int, proof: CaseProof) -> Certificate:
    cases = list(cert.cases)
    cases[number] = proof
    return replace(cert, cases=tuple(cases))


def changed(array: NDArray, place: object, value: object) -> NDArray:
    array = array.copy()
    array[place] = value
    return array


def damaged(cert: Certificate) -> Iterator[tuple[str, Certificate]]:
    """Every way of damaging the structure; none may pass, whatever it does to the bounds."""
    yield "network hash", replace(cert, network="0" * 64)
    yield "property hash", replace(cert, property=cert.property[::-1])
    yield "hash cut", replace(cert, network=cert.network[:-1])
    yield "case dropped", replace(cert, cases=cert.cases[:1])
    yield "case doubled", replace(cert, cases=(*cert.cases, cert.cases[0]))
    for number, p in enumerate(cert.cases):
        last = len(p.layer) - 1
        inner = np.flatnonzero(p.layer != LEAF)
        leaf = np.flatnonzero(p.layer == LEAF)
        changes: list[tuple[str, dict[str, object]]] = [
            ("tree cut", {n: getattr(p, n)[:-1] for n in ("layer", "index", "point")}),
            ("tree grown", {n: np.append(getattr(p, n), getattr(p, n)[-1:]) for n in TREE}),
            ("length", {"point": p.point[:-1]}),
            ("one weight row less", {"weights": p.weights[:-1]}),
            ("one weight row more", {"weights": np.vstack([p.weights, p.weights[:1]])}),
            ("weights of fewer rows", {"weights": p.weights[:, :1]}),
            ("weights of another type", {"weights": p.weights.astype(np.float32)}),
            ("weights of other axes", {"weights": p.weights.ravel()}),
            ("layer of another type", {"layer": p.layer.astype(np.int64)}),
            ("mode", {"mode": "input"}),
            ("negative multiplier", {"multipliers": np.full((len(leaf), 9), -1, np.float32)}),
            ("multipliers cut", {"multipliers": np.zeros((len(leaf) - 1, 9), np.float32)}),
            ("slopes of nobody", {"slopes": (np.zeros((len(leaf), 77), np.float32),) * 2}),
            ("too few slopes", {"slopes": (np.zeros((len(leaf), 0), np.float32),)}),
            ("layer slopes", {"layer_slopes": {"0.1": np.zeros((2, 10, 8), np.float32)}}),
            ("layer slopes", {"layer_slopes": {"1.0": np.zeros((2, 8, 9), np.float32)}}),
            ("layer slopes", {"layer_slopes": {"7.0": np.zeros((2, 8, 9), np.float32)}}),
        ]
        for i in range(last + 1):
            node = INPUT if p.layer[i] == LEAF else LEAF
            changes.append((f"kind of node {i}", {"layer": changed(p.layer, i, node)}))
            dropped = {name: np.delete(getattr(p, name), i) for name in TREE}
            changes.append((f"node {i} dropped", dropped))
            for bad in (np.nan, np.inf):
                changes.append((f"point {i}", {"point": changed(p.point, i, bad)}))
        for i in inner.tolist():
            for bad in (-1, 1000):
                changes.append((f"index {i}", {"index": changed(p.index, i, bad)}))
            for bad in (-3, 1000):
                changes.append((f"layer {i}", {"layer": changed(p.layer, i, bad)}))
            if p.mode is Mode.INPUT:
                changes.append((f"layer {i}", {"layer": changed(p.layer, i, 0)}))
                for bad in (1e3, -1e3):
                    changes.append((f"point {i}", {"point": changed(p.point, i, bad)}))
        for i in range(len(leaf)):
            for value in (0.0, -p.weights[i], 1.5 * p.weights[i] - 0.1, np.nan, np.inf):
                changes.append((f"weights {i}", {"weights": changed(p.weights, i, value)}))
        if p.mode is Mode.NEURON:
            longest = p.multipliers.shape[1] - 1
            more = changed(p.multipliers, (0, longest), 1e-9)
            changes.append(("multiplier without a split", {"multipliers": more}))
            paths = [leaves.splits.layer for leaves in walk(p, np.zeros(3), np.ones(3), 99)]
            for i in np.flatnonzero(paths[0][:, -1] == LEAF).tolist():
                more = changed(p.multipliers, (i, paths[0].shape[1] - 1), 1e-9)
                changes.append(("multiplier of a shorter path", {"multipliers": more}))
        for name, change in changes:
            yield f"case {number}: {name}", with_case(cert, number, replace(p, **change))


TREE = ("layer", "index", "point")


@pytest.mark.parametrize("mode", Mode)
def test_damage_is_always_rejected(mode: Mode) -> None:
    prop, cert = planted(mode)
    count = 0
    for name, mutant in damaged(cert):
        assert not verdict(mutant, prop).valid, name
        count += 1
    assert count > 100


def claims(proof: CaseProof, prop: Property, number: int) -> bool:
    """Whether samples agree with what each leaf of a proof by input says of its box."""
    case, network = prop.cases[number], Replay(DATA).network
    rng = np.random.default_rng(5)
    try:
        for leaves in walk(proof, case.lower, case.upper, 16):
            for i, leaf in enumerate(leaves.numbers):
                box = leaves.upper[i] - leaves.lower[i]
                x = leaves.lower[i] + box * rng.random((400, len(box)))
                y = network.forward(x) @ case.rows.T + case.offsets
                if (y @ proof.weights[leaf]).min() <= 0:
                    return False
    except DataError:
        return False
    return True


def altered(cert: Certificate) -> Iterator[tuple[str, int, CaseProof]]:
    """Changes after which a certificate has the right form but may say something false."""
    for number, p in enumerate(cert.cases):
        for i in np.flatnonzero(p.layer != LEAF).tolist():
            for shift in (-0.3, -0.05, 0.05, 0.3):
                point = changed(p.point, i, p.point[i] + shift)
                yield f"point {i}", number, replace(p, point=point)
            for other in range(3):
                yield f"index {i}", number, replace(p, index=changed(p.index, i, other))
        for i in range(len(p.weights)):
            moved = changed(p.weights, i, p.weights[i][::-1])
            yield f"weights {i}", number, replace(p, weights=moved)
        for i in np.flatnonzero((p.layer[:-1] != LEAF) & (p.layer[1:] == LEAF)).tolist():
            # An inner node and its first leaf go: its second child takes its place.
            tree = {name: np.delete(getattr(p, name), [i, i + 1]) for name in TREE}
            gone = int((p.layer[: i + 1] == LEAF).sum())
            yield f"merged {i}", number, replace(p, **tree, weights=np.delete(p.weights, gone, 0))


def test_false_claims_are_rejected_and_true_ones_are_not_needed() -> None:
    """Whatever a changed proof says that samples contradict, the checker rejects."""
    prop, cert = planted(Mode.INPUT)
    false = rejected = total = 0
    for name, number, proof in altered(cert):
        valid = verdict(with_case(cert, number, proof), prop).valid
        true = claims(proof, prop, number)
        assert true or not valid, name
        false += not true
        rejected += not valid
        total += 1
    assert false > 20
    assert rejected >= false
    assert rejected < total


@pytest.mark.parametrize("mode", Mode)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_certificate_proves_a_false_property(mode: Mode, data: st.DataObject) -> None:
    """Made-up trees, weights, slopes and multipliers on a property with a counterexample."""
    false = falsified_once(mode)
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    proofs = [made_up(rng, mode, case.lower, case.upper) for case in false.cases]
    assert not verdict(certificate(DATA, *proofs), false).valid


@cache
def falsified_once(mode: Mode) -> Property:
    return falsified(planted(mode)[0])


def made_up(
    rng: np.random.Generator, mode: Mode, lower: NDArray, upper: NDArray, depth: int = 5
) -> CaseProof:
    layer: list[int] = []
    index: list[int] = []
    point: list[float] = []

    def go(lower: NDArray, upper: NDArray, left: int) -> None:
        if left == 0 or rng.random() < 0.2:
            layer.append(LEAF)
            index.append(0)
            point.append(0.0)
            return
        k = INPUT if mode is Mode.INPUT else int(rng.integers(-1, 2))
        i = int(rng.integers(0, (3, 10, 8)[k + 1]))
        inside = float(lower[i] + (upper[i] - lower[i]) * rng.random()) if k == INPUT else 0.0
        layer.append(k)
        index.append(i)
        point.append(inside if k == INPUT else float(rng.normal()))
        below, above = upper.copy(), lower.copy()
        if k == INPUT:
            below[i] = above[i] = inside
        go(lower, below, left - 1)
        go(above, upper, left - 1)

    go(lower, upper, depth)
    num = layer.count(LEAF)
    hints: dict[str, object] = {}
    if mode is Mode.NEURON:
        hints = {
            "slopes": tuple(rng.uniform(-2, 3, (num, n)).astype(np.float32) for n in (10, 8)),
            "multipliers": np.zeros((num, depth), np.float32),
            "layer_slopes": {"1.0": rng.uniform(-2, 3, (2, 8, 10)).astype(np.float32)},
        }
    return CaseProof(
        mode=mode,
        layer=np.array(layer, np.int32),
        index=np.array(index, np.int32),
        point=np.array(point),
        weights=rng.random((num, 2)),
        **hints,
    )


def test_a_leaf_needs_its_own_hints() -> None:
    """With the slopes or multipliers of another leaf, or none, some leaf stays open."""
    prop, cert = planted(Mode.NEURON)
    proof = cert.cases[0]
    assert proof.multipliers.any()
    changes = [
        {"slopes": tuple(np.ones_like(slope) for slope in proof.slopes)},
        {"multipliers": proof.multipliers * np.float32(1e3)},
        {"multipliers": np.zeros((0, 0), np.float32)},
    ]
    for change in changes:
        result = verdict(with_case(cert, 0, replace(proof, **change)), prop)
        assert not result.valid
        assert "not closed" in result.failures[0]


def test_case_without_inequalities_is_never_proved() -> None:
    """No inequality means that every input is unsafe."""
    prop, cert = planted(Mode.INPUT)
    case = replace(prop.cases[0], rows=np.zeros((0, 3)), offsets=np.zeros(0))
    proof = replace(cert.cases[0], weights=np.zeros((len(cert.cases[0].weights), 0)))
    result = verdict(certificate(DATA, proof), replace(prop, cases=(case,)))
    assert not result.valid


def test_property_of_another_size_is_told() -> None:
    prop, cert = planted(Mode.INPUT)
    case = replace(prop.cases[0], lower=np.zeros(2), upper=np.ones(2))
    result = verdict(cert, replace(prop, cases=(case, prop.cases[1])))
    assert not result.valid
    assert "other inputs" in result.failures[0]


def test_many_open_leaves_are_counted() -> None:
    prop, cert = planted(Mode.INPUT)
    low = tuple(replace(case, offsets=case.offsets - 100) for case in prop.cases)
    result = verdict(cert, replace(prop, cases=low))
    assert len(result.failures) <= 21
    assert "more leaves" in result.failures[-1] or result.num_leaves <= 20

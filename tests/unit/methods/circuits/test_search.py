"""The whole way on the bundled language model: the induction circuit, found, checked, repeated."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import patchclamp
from patchclamp.core.circuit import Circuit, Edge, Node
from patchclamp.core.errors import DataError, OptionError
from patchclamp.data.behaviours.pairs import Pair, PromptSet
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.finding.search import (
    CircuitSearch,
    Found,
    again,
    contrasts_of,
    own_task,
    shipped_task,
)
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.net import Net

FRACTIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("tiny-lm")


@pytest.fixture(scope="module")
def found(net: Net) -> Found:
    task = shipped_task(net, "induction", num=16, num_held_out=16, variant="segment shuffled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = CircuitSearch(fractions=FRACTIONS, num_random=3, verify=24, level=0.9)
        return search.run(net, task)


def test_the_induction_circuit_is_found(found: Found) -> None:
    """A previous-token head of layer 0 informs the keys of induction heads in layer 1."""
    kept = set(found.circuit.edges())
    induction = [Edge(Node("attn.0.z", 3), Node("attn.1.z", h), "k") for h in (0, 3)]
    assert kept & set(induction)
    assert found.circuit.num_edges < 0.35 * found.circuit.num_possible
    for curve in (found.train, found.held_out):
        assert curve.num_falls <= 1
        for level in (0.8, 0.95, 0.99):
            assert curve.size_at(level) is not None
        point = curve.size_at(0.8)
        assert point is not None
        assert point.random_high < 0.5


def test_without_it_the_behaviour_is_gone(net: Net, found: Found) -> None:
    """On held-out rows: the complement does nothing, and every one of the largest parts counts."""
    assert found.parts.faithfulness > 0.85
    assert found.parts.complement < 0.15
    largest = list(found.parts.losses.values())[:5]
    assert min(largest) > 0.01
    task = shipped_task(net, "induction", num=16, num_held_out=16, variant="segment shuffled")
    held = contrasts_of(net, task.held_out)
    removed = found.wiring.possible & ~found.circuit.kept
    rows = metric_rows(found.wiring, held, [removed], References(kind=Ablation.RESAMPLE))
    assert float((rows > 0).float().mean()) < 0.5  # right answers no longer win


def test_first_order_is_shown_beside_exact(found: Found) -> None:
    assert len(found.effects.edges) == 24
    assert set(found.effects.edges) == set(found.circuit.top(24).edges())
    assert found.agreement > 0.5


def test_it_is_found_again_from_its_record(net: Net, found: Found) -> None:
    stored = Circuit.from_json(found.circuit.to_json())
    repeated = again(net, stored)
    assert repeated.same_edges == 1
    assert repeated.largest_change < 1e-5
    record = dataclasses.replace(stored.record, model_hash="0" * 64)
    with pytest.raises(DataError, match="another network"):
        again(net, dataclasses.replace(stored, record=record))


def test_a_behaviour_that_is_not_there_is_refused(net: Net) -> None:
    task = shipped_task(net, "induction", num=8, num_held_out=8)
    turned = [dataclasses.replace(p, correct=p.wrong, wrong=p.correct) for p in task.held_out]
    wrong = dataclasses.replace(task, held_out=tuple(turned))
    with pytest.raises(DataError, match="does not perform"):
        CircuitSearch().run(net, wrong)


def test_own_pairs_are_split(net: Net) -> None:
    pairs = PromptSet(
        name="mine",
        description="",
        source="test",
        pairs=tuple(Pair(f"a{i} b", f"c{i} d", ("x",), ("y",)) for i in range(8)),
    )
    task = own_task(net, pairs)
    assert task.sizes == (4, 4)
    texts = [t for half in (task.train, task.held_out) for p in half for t in p.texts]
    assert len(set(texts)) == 8
    few = dataclasses.replace(pairs, pairs=pairs.pairs[:3])
    with pytest.raises(DataError, match="at least four"):
        own_task(net, few)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="share"):
        CircuitSearch(level=1.5)
    with pytest.raises(OptionError, match="nearest 'both'"):
        EdgeAttribution(direction="boht")  # type: ignore[arg-type]  # the error is the point


def test_shuffled_metric_finds_nothing_that_holds(net: Net, found: Found) -> None:
    """Control: with right and wrong exchanged at random, no small circuit is faithful."""
    task = shipped_task(net, "induction", num=16, num_held_out=16, variant="segment shuffled")
    (pairs,) = task.train
    flip = torch.arange(16) % 2 == 0
    correct = torch.where(flip[:, None], pairs.correct, pairs.wrong)
    wrong = torch.where(flip[:, None], pairs.wrong, pairs.correct)
    mixed = contrasts_of(net, [dataclasses.replace(pairs, correct=correct, wrong=wrong)])
    held = References(kind=Ablation.RESAMPLE)
    masks = [np.zeros_like(found.circuit.kept), found.wiring.possible, found.circuit.kept]
    nothing, whole, circuit = metric_rows(found.wiring, mixed, masks, held).mean(1)
    scale = float(contrast_range(net, task))
    assert abs(float(whole - nothing)) < 0.35 * scale
    assert abs(float(circuit - nothing)) < 0.35 * scale


def contrast_range(net: Net, task: object) -> float:
    """What the metric covers between the whole and the empty network, with its true answers."""
    from patchclamp.methods.circuits.finding.search import Task
    from patchclamp.methods.circuits.network.wiring import wire

    assert isinstance(task, Task)
    wiring = wire(net)
    masks = [np.zeros_like(wiring.possible), wiring.possible]
    low, high = metric_rows(
        wiring, contrasts_of(net, task.train), masks, References(kind=Ablation.RESAMPLE)
    ).mean(1)
    return abs(float(high - low))

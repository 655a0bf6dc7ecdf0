"""No `unsat` where a counterexample was planted, on networks of every kind. Minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchclamp.methods.bounds.counterexample import confirm
from patchclamp.methods.bounds.verify import Answer, Verify
from patchclamp.methods.bounds.vnnlib import read_property
from patchclamp.truth.hidden_counterexamples import (
    Activation,
    Anatomy,
    Fault,
    FaultyVerifier,
    HiddenCounterexamples,
    Instance,
    Kind,
    Probe,
    write_network,
    write_property,
)

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")

STRONG = Probe(num_restarts=1000, num_steps=50)
ANATOMIES = {
    "relu": Anatomy(shape=(25,), widths=(128, 64), num_classes=3),
    "tanh": Anatomy(shape=(8,), widths=(64, 64), activation=Activation.TANH),
    "sigmoid": Anatomy(shape=(8,), widths=(64, 64), activation=Activation.SIGMOID),
    "conv": Anatomy(
        kind=Kind.CONV, shape=(1, 5, 5), channels=(8,), widths=(64,), activation=Activation.TANH
    ),
    "attention": Anatomy(kind=Kind.ATTENTION, shape=(1, 6, 4), channels=(16,), widths=(32,)),
}


def _found(instance: Instance) -> bool:
    labels, generator = torch.tensor([instance.label]), torch.Generator().manual_seed(1)
    margin = STRONG.run(instance.module, instance.x, labels, instance.eps, generator)[1]
    return float(margin) > 0


@pytest.mark.parametrize("name", ANATOMIES)
def test_ours_never_denies_a_planted_counterexample(name: str, tmp_path: Path) -> None:
    recipe = HiddenCounterexamples(anatomy=ANATOMIES[name], num_planted=2, num_clean=1)
    hidden = recipe.run()
    assert hidden.num_lost == 0
    network, path = tmp_path / "network.onnx", tmp_path / "property.vnnlib"
    write_network(hidden.planted[0], network)
    for instance in hidden.planted:
        assert instance.planted is not None
        write_property(instance, path)
        prop = read_property(path)
        found = confirm(network, prop, instance.planted.double().flatten().numpy())
        assert found.margin <= 0
        assert found.holds_in_runtime
        verdict = Verify(timeout=20).run(network, prop, path)
        print(name, verdict.answer, verdict.reason, "found by the strong attack:", _found(instance))
        assert verdict.answer is not Answer.UNSAT
    assert not _found(hidden.clean[0])


def test_most_are_hidden_from_a_thousand_restarts() -> None:
    hidden = HiddenCounterexamples(anatomy=ANATOMIES["relu"]).run()
    assert len(hidden.planted) == 4
    assert sum(map(_found, hidden.planted)) <= 1


def test_every_fault_is_noticed_and_no_replayed_one(tmp_path: Path) -> None:
    anatomy = Anatomy(shape=(5,), widths=(24, 24, 24))
    hidden = HiddenCounterexamples(
        anatomy=anatomy, num_planted=2, num_clean=1, num_rounds=1000, seed=1
    ).run()
    network, path = tmp_path / "network.onnx", tmp_path / "property.vnnlib"
    write_network(hidden.planted[0], network)
    caught = set()
    for instance in hidden.planted:
        write_property(instance, path)
        prop = read_property(path)
        caught |= {f for f in Fault if FaultyVerifier(fault=f).run(network, prop) == "unsat"}
        replayed = FaultyVerifier(fault=Fault.LOW_LINE, replayed=True)
        assert replayed.run(network, prop) is not Answer.UNSAT
    assert caught == set(Fault) - {Fault.NONE}

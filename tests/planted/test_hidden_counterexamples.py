"""Hidden counterexamples: what is planted is there; a sound verifier never denies it, others do.

hidden_counterexample.safetensors holds a network with one planted point and one clean input, so
that what attacks and faults do to it does not depend on the machine that trains. Made by
`HiddenCounterexamples(anatomy=Anatomy(shape=(5,), widths=(24, 24, 24)), num_planted=2,
num_clean=1, num_rounds=1000, seed=1)`, its second planted instance; torch 2.13.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patchclamp.core.errors import EngineError, OptionError
from patchclamp.methods.bounds.counterexample import confirm
from patchclamp.methods.bounds.verify import Answer, Verify
from patchclamp.methods.bounds.vnnlib import read_property
from patchclamp.truth.hidden_counterexamples import (
    Activation,
    Anatomy,
    Fault,
    FaultyVerifier,
    Hidden,
    HiddenCounterexamples,
    Instance,
    Kind,
    Probe,
    write_network,
    write_property,
)

onnxruntime = pytest.importorskip("onnxruntime")

KEPT = Path(__file__).parent / "hidden_counterexample.safetensors"
EPS = 0.2


@pytest.fixture(scope="module")
def kept() -> tuple[Instance, Instance]:
    """The planted instance and the clean one of the file."""
    held = load_file(KEPT)
    with torch.random.fork_rng(devices=[]):
        module = Anatomy(shape=(5,), widths=(24, 24, 24)).build()
    weights = {k.removeprefix("module."): v for k, v in held.items() if k.startswith("module.")}
    module.load_state_dict(weights)
    module.eval().requires_grad_(False)
    label, target, clean = held["classes"].tolist()
    planted = Instance(
        module=module, x=held["x"], eps=EPS, label=label, planted=held["planted"], target=target
    )
    return planted, Instance(module=module, x=held["clean"], eps=EPS, label=clean)


@pytest.fixture(scope="module")
def hidden() -> Hidden:
    return _recipe(num_rounds=150).run()


def _recipe(**options: object) -> HiddenCounterexamples:
    small: dict[str, object] = {
        "anatomy": Anatomy(shape=(6,), widths=(32, 32)),
        "num_planted": 2,
        "num_clean": 1,
        "window": 30,
    }
    return HiddenCounterexamples(**(small | options))  # type: ignore[arg-type]  # options of it


def _files(instance: Instance, folder: Path) -> tuple[Path, Path]:
    network, prop = folder / "network.onnx", folder / "property.vnnlib"
    write_network(instance, network)
    write_property(instance, prop)
    return network, prop


def test_the_planted_point_is_a_counterexample_in_the_files(
    kept: tuple[Instance, Instance], tmp_path: Path
) -> None:
    instance = kept[0]
    assert instance.planted is not None
    network, prop = _files(instance, tmp_path)
    found = confirm(network, read_property(prop), instance.planted.double().numpy())
    assert np.array_equal(found.x, instance.planted.double().flatten().numpy())
    assert found.margin <= 0
    assert found.holds_in_runtime
    assert found.y.argmax() == instance.target
    text = prop.read_text(encoding="utf-8")
    for sign, number, value in re.findall(r"\(([<>]=) X_(\d+) ([^\s)]+)\)", text):
        at = Fraction(float(instance.planted[0, int(number)]))
        assert at <= Fraction(value) if sign == "<=" else at >= Fraction(value)
    assert "e" not in "".join(re.findall(r"= X_\d+ ([^\s)]+)\)", text))


def test_our_verifier_finds_it_and_proves_the_clean_box(
    kept: tuple[Instance, Instance], tmp_path: Path
) -> None:
    for instance, answer in zip(kept, (Answer.SAT, Answer.UNSAT), strict=True):
        network, prop = _files(instance, tmp_path)
        verdict = Verify(timeout=60).run(network, read_property(prop), prop)
        assert verdict.answer is answer
        assert (verdict.certificate is not None) == (answer is Answer.UNSAT)


@pytest.mark.parametrize("fault", [Fault.LOW_LINE, Fault.SMALL_BOX, Fault.LOST_HALF])
def test_a_wrong_verifier_is_caught(
    kept: tuple[Instance, Instance], fault: Fault, tmp_path: Path
) -> None:
    network, prop = _files(kept[0], tmp_path)
    verifier = FaultyVerifier(fault=fault, timeout=60)
    assert verifier.run(network, read_property(prop)) is Answer.UNSAT


@pytest.mark.parametrize(
    "verifier",
    [
        FaultyVerifier(fault=Fault.NONE, timeout=0.5),
        FaultyVerifier(fault=Fault.LOW_LINE, replayed=True, timeout=0.5),
    ],
    ids=["no fault", "replayed"],
)
def test_without_a_fault_or_with_a_replay_nothing_is_claimed(
    kept: tuple[Instance, Instance], verifier: FaultyVerifier, tmp_path: Path
) -> None:
    network, prop = _files(kept[0], tmp_path)
    assert verifier.run(network, read_property(prop)) is Answer.TIMEOUT
    network, prop = _files(kept[1], tmp_path)
    assert verifier.run(network, read_property(prop)) is Answer.UNSAT


def test_training_plants_what_it_says(hidden: Hidden) -> None:
    assert len(hidden.planted) + len(hidden.clean) + hidden.num_lost == 3
    for instance in (*hidden.planted, *hidden.clean):
        assert float(instance.margin(instance.x)) < 0
    for instance in hidden.planted:
        assert instance.planted is not None
        assert instance.is_counterexample(instance.planted)
        assert int(hidden.module(instance.planted).argmax()) == instance.target != instance.label
        moved = (instance.planted - instance.x).abs() / instance.eps
        assert 0.97 < float(moved.max()) < 1
        assert int((moved > 0.11).sum()) == 1
        assert not instance.is_counterexample(instance.planted + 3 * instance.eps)
    for one in hidden.planted:
        for other in hidden.clean:
            assert float((one.x - other.x).abs().max()) > 2 * EPS


def test_the_same_seed_gives_the_same_network_and_leaves_the_random_state() -> None:
    quick = {"num_rounds": 60, "probe": Probe(num_restarts=2, num_steps=2)}
    recipe = _recipe(**quick)
    before = torch.get_rng_state()
    one, two = recipe.run().module, recipe.run().module
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    other = _recipe(**quick, seed=1).run().module
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_the_probe_finds_what_is_not_hidden_and_nothing_where_nothing_is() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]]))
        module[0].bias.copy_(torch.tensor([0.0, -0.9]))
    module.requires_grad_(False)
    x, labels, generator = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.Generator()
    for eps, margin in ((0.1, -0.3), (0.2, 0.3)):  # 6 eps - 0.9
        point, worst = Probe().run(module, x, labels, eps, generator)
        torch.testing.assert_close(worst, torch.full((2,), margin))
        torch.testing.assert_close(point, eps * torch.tensor([[-1.0, 1.0, -1.0]]).expand(2, 3))


ANATOMIES = {
    "dense": Anatomy(shape=(4,), widths=(5,), num_classes=3),
    "sigmoid": Anatomy(shape=(4,), widths=(5, 5), activation=Activation.SIGMOID),
    "conv": Anatomy(kind=Kind.CONV, shape=(2, 5, 5), channels=(3, 4), widths=(5,)),
    "attention": Anatomy(
        kind=Kind.ATTENTION,
        shape=(1, 4, 4),
        channels=(6,),
        widths=(5,),
        activation=Activation.TANH,
    ),
}


@pytest.mark.parametrize("name", ANATOMIES)
def test_files_say_what_the_instance_says(name: str, tmp_path: Path) -> None:
    anatomy = ANATOMIES[name]
    x = torch.rand(1, *anatomy.shape) * 10.0 ** torch.randint(-12, 3, (1, *anatomy.shape))
    instance = Instance(module=anatomy.build().requires_grad_(False), x=x, eps=1e-9, label=1)
    network, path = _files(instance, tmp_path)
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    there = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(there, instance.module(x))
    prop = read_property(path)
    for case in prop.cases:
        assert np.array_equal(case.lower, instance.lower.double().flatten().numpy())
        assert np.array_equal(case.upper, instance.upper.double().flatten().numpy())
    point, outputs = x.double().flatten().numpy(), torch.randn(8, anatomy.num_classes).double()
    for y in outputs:
        ahead = max(float(y[n] - y[1]) for n in range(anatomy.num_classes) if n != 1)
        assert (prop.margin(point, y.numpy()) <= 0) == (ahead >= 0)


def test_a_part_without_a_form_in_onnx_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Softplus())
    instance = Instance(module=module, x=torch.zeros(1, 2), eps=0.1, label=0)
    with pytest.raises(EngineError, match="Softplus"):
        write_network(instance, tmp_path / "network.onnx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": 0.0}, "eps=0"),
        ({"num_planted": 0}, "num_planted"),
        ({"eps": 1.1}, "without overlapping"),
        ({"anatomy": Anatomy(shape=(2, 2))}, r"\(features,\)"),
        ({"anatomy": Anatomy(kind=Kind.CONV, shape=(4,))}, "height"),
        ({"anatomy": Anatomy(num_classes=1)}, "classes at least 2"),
        ({"anatomy": Anatomy(kind=Kind.ATTENTION, shape=(1, 1, 4))}, "two rows"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        _recipe(**options).run()


def test_training_that_plants_nothing_says_so() -> None:
    with pytest.raises(EngineError, match="no planted point"):
        _recipe(num_rounds=1, num_planted=1).run()


def test_the_margin_is_that_of_the_best_other_class() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    instance = Instance(module=Fixed(), x=torch.tensor([[3.0, 1.0, 2.5]]), eps=0.1, label=0)
    assert float(instance.margin(instance.x)) == -0.5

"""What every method keeps: seeds, the network, batches, its docstring and plain data."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch

import patchclamp
from patchclamp.audit.intake import intake
from patchclamp.core.edit_kinds import edit_from_dict
from patchclamp.data import Dataset, Kind
from patchclamp.methods.material import Material, score_for, scores
from patchclamp.methods.neurons.ablation import Ablation, Group, ablations, unit_means
from patchclamp.methods.neurons.activity import Activity
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.methods.neurons.selectivity import Selectivity
from patchclamp.methods.trust.calibration import Calibration
from patchclamp.net import Net
from tests.networks import fresh
from tests.snapshots import snapshot

METHODS = (Activity, Selectivity, Redundancy, Ablation, Calibration)
SITE = {"digits_mlp": "layers.0.act", "digits_cnn": "blocks.1.act", "vit": "attn.0.z"}


def opened(name: str, num: int = 24) -> tuple[Net, Material]:
    module, example = fresh(name)
    generator = torch.Generator().manual_seed(0)
    data = Dataset(
        name="made",
        inputs=torch.rand(num, 1, 8, 8, generator=generator),
        labels=torch.arange(num) % 2,
        class_names=("a", "b"),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=Kind.IMAGES,
    )
    net = patchclamp.open(module, example)
    return net, intake(net, data, length=32)


def groups_of(net: Net, site: str) -> list[Group]:
    from patchclamp.audit.choose import num_units

    units = tuple(range(num_units(net.taps(site)[0])))
    pool = {site: units}
    return [
        Group(name="first", kind="unit group", members={site: units[:3]}, pool=pool),
        Group(name="last", kind="unit group", members={site: units[-5:]}, pool=pool),
    ]


def activity(net: Net, material: Material, seed: int, batch_size: int) -> object:
    found = Activity(batch_size=batch_size).run(net, material, net.taps(SITE[net_name(net)]))[0]
    return found.table, found.values, found.peak, found.group


def selectivity(net: Net, material: Material, seed: int, batch_size: int) -> object:
    found = Activity(batch_size=24).run(net, material, net.taps(SITE[net_name(net)]))[0]
    assert material.labels is not None
    result = Selectivity(shuffles=9, seed=seed).run(found.values, material.labels, found.group)
    return tuple(vars(result).values())


def redundancy(net: Net, material: Material, seed: int, batch_size: int) -> object:
    found = Activity(batch_size=24).run(net, material, net.taps(SITE[net_name(net)]))[0]
    return tuple(vars(Redundancy(limit=0.5, shuffles=5, seed=seed).run(found.values)).values())


def ablation(net: Net, material: Material, seed: int, batch_size: int) -> object:
    method = Ablation(num_nulls=5, min_nulls=5, batch_size=batch_size, seed=seed)
    result = method.run(
        net, material, score_for(net, material), groups_of(net, SITE[net_name(net)])
    )
    return tuple(
        (i.effect, i.interval.low, i.interval.high, i.null.mean, i.null.p, list(i.edits))
        for i in result.done
    )


def calibration(net: Net, material: Material, seed: int, batch_size: int) -> object:
    probabilities = net.run(material.call).output.softmax(1)
    result = Calibration(draws=50, seed=seed).run(probabilities, material.labels)
    return tuple(vars(result).values())


RUNS: dict[str, Callable[[Net, Material, int, int], object]] = {
    "activity": activity,
    "selectivity": selectivity,
    "redundancy": redundancy,
    "ablation": ablation,
    "calibration": calibration,
}


def net_name(net: Net) -> str:
    return {"DigitsMLP": "digits_mlp", "DigitsCNN": "digits_cnn", "SmallViT": "vit"}[
        type(net.module).__name__
    ]


def close(a: object, b: object, tolerance: float) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.allclose(a.double(), b.double(), atol=tolerance, rtol=tolerance)
    if isinstance(a, pl.DataFrame) and isinstance(b, pl.DataFrame):
        return all(close(a[c].to_list(), b[c].to_list(), tolerance) for c in a.columns)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(1.0, abs(a))
    return a == b


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("name", SITE)
def test_a_method_is_a_function_of_its_seed(name: str, method: str) -> None:
    net, material = opened(name)
    first = RUNS[method](net, material, 3, 24)
    torch.manual_seed(99)
    assert close(first, RUNS[method](net, material, 3, 24), 0.0)
    if method in ("selectivity", "ablation", "calibration"):
        assert not close(first, RUNS[method](net, material, 4, 24), 0.0)


@pytest.mark.parametrize("method", ["activity", "ablation"])
@pytest.mark.parametrize("name", SITE)
def test_batches_do_not_matter(name: str, method: str) -> None:
    net, material = opened(name)
    whole = RUNS[method](net, material, 3, 24)
    assert close(whole, RUNS[method](net, material, 3, 5), 2e-5)


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("name", SITE)
def test_a_method_leaves_network_data_and_random_state_as_found(name: str, method: str) -> None:
    net, material = opened(name)
    _ = net.sites  # the capture is made once, and is not the method's doing
    before, rows = snapshot(net.module), material.call.tensors()[0].clone()
    states = random.getstate(), np.random.get_state()[1].copy()
    RUNS[method](net, material, 3, 24)
    assert snapshot(net.module) == before
    assert torch.equal(material.call.tensors()[0], rows)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_a_method_is_its_options_and_says_what_it_does(cls: type) -> None:
    assert dataclasses.is_dataclass(cls)
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert all(f.kw_only for f in dataclasses.fields(cls))
    options = dataclasses.asdict(cls())
    assert cls(**json.loads(json.dumps(options))) == cls()
    doc = cls.__doc__ or ""
    for part in ("Shapes:", "Units:", "Randomness:", "Fails when:", "Source:"):
        assert part in doc, f"the docstring of {cls.__name__} lacks '{part}'"


@pytest.mark.parametrize("name", SITE)
def test_edits_in_records_make_the_same_effect_again(name: str) -> None:
    """The means are named, not listed: put back, the edits are whole."""
    net, material = opened(name)
    site = SITE[name]
    score = score_for(net, material)
    method = Ablation(num_nulls=2, min_nulls=2)
    for done in method.run(net, material, score, groups_of(net, site)).done:
        means = unit_means(net, material, [site], 24)
        whole = ablations(net, done.group.members, means)
        edits = []
        for data, edit in zip(done.edits, whole, strict=True):
            assert json.loads(json.dumps(data)) == data
            assert data["values"] == "mean over rows and positions of the data"
            edits.append(edit_from_dict({**data, "values": edit.values}))  # type: ignore[attr-defined]
        plain = scores(net, material, score)
        effect = float((scores(net, material, score, edits=edits) - plain).mean())
        assert effect == pytest.approx(done.effect, abs=1e-6)


def test_ablation_names_what_its_time_did_not_allow() -> None:
    net, material = opened("digits_mlp")
    groups = groups_of(net, "layers.0.act")
    result = Ablation().run(net, material, score_for(net, material), groups, seconds=0.0)
    assert result.done == []
    assert result.skipped == ["first", "last"]


def test_mean_ablation_of_a_layer_equals_a_hook_that_writes_the_mean() -> None:
    net, material = opened("digits_mlp")
    score = score_for(net, material)
    site = "layers.0.act"
    units = tuple(range(net.record(material.call, site).tensor(site).shape[1]))
    group = Group(name="layer", kind="layer", members={site: units}, pool={site: units})
    done = Ablation(num_nulls=2, min_nulls=2).run(net, material, score, [group]).done[0]
    layer = net.module.get_submodule(site)
    x, labels = material.call.tensors()[0], material.labels
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(net.module(x), labels)
        handle = layer.register_forward_hook(lambda m, a, out: out.mean(0).expand_as(out))
        try:
            edited = torch.nn.functional.cross_entropy(net.module(x), labels)
        finally:
            handle.remove()
    assert done.effect == pytest.approx(float(edited - plain), abs=1e-6)
    assert done.null.p is not None
    assert done.null.p > 0.05, "a layer that is its whole pool is no more than its random groups"

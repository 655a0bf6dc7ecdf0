"""Whatever is done with a network, it is left exactly as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp import edits as E
from patchclamp.core.errors import EditError
from patchclamp.net import Net
from tests.networks import SPECIMENS, InPlace, fresh, tiny_gpt2, tiny_llama
from tests.snapshots import snapshot


class BoomError(Exception):
    """Raised on purpose inside a run."""


def explode(part: torch.Tensor) -> torch.Tensor:
    raise BoomError


def last_float(net: Net) -> str:
    """A module's value that the output depends on, late in the network."""
    return [s.address for s in net.hooks.sites().values() if s.dtype == "float32"][-2]


def edited_block(net: Net, x: object) -> None:
    with net.edited(E.zero(last_float(net))), torch.no_grad():
        net.module(*net.call(x).args, **net.call(x).keywords)


def failing(run: Callable[[], object], error: type[BaseException]) -> None:
    with pytest.raises(error):
        run()


ACTIONS: dict[str, Callable[[Net, object], object]] = {
    "sites": lambda net, x: str(net.sites),
    "coverage": lambda net, x: str(net.coverage()),
    "hash": lambda net, x: net.hash,
    "run": lambda net, x: net.run(x),
    "run on the graph": lambda net, x: net.run(x, engine="graph"),
    "record everything": lambda net, x: net.record(x, list(net.hooks.sites())),
    "record everything on the graph": lambda net, x: net.record(
        x, list(net.graph.sites()), engine="graph"
    ),
    "stop early": lambda net, x: net.record(x, next(iter(net.hooks.sites()))),
    "edit": lambda net, x: net.run(
        x, edits=[E.noise(last_float(net), 1.0), E.resample(last_float(net))]
    ),
    "gradients": lambda net, x: net.gradients(x, last_float(net), 0),
    "gradients on the graph": lambda net, x: net.gradients(x, last_float(net), 0, engine="graph"),
    "edited block": edited_block,
    "callback that fails": lambda net, x: failing(
        lambda: net.run(x, edits=E.callback(last_float(net), explode)), BoomError
    ),
    "callback that fails on the graph": lambda net, x: failing(
        lambda: net.run(x, edits=E.callback(last_float(net), explode), engine="graph"), BoomError
    ),
    "edit that does not fit": lambda net, x: failing(
        lambda: net.run(x, edits=E.patch(last_float(net), torch.zeros(97))), EditError
    ),
    "failing target": lambda net, x: failing(
        lambda: net.gradients(x, last_float(net), lambda out: out[0]), patchclamp.PatchclampError
    ),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_left_as_found(name: str) -> None:
    module, inputs = fresh(name)
    kept = inputs.clone()
    before = snapshot(module)
    net = patchclamp.open(module, inputs)
    assert snapshot(module) == before, "by opening it"
    for action, act in ACTIONS.items():
        act(net, inputs)
        assert snapshot(module) == before, action
        assert torch.equal(inputs, kept), action


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_generation_leaves_a_language_model_as_found(make: Callable[[], nn.Module]) -> None:
    module = make()
    ids = torch.randint(3, 97, (2, 6))
    before = snapshot(module)
    config = module.config.to_dict()  # holds the kind of attention
    generation = module.generation_config.to_dict()
    net = patchclamp.open(module, {"input_ids": ids})
    _ = net.sites
    net.run(ids, record=["attn.0.pattern", "resid_post.*"])
    with net.edited(E.zero("mlp.0.out", position=2)):
        net.generate(ids, max_new_tokens=4)
    with contextlib.suppress(BoomError), net.edited(E.callback("mlp.0.out", explode)):
        net.generate(ids, max_new_tokens=4)
    assert snapshot(module) == before
    assert module.config.to_dict() == config
    assert module.generation_config.to_dict() == generation


@pytest.mark.parametrize("engine", ["hooks", "graph"])
def test_gradients_at_the_input_leave_the_users_tensor_as_found(engine: str) -> None:
    module, inputs = fresh("digits_cnn")
    net = patchclamp.open(module, inputs)
    got = net.gradients(inputs, ":input", 0, engine=engine)
    assert got.grads.tensor(":input").abs().sum() > 0
    assert not inputs.requires_grad
    assert inputs.grad is None


def test_hooks_of_the_user_stay_and_still_run() -> None:
    module, inputs = fresh("digits_mlp")
    seen = []
    module.head.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    before = snapshot(module)
    net = patchclamp.open(module, inputs)
    seen.clear()
    net.run(inputs, record="head")
    assert len(seen) == 1
    assert snapshot(module) == before


def test_frozen_parameters_mixed_modes_and_existing_gradients_are_kept() -> None:
    module, inputs = fresh("resnet")
    module.conv.weight.requires_grad_(False)
    module.stages[0].train()
    module.head.bias.grad = torch.ones_like(module.head.bias)
    before = snapshot(module)
    net = patchclamp.open(module, inputs)
    str(net.coverage())
    net.run(inputs, record="stages")
    module.stages[0].eval()
    net.gradients(inputs, "stages", 0)
    module.stages[0].train()
    assert module.head.bias.grad.eq(1).all()
    running = {n for n in before.weights if "stages.0" in n and ("running" in n or "num_b" in n)}
    after = snapshot(module)
    changed = {n for n in before.weights if before.weights[n] != after.weights[n]}
    assert changed <= running, "only what the module's own training mode updates when it is run"
    assert after._replace(weights=before.weights, attributes={}) == before._replace(attributes={})


def test_the_callers_grad_mode_is_kept() -> None:
    net = patchclamp.open(InPlace().eval(), torch.randn(3, 4))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            net.run(torch.randn(3, 4))
            net.gradients(torch.randn(3, 4), "first", 0)
            assert torch.is_grad_enabled() is enabled


def test_what_is_run_carries_no_gradient_history() -> None:
    net = patchclamp.open(InPlace().eval(), torch.randn(3, 4))
    for engine in ("hooks", "graph"):
        run = net.run(torch.randn(3, 4), record="first", engine=engine)
        assert not run.output.requires_grad
        assert not run.acts.tensor("first").requires_grad


def test_inference_tensors_and_inference_mode_work() -> None:
    module, inputs = fresh("digits_mlp")
    net = patchclamp.open(module, inputs)
    expected = net.run(inputs).output
    with torch.inference_mode():
        assert torch.equal(net.run(inputs.clone(), engine="graph").output, expected)
        assert torch.equal(net.run(inputs.clone()).output, expected)

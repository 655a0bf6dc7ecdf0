"""Integrated checks whose answer is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp import edits as E
from tests.networks import TwoLinear, opened, tiny_gpt2, tiny_llama

ENGINES = ("hooks", "graph")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_of_a_linear_network_is_its_weight(engine: str) -> None:
    module = TwoLinear().double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    net = patchclamp.open(module, x)
    w, v = module.a.weight.detach(), module.b.weight.detach()
    got = net.gradients(x, [":input", "a"], lambda out: out @ out.new_tensor([2.0, -1.0]))
    direction = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert torch.allclose(got.grads.tensor("a"), (direction @ v).expand(5, 4), atol=1e-14)
    assert torch.allclose(got.grads.tensor(":input"), (direction @ v @ w).expand(5, 3), atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_of_a_network_equals_finite_differences(engine: str) -> None:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    net = patchclamp.open(module, x)
    slope = net.gradients(x, "0", 1, engine=engine).grads.tensor("0")
    step = 1e-6
    for unit in range(6):
        direction = torch.zeros(6, dtype=torch.float64)
        direction[unit] = step
        up = net.run(x, edits=E.steer("0", direction), engine=engine).output[:, 1]
        down = net.run(x, edits=E.steer("0", direction, -1.0), engine=engine).output[:, 1]
        assert torch.allclose((up - down) / (2 * step), slope[:, unit], atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, None])
def test_the_whole_residual_stream_of_another_run_gives_its_logits(
    make: Callable[[], nn.Module] | None, engine: str
) -> None:
    ids = torch.randint(3, 97, (2, 9))
    if make is None:
        net = opened("tiny_lm")[0]
    else:
        net = patchclamp.open(make(), {"input_ids": ids})
    other = torch.randint(3, 97, (2, 9))
    run = net.run(other, record=["resid_pre.*", "resid_post.*"], engine=engine)
    plain = net.run(ids, engine=engine).output
    assert not torch.allclose(plain, run.output, atol=1e-3)
    for name in run.acts:
        got = net.run(ids, edits=E.patch(name, run.acts[name]), engine=engine).output
        if name == "resid_pre.0" or name.startswith("resid_post") or make is not tiny_gpt2:
            assert torch.equal(got, run.output), name


@pytest.mark.parametrize("engine", ENGINES)
def test_cutting_every_head_is_cutting_the_attention(engine: str) -> None:
    """Llama's output projection has no bias, so that no head at all is zero."""
    ids = torch.randint(3, 97, (2, 9))
    net = patchclamp.open(tiny_llama(), {"input_ids": ids})
    heads = net.run(ids, edits=[E.zero("attn.1.z", head=h) for h in range(4)], engine=engine)
    whole = net.run(ids, edits=E.zero("attn.1.out"), engine=engine)
    assert torch.equal(heads.output, whole.output)
    assert not torch.allclose(whole.output, net.run(ids).output, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_with_a_bias_cutting_every_head_leaves_the_bias(engine: str) -> None:
    ids = torch.randint(3, 97, (2, 9))
    module = tiny_gpt2()
    nn.init.normal_(module.transformer.h[1].attn.c_proj.bias)
    net = patchclamp.open(module, {"input_ids": ids})
    bias = module.transformer.h[1].attn.c_proj.bias.detach()
    heads = net.run(ids, edits=E.zero("attn.1.z"), engine=engine).output
    held = net.run(ids, edits=E.clamp("attn.1.out", bias), engine=engine).output
    zeroed = net.run(ids, edits=E.zero("attn.1.out"), engine=engine).output
    assert torch.allclose(heads, held, atol=1e-5)
    assert not torch.allclose(heads, zeroed, atol=1e-3)


def test_an_even_pattern_averages_the_values() -> None:
    net, ids = opened("tiny_lm")
    length = ids.shape[1]
    even = torch.full((1, 1, length, length), 1 / length)
    run = net.run(ids, edits=E.patch("attn.0.pattern", even), record=["attn.0.z", "attn.0.v"])
    mean = run.acts.tensor("attn.0.v").mean(1, keepdim=True)
    assert torch.allclose(run.acts.tensor("attn.0.z"), mean.expand(-1, length, -1, -1), atol=1e-6)


def test_scores_masked_by_hand_make_a_causal_model_blind() -> None:
    """With every key but the first at minus infinity, all positions attend to the first."""
    net, ids = opened("tiny_lm")
    edit = E.clamp("attn.0.scores", -torch.inf, key=slice(1, None))
    pattern = net.record(ids, "attn.0.pattern", edits=edit).tensor("attn.0.pattern")
    assert pattern[..., 0].eq(1).all()
    assert pattern[..., 1:].eq(0).all()

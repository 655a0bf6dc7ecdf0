"""Holding values and patterns while training: exact, without gradient, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.core.edit_kinds import clamp, patch, zero
from patchclamp.core.errors import EditError, EngineError, SiteError
from patchclamp.methods.circuits.training_clamp import (
    FromBatch,
    HeldPattern,
    TrainingClamp,
    induction_pattern,
    previous_token_pattern,
)
from patchclamp.net import Net
from patchclamp.specimens import build
from tests.networks import opened
from tests.snapshots import snapshot

HEAD_DIM = 4
TOKENS = torch.tensor([[1, 2, 3, 1, 2, 3], [5, 5, 0, 4, 4, 1]])


def small(num_kv_heads: int = 4) -> Net:
    torch.manual_seed(3)
    module = build(
        "tiny_lm",
        vocab=8,
        context=6,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        mlp_width=8,
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return patchclamp.open(module.eval(), TOKENS)


def loss_of(module: nn.Module) -> Tensor:
    logits = module(TOKENS)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def test_ideal_patterns_are_what_they_say() -> None:
    previous = previous_token_pattern(TOKENS)
    assert previous.argmax(-1).tolist() == [0, 0, 1, 2, 3, 4]
    assert (previous.sum(-1) == 1).all()
    match = induction_pattern(TOKENS)
    found = torch.where(match.sum(-1) > 0, match.argmax(-1), -1)
    assert found.tolist() == [[-1, -1, -1, 1, 2, 3], [-1, 1, -1, -1, 4, -1]]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("training", [False, True])
def test_a_held_pattern_equals_the_graph_engines_patch(num_kv_heads: int, training: bool) -> None:
    net = small(num_kv_heads)
    pattern = induction_pattern(TOKENS)
    values = pattern[:, None].expand(-1, 4, -1, -1)
    wanted = net.run(TOKENS, edits=[patch("attn.1.pattern", values, head=[0, 2])]).output
    plain = net.run(TOKENS).output
    net.module.train(training)
    held = HeldPattern(attention="blocks.1.attn", pattern=induction_pattern, heads=(0, 2))
    with TrainingClamp(patterns=[held]).on(net) as module:
        got = module(TOKENS)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(net.module(TOKENS), plain)


def test_no_gradient_flows_through_a_held_pattern() -> None:
    net = small()
    held = HeldPattern(attention="attn.0.pattern", pattern=previous_token_pattern, heads=(1,))
    with TrainingClamp(patterns=[held]).on(net) as module:
        loss_of(module).backward()
    rows = torch.zeros(16, dtype=torch.bool)
    rows[HEAD_DIM : 2 * HEAD_DIM] = True
    attention = net.module.get_submodule("blocks.0.attn")
    for name, dead in (("q_proj", True), ("k_proj", True), ("v_proj", False)):
        slope = attention.get_submodule(name).weight.grad.abs().amax(1)
        assert (slope[~rows] > 0).all(), name
        assert ((slope[rows] == 0) == dead).all(), name


def test_no_gradient_flows_through_held_values() -> None:
    net = small()
    values = [
        zero("attn.0.z", head=1),
        clamp("mlp.0.post", 0.5, unit=[2, 3]),
        FromBatch(
            site="mlp.1.out",
            where={"position": slice(0, 5)},
            function=lambda tokens: tokens[:, :5, None].float().expand(-1, -1, 16) / 10,
        ),
    ]
    with TrainingClamp(values=values).on(net) as module:
        loss_of(module).backward()
        seen = net.record(TOKENS, ["attn.0.z", "mlp.0.post", "mlp.1.out"])
    assert (seen["attn.0.z"].sel(head=slice(1, 2)).to_numpy()[:, :, 0] == 0).all()
    assert (seen.tensor("mlp.0.post")[..., 2:4] == 0.5).all()
    assert torch.equal(seen.tensor("mlp.1.out")[:, :5, 0], TOKENS[:, :5] / 10)
    v = net.module.get_submodule("blocks.0.attn.v_proj").weight.grad.abs().amax(1)
    assert (v[HEAD_DIM : 2 * HEAD_DIM] == 0).all()
    assert (v[2 * HEAD_DIM :] > 0).all()
    up = net.module.get_submodule("blocks.0.mlp.up").weight.grad.abs().amax(1)
    assert ((up == 0) == torch.tensor([i in (2, 3) for i in range(8)])).all()
    # nothing of layer 1's MLP is used: its last position's value does not enter the loss
    assert net.module.get_submodule("blocks.1.mlp.down").weight.grad.abs().max() == 0


def test_clamps_hold_over_many_steps_and_only_what_is_not_held_learns() -> None:
    net = small()
    before = {n: p.detach().clone() for n, p in net.module.named_parameters()}
    optimiser = torch.optim.SGD(net.module.parameters(), lr=0.2)
    held = HeldPattern(attention="blocks.0.attn", pattern=previous_token_pattern)
    losses = []
    with TrainingClamp(values=[zero("mlp.1.out")], patterns=[held]).on(net) as module:
        for _ in range(20):
            loss = loss_of(module)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    still = {n for n, p in net.module.named_parameters() if torch.equal(p, before[n])}
    assert losses[-1] < losses[0] - 0.3
    assert still == {
        *(f"blocks.0.attn.{p}_proj.{w}" for p in "qk" for w in ("weight", "bias")),
        *(f"blocks.1.mlp.{p}.{w}" for p in ("up", "down") for w in ("weight", "bias")),
        *(f"blocks.1.norm2.{w}" for w in ("weight", "bias")),
    }


@pytest.mark.parametrize("how", ["ends", "body raises", "forward raises"])
def test_the_module_is_left_as_found(how: str) -> None:
    net = small()
    net.module.train()
    before = snapshot(net.module)
    both = TrainingClamp(
        values=[zero("attn.1.z", head=0)],
        patterns=[HeldPattern(attention="blocks.0.attn", pattern=torch.eye(6))],
    )
    if how == "ends":
        with both.on(net) as module:
            assert module.training
            module(TOKENS)
    elif how == "body raises":
        with pytest.raises(KeyError), both.on(net):
            raise KeyError
    else:
        with pytest.raises(IndexError), both.on(net) as module:
            module(torch.full((1, 6), 99))
    assert snapshot(net.module) == before
    assert not torch.overrides._get_current_function_mode_stack()


def test_clamps_nest_on_one_module() -> None:
    net = small()
    first = HeldPattern(attention="blocks.0.attn", pattern=torch.eye(6), heads=(0,))
    second = HeldPattern(attention="blocks.0.attn", pattern=torch.eye(6), heads=(1,))
    with TrainingClamp(patterns=[first, second]).on(net) as module:
        wanted = module(TOKENS)
    outer, inner = TrainingClamp(patterns=[first]), TrainingClamp(patterns=[second])
    with outer.on(net), inner.on(net) as module:
        torch.testing.assert_close(module(TOKENS), wanted)


class Eager(nn.Module):
    """One attention layer that writes its pattern out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.attn = EagerAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.attn(self.embed(tokens))
        return logits


class EagerAttention(nn.Module):
    """Two heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        pattern = (q @ k.transpose(-2, -1)).softmax(-1)
        return (pattern @ v).transpose(1, 2).flatten(2)


def test_attention_that_is_written_out_is_held_too() -> None:
    net = patchclamp.open(Eager(), TOKENS)
    held = HeldPattern(attention="attn", pattern=torch.eye(6), heads=(1,))
    with TrainingClamp(patterns=[held]).on(net) as module:
        got = module(TOKENS)
    value = net.module.attn.qkv(net.module.embed(TOKENS))[..., 20:]
    torch.testing.assert_close(got[..., 4:], value)
    torch.testing.assert_close(got[..., :4], net.module(TOKENS)[..., :4])


def test_what_cannot_be_held_is_refused_by_name() -> None:
    net = small()

    def run(tokens: Tensor = TOKENS, on: Net = net, **clamps: object) -> None:
        with TrainingClamp(**clamps).on(on) as module:
            module(tokens)

    eye = torch.eye(6)
    with pytest.raises(SiteError, match=r"nearest 'blocks\.0\.attn'"):
        run(patterns=[HeldPattern(attention="blocks.0.atn", pattern=eye)])
    with pytest.raises(SiteError, match="no head 4"):
        run(patterns=[HeldPattern(attention="blocks.0.attn", pattern=eye, heads=(4,))])
    with pytest.raises(EditError, match="does not fit"):
        run(patterns=[HeldPattern(attention="blocks.0.attn", pattern=torch.eye(5))])
    with pytest.raises(EditError, match="finite"):
        run(patterns=[HeldPattern(attention="blocks.0.attn", pattern=eye * torch.nan)])
    with pytest.raises(EngineError, match="0 times"):
        run(patterns=[HeldPattern(attention="blocks.0.mlp", pattern=eye)])
    vit, images = opened("vit")
    with pytest.raises(EngineError, match="0 times"):
        run(images, vit, patterns=[HeldPattern(attention="blocks.0.attn", pattern=torch.eye(17))])
    with pytest.raises(EngineError, match="not a module's value"):
        run(values=[zero("attn.0.pattern")])
    with pytest.raises(EditError, match="TrainingClamp"):
        net.run(TOKENS, edits=[FromBatch(site="mlp.0.out", function=lambda tokens: 0.0)])

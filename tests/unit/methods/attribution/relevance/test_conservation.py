"""Nothing is lost on the way, however a network is written; what it ignores gets nothing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError, OptionError, TargetError
from patchclamp.methods.attribution.relevance import walk
from patchclamp.methods.attribution.relevance.deep_lift import DeepLift
from patchclamp.methods.attribution.relevance.guided import DeconvNet, GuidedBackprop
from patchclamp.methods.attribution.relevance.lrp import (
    LRP,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Patterns,
    WSquare,
    ZBox,
)
from patchclamp.net import Net
from tests.networks import opened
from tests.unit.methods.attribution.relevance.structures import STRUCTURES, fresh, made

WAYS = {
    "epsilon": LRP(),
    "gamma": LRP(dense=Gamma()),
    "alpha 2": LRP(dense=AlphaBeta(alpha=2.0)),
    "composite": LRP.epsilon_plus_flat(),
    "box": LRP.gamma_box(-4.0, 4.0),
    "w-square": LRP(first=WSquare(), spread_biases=True),
    "constant patterns": LRP(patterns=Patterns.CONSTANT),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_deep_lift_adds_up(name: str) -> None:
    module, net, x = made(name)
    baseline = torch.linspace(-0.5, 0.5, x.shape[1], dtype=torch.float64)
    with torch.no_grad():
        rise = (module(x) - module(baseline[None]))[:, 1]
    found = DeepLift(baseline=baseline).run(net, x, 1)
    assert float(rise.abs().min()) > 1e-4
    torch.testing.assert_close(found.values.sum(1), rise, rtol=1e-9, atol=0)
    assert found.error is not None
    assert float(found.error.max()) <= 1e-6


@pytest.mark.parametrize("name", STRUCTURES)
def test_lrp_adds_up(name: str) -> None:
    module, net, x = made(name)
    with torch.no_grad():
        score = module(x)[:, 1]
    for way, method in WAYS.items():
        if name == "softmax written out" and way == "box":
            continue  # the same as gamma there: one layer after the other is dense
        found = method.run(net, x, 1)
        assert found.bias is not None
        total = found.values.sum(1) + found.bias + found.absorbed
        torch.testing.assert_close(total, score, rtol=1e-6, atol=1e-10, msg=f"{name}, {way}")
        if way == "epsilon":
            assert found.error is not None
            assert float(found.error.max()) <= 1e-6
            assert float(found.bias.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["residual sum", "silu"])
def test_without_biases_no_relevance_falls_to_them(name: str) -> None:
    module, net, x = fresh(name)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    found = LRP().run(net, x, 1)
    assert found.bias is not None
    assert float(found.bias.abs().max()) < 1e-12
    torch.testing.assert_close(found.values.sum(1), found.scores, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_near_the_baseline_deep_lift_is_the_gradient(name: str) -> None:
    module, net, x = made(name)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf)[:, 2].sum(), leaf)
    step = 1e-6 * torch.ones_like(x)
    found = DeepLift(baseline=x - step).run(net, x, 2)
    torch.testing.assert_close(found.values / step, gradient, rtol=1e-4, atol=1e-5)


class Ignoring(nn.Module):
    """Reads the first four elements only, and a fifth times 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=x.dtype)
        h = torch.relu(self.first(x[:, :5] * mask))
        return self.last(h + torch.nn.functional.layer_norm(h, (8,)))


@cache
def ignoring() -> tuple[Net, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = Ignoring().eval(), torch.randn(3, 7)
    return patchclamp.open(module, x), x


@pytest.mark.parametrize(
    "method",
    [
        DeepLift(baseline=0.1),
        LRP(),
        LRP(dense=Gamma()),
        LRP(dense=AlphaBeta()),
        LRP(first=Flat()),
        GuidedBackprop(),
        DeconvNet(),
    ],
    ids=lambda m: m.name,
)
def test_what_is_ignored_gets_exactly_nothing(method: DeepLift) -> None:
    net, x = ignoring()
    found = method.run(net, x, 0)
    assert bool((found.values[:, 4:] == 0).all())
    assert bool((found.values[:, :4] != 0).any(0).all())


# ---- sites, examples, targets ------------------------------------------------


@pytest.mark.parametrize("at", ["resid_post.0", "attn.1.z", "attn.1.q", "attn.1.pattern"])
def test_hidden_sites_and_parts_of_values(at: str) -> None:
    """From a baseline of 0, DeepLift adds up to what setting the site to 0 changes."""
    net, x = opened("tiny_lm")
    lift = DeepLift().run(net, x, 5, at=at)
    value = net.record(x, at).tensor(at)
    assert lift.values.shape == value.shape
    edited = net.run(x, edits={"kind": "zero", "site": at})
    rise = net.run(x).output[:, -1, 5] - edited.output[:, -1, 5]
    torch.testing.assert_close(lift.values.flatten(1).sum(1).float(), rise, rtol=1e-3, atol=1e-5)
    relevance = LRP().run(net, x, 5, at=at)
    assert relevance.values.shape == value.shape
    assert float(relevance.error.max()) <= 1e-6


class Masked(nn.Module):
    """Attention under a mask that differs between examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        q, k, v = self.qkv(h).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(mask[:, None] == 0, -1e9)
        return self.last((h + scores.softmax(-1) @ v)[:, 0])


def test_examples_with_masks_of_their_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Masked().eval()
        ids = torch.randint(0, 20, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    net = patchclamp.open(module, (ids, mask))
    for method in (DeepLift(), LRP()):
        together = method.run(net, (ids, mask), 1, at="embed")
        assert bool((together.values[1, 3:] == 0).all())
        assert bool((together.values[0] != 0).any(1).all())
        alone = method.run(net, (ids[1:2], mask[1:2]), 1, at="embed")
        torch.testing.assert_close(together.values[1:2], alone.values)


@pytest.mark.parametrize("method", [DeepLift(), LRP(), GuidedBackprop()], ids=lambda m: m.name)
def test_examples_in_pieces(method: LRP, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_cnn")
    classes = torch.tensor([4, 0, 7])
    together = method.run(net, x, classes)
    monkeypatch.setattr(walk, "_MEMORY", 1)
    apart = method.run(net, x, classes)
    torch.testing.assert_close(together.values, apart.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        together.scores.float(), net.run(x).output.gather(1, classes[:, None])[:, 0]
    )


def test_a_difference_of_classes_is_the_difference_of_maps() -> None:
    net, x = opened("resnet")
    for method in (DeepLift(), LRP()):
        both = method.run(net, x, lambda y: y[:, 1] - y[:, 2]).values
        one, two = (method.run(net, x, c).values for c in (1, 2))
        torch.testing.assert_close(both, one - two, rtol=1e-8, atol=1e-12)


# ---- refusals ----------------------------------------------------------------


def test_a_target_that_bends_is_refused_by_deep_lift_and_kept_apart_by_lrp() -> None:
    net, x = opened("digits_mlp")

    def bent(y: Tensor) -> Tensor:
        return y.log_softmax(1)[:, 3]

    with pytest.raises(TargetError, match="linear"):
        DeepLift().run(net, x, bent)
    found = LRP().run(net, x, bent)
    assert found.bias is not None
    torch.testing.assert_close(found.values.flatten(1).sum(1) + found.bias, found.scores)


def test_operators_without_a_rule_are_named() -> None:
    net, x = opened("spiking")
    for method in (DeepLift(), LRP(), GuidedBackprop()):
        with pytest.raises(EngineError, match=r"SpikingNet cannot be walked over.*Spike"):
            method.run(net, x, 1)
    net, tokens = opened("tiny_lm")
    with pytest.raises(EngineError, match=r"has none behind 'embed'.*Gelu"):
        GuidedBackprop().run(net, tokens, 1)


class Reciprocals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1 / (2 + x.abs())).sum(1, keepdim=True) * 2


def test_lrp_refuses_functions_without_a_value_at_0() -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    net = patchclamp.open(Reciprocals().eval(), x)
    with pytest.raises(EngineError, match=r"Reciprocal.*no finite value at 0"):
        LRP().run(net, x, 0)
    assert float(DeepLift().run(net, x, 0).error.max()) < 1e-12


def test_selu_is_no_relu() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    net = patchclamp.open(nn.Sequential(nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 2)).eval(), x)
    with pytest.raises(EngineError, match="has none"):
        GuidedBackprop().run(net, x, 0)


def test_options_that_do_not_fit() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(OptionError, match="no layer is called 'nothing'"):
        LRP(rules={"nothing": Flat()}).run(net, x, 1)
    with pytest.raises(OptionError, match="inside its box"):
        LRP(first=ZBox(low=0.0, high=0.1)).run(net, x, 1)
    for wrong in (
        lambda: Epsilon(epsilon=-1.0),
        lambda: Gamma(gamma=-1.0),
        lambda: AlphaBeta(alpha=0.5),
        lambda: ZBox(low=0.5, high=1.0),
    ):
        with pytest.raises(OptionError):
            wrong()


def test_a_network_that_changed_since_its_capture_is_noticed() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    net = patchclamp.open(module, x)
    DeepLift().run(net, x, 0)
    handle = module[1].register_forward_hook(lambda m, args, y: y + 1)
    try:
        with pytest.raises(EngineError, match="do not give what it gives itself"):
            DeepLift().run(net, x, 0)
    finally:
        handle.remove()

"""Standard names on the common anatomies: what they resolve to, and what edits of them hit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import patchclamp
from patchclamp import edits as E
from patchclamp.core.errors import EngineError, SiteError
from patchclamp.net import Net
from tests.networks import fresh, tiny_bert, tiny_gpt2, tiny_llama

pytest.importorskip("transformers")
IDS = torch.arange(3, 17).reshape(2, 7)
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "tiny_lm": lambda: fresh("tiny_lm")[0],
}
ENGINES = ("hooks", "graph")


@cache
def net_of(family: str) -> Net:
    module = MAKERS[family]()
    return patchclamp.open(module, {"input_ids": IDS} if family != "tiny_lm" else IDS)


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1))


@pytest.mark.parametrize("family", MAKERS)
def test_every_standard_name_resolves_and_records(family: str) -> None:
    net = net_of(family)
    assert net.anatomy_family == family
    assert net.num_layers == 2
    per_layer = [f"attn.{{n}}.{r}" for r in ("q", "k", "v", "scores", "pattern", "z", "out")]
    per_layer += [f"mlp.{{n}}.{r}" for r in ("pre", "post", "out")]
    per_layer += ["resid_pre.{n}", "resid_mid.{n}", "resid_post.{n}"]
    names = [name.format(n=n) for n in range(net.num_layers) for name in per_layer]
    names += ["embed", *(["logits", "norm.final"] if family != "bert" else [])]
    acts = net.record(IDS, names)
    for name in names:
        tap = net.sites[name]
        assert acts.axes(name) == tap.axes, name
        sizes = {"batch": 2, "length": 7}
        expected = tuple(s if isinstance(s, int) else sizes[s] for s in tap.shape)
        assert tuple(acts.tensor(name).shape) == expected, name
    assert not [m for m in net.sites.missing if m in names]


@pytest.mark.parametrize("family", MAKERS)
def test_the_residual_stream_joins_up(family: str) -> None:
    net = net_of(family)
    acts = dict(net.record(IDS, ["resid_*.*", "attn.*.out", "mlp.*.out"]).tensors())
    for n in range(net.num_layers):
        if n:
            assert torch.equal(acts[f"resid_pre.{n}"], acts[f"resid_post.{n - 1}"])
        if family == "bert":  # post-norm: sums are inside
            continue
        middle = acts[f"resid_pre.{n}"] + acts[f"attn.{n}.out"]
        assert torch.allclose(acts[f"resid_mid.{n}"], middle, atol=1e-5)
        assert torch.allclose(acts[f"resid_post.{n}"], middle + acts[f"mlp.{n}.out"], atol=1e-5)


def test_key_heads_of_grouped_attention_have_an_axis_of_their_own() -> None:
    net = net_of("llama")
    acts = net.record(IDS, ["attn.1.q", "attn.1.k", "attn.1.v", "attn.1.z", "attn.1.pattern"])
    assert acts["attn.1.q"].sizes == {"batch": 2, "position": 7, "head": 4, "unit": 8}
    assert acts["attn.1.k"].sizes == {"batch": 2, "position": 7, "kv_head": 2, "unit": 8}
    assert acts["attn.1.v"].dims == ("batch", "position", "kv_head", "unit")
    assert acts["attn.1.z"].dims == ("batch", "position", "head", "unit")
    assert acts["attn.1.pattern"].sizes == {"batch": 2, "head": 4, "query": 7, "key": 7}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "tiny_lm"])
def test_the_pattern_is_causal_where_it_should_be_sums_to_one_and_makes_z(family: str) -> None:
    net = net_of(family)
    acts = net.record(IDS, ["attn.1.pattern", "attn.1.v", "attn.1.z", "attn.1.scores"])
    pattern = acts.tensor("attn.1.pattern")
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 7), atol=1e-5)
    above = pattern[..., torch.ones(7, 7).triu(1).bool()]
    assert above.eq(0).all() if family != "bert" else above.gt(0).all()
    assert torch.allclose(acts.tensor("attn.1.scores").softmax(-1), pattern, atol=1e-6)
    v = acts.tensor("attn.1.v")
    v = v.repeat_interleave(4 // v.shape[2], 2)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    assert torch.allclose(acts.tensor("attn.1.z"), z, atol=1e-5)


def test_the_pattern_is_that_of_the_librarys_eager_attention() -> None:
    for family in ("llama", "gpt2", "bert"):
        eager = MAKERS[family]()
        eager.set_attn_implementation("eager")
        eager.load_state_dict(net_of(family).module.state_dict())
        with torch.no_grad():
            expected = eager(input_ids=IDS, output_attentions=True).attentions
        acts = net_of(family).record(IDS, "attn.*.pattern")
        for n, pattern in enumerate(expected):
            assert torch.allclose(acts.tensor(f"attn.{n}.pattern"), pattern, atol=1e-6), family


def test_eager_attention_is_found_too() -> None:
    for family in ("llama", "gpt2"):
        module = MAKERS[family]()
        module.set_attn_implementation("eager")
        net = patchclamp.open(module, {"input_ids": IDS})
        names = ["attn.0.pattern", "attn.1.scores", "attn.1.q", "attn.1.z"]
        fused = net_of(family).record(IDS, names)
        got = net.record(IDS, names)
        for name in names:
            assert got.axes(name) == fused.axes(name), (family, name)
            a, b = got.tensor(name).clamp(min=-1e3), fused.tensor(name).clamp(min=-1e3)
            assert torch.allclose(a, b, atol=1e-5), (family, name)


def test_a_fused_projection_is_cut_in_three() -> None:
    net = net_of("gpt2")
    acts = net.record(IDS, ["attn.0.q", "attn.0.k", "attn.0.v", "transformer.h.0.attn.c_attn"])
    whole = acts.tensor("transformer.h.0.attn.c_attn")
    for name, third in zip("qkv", whole.split(32, -1), strict=True):
        assert torch.equal(acts.tensor(f"attn.0.{name}"), split(third, 4)), name
    hidden = net.record(IDS, "transformer.h.0.ln_1").tensor("transformer.h.0.ln_1")
    conv = net.module.transformer.h[0].attn.c_attn
    q = (hidden @ conv.weight[:, :32] + conv.bias[:32]).detach()
    assert torch.allclose(acts.tensor("attn.0.q"), split(q, 4), atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("family", "role"), [("gpt2", "k"), ("gpt2", "v"), ("llama", "k")])
def test_a_head_edit_hits_its_slice_and_nothing_else(family: str, role: str, engine: str) -> None:
    net = net_of(family)
    name = f"attn.0.{role}"
    raw = net.sites[name].site.address
    before = net.record(IDS, raw, engine=engine).tensor(raw)
    axis = net.sites[name].axes[2]
    edit = E.zero(name, **{axis: 1, "position": 3})
    after = net.record(IDS, raw, edits=edit, engine=engine).tensor(raw)
    start = {"q": 0, "k": 32, "v": 64}[role] if family == "gpt2" else 0
    expected = before.clone()
    expected[:, 3, start + 8 : start + 16] = 0
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_through_two_names_of_one_value_apply_in_order(engine: str) -> None:
    net, raw = net_of("gpt2"), "transformer.h.0.attn.c_attn"
    both = [E.clamp(raw, 1.0), E.scale("attn.0.k", 3.0), E.steer(raw, torch.ones(96))]
    got = net.record(IDS, [raw, "attn.0.k"], edits=both, engine=engine)
    expected = torch.full((2, 7, 96), 2.0)
    expected[..., 32:64] = 4.0
    assert torch.equal(got.tensor(raw), expected)
    assert got.tensor("attn.0.k").eq(4).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "tiny_lm"])
def test_cutting_a_head_is_the_same_at_z_and_at_the_pattern(family: str) -> None:
    net = net_of(family)
    at_z = net.run(IDS, edits=E.zero("attn.0.z", head=2), engine="hooks").output
    at_pattern = net.run(IDS, edits=E.zero("attn.0.pattern", head=2)).output
    assert torch.allclose(at_z, at_pattern, atol=1e-5)
    assert not torch.allclose(at_z, net.run(IDS).output, atol=1e-3)


def test_the_pattern_cannot_be_edited_on_hooks_or_while_generating() -> None:
    net = net_of("llama")
    with pytest.raises(EngineError, match=r"cannot reach.*hint: use engine='graph'"):
        net.run(IDS, edits=E.zero("attn.0.pattern"), engine="hooks")
    with (
        pytest.raises(EngineError, match=r"cannot be edited while generating.*hint:"),
        net.edited(E.zero("attn.0.pattern")),
    ):
        pytest.fail("the block is not entered")


def test_an_alias_of_a_layer_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(SiteError) as caught:
        net_of("llama").record(IDS, "resid_post.9")
    assert caught.value.nearest is not None
    assert caught.value.nearest.startswith("resid_post.")


def test_a_mask_makes_a_second_capture_that_is_checked_on_its_own() -> None:
    net = net_of("llama")
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    call = {"input_ids": IDS, "attention_mask": mask}
    with torch.no_grad():
        expected = net.module(**call).logits
    for engine in ENGINES:
        got = net.run(call, engine=engine).output
        assert torch.allclose(got[0, :5], expected[0, :5], atol=1e-5)
        assert torch.allclose(got[1], expected[1], atol=1e-5)
    pattern = net.record(call, "attn.0.pattern").tensor("attn.0.pattern")
    assert pattern[0, :, :5, 5:].eq(0).all()
    assert pattern[1].sum(-1).allclose(torch.ones(4, 7))

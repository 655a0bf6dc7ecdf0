"""The traps that capturing a network meets, one test each; see capture.py and hooks.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp
from patchclamp import edits as E
from patchclamp.core.errors import CaptureError, EngineError
from patchclamp.net import Net
from tests import networks as N

ENGINES = ("hooks", "graph")


def net_of(
    make: Callable[[], nn.Module], *shape: int, training: bool = False
) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(3)
    module, inputs = make().train(training), torch.randn(*(shape or (5, 4)))
    return patchclamp.open(module, inputs), inputs


def same_gradients(net: Net, inputs: torch.Tensor, sites: list[str]) -> dict[str, np.ndarray]:
    """Gradients of output 0 from both engines, which must agree; returns the hooks'."""
    made = {e: net.gradients(inputs, sites, 0, engine=e) for e in ENGINES}
    for site in sites:
        a, b = (made[e].grads.tensor(site) for e in ENGINES)
        assert a.abs().sum() > 0, f"a gradient of zero at {site} compares nothing"
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), site
    return {site: made["hooks"].grads[site].values for site in sites}


# ---- in-place operations ----------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_in_place_operation_does_not_change_what_was_recorded(engine: str) -> None:
    net, x = net_of(N.InPlace)
    acts = net.record(x, ["first", "act", "second", "act:input"], engine=engine)
    module = net.module
    with torch.no_grad():
        first = module.first(x)
        second = module.second(first.relu())
    assert (first < 0).any()
    assert (second < 0).any()
    assert torch.equal(acts.tensor("first"), first)
    assert torch.equal(acts.tensor("act:input"), first)
    assert torch.equal(acts.tensor("act"), first.relu())
    assert torch.equal(acts.tensor("second"), second)


@pytest.mark.parametrize("make", [N.InPlace, N.ViewWrite])
def test_gradients_are_equal_with_in_place_operations(make: Callable[[], nn.Module]) -> None:
    net, x = net_of(make)
    same_gradients(net, x, ["first", "second"])


def test_writes_through_views_are_made_functional() -> None:
    net, x = net_of(N.ViewWrite)
    assert net.graph.capture.functionalised == "retraced"
    assert torch.equal(net.run(x, engine="graph").output, net.module(x))
    first = net.record(x, "first", engine="graph").tensor("first")
    assert torch.equal(first, net.module.first(x)), "recorded before the write"


def test_simple_in_place_operations_are_rewritten_where_they_stand() -> None:
    net, x = net_of(N.InPlace)
    assert net.graph.capture.functionalised == "rewritten"
    assert torch.equal(net.run(x, engine="graph").output, net.module(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_in_place_operation_does_not_write_into_a_patched_array(engine: str) -> None:
    net, x = net_of(N.InPlace)
    mine = -np.ones((5, 6), dtype=np.float32)
    out = net.run(x, edits=E.patch("first", mine), engine=engine).output
    assert (mine == -1).all()
    assert torch.allclose(out, net.run(x, edits=E.clamp("act", 0.0), engine=engine).output)


# ---- gradients --------------------------------------------------------------


def test_a_custom_backward_is_kept_in_the_graph() -> None:
    original = vars(torch.autograd.Function).get("apply")
    net, x = net_of(N.Surrogate)
    grads = same_gradients(net, x, ["first"])
    plain = net.module.second.weight[0].detach()
    assert np.allclose(grads["first"], 7.0 * plain.numpy(), atol=1e-6), "the surrogate's, times 7"
    assert vars(torch.autograd.Function).get("apply") is original, "the patch came off"


def test_the_surrogate_gradient_of_a_spiking_net() -> None:
    net, x = N.opened("spiking")
    same_gradients(net, x, ["linear1@0", "linear1@2", "lif1@1[0]"])


def test_a_no_grad_block_blocks_in_both_engines() -> None:
    net, x = net_of(N.Blocked)
    grads = same_gradients(net, x, ["first"])
    with torch.no_grad():
        y = net.module.first(x)
        gate = torch.sigmoid(y.sum(1, keepdim=True))
        blocked = gate * net.module.second.weight[0]
    assert np.allclose(grads["first"], blocked, atol=1e-6)


# ---- what tracing would freeze ----------------------------------------------


def test_one_tensor_given_twice_is_two_inputs() -> None:
    torch.manual_seed(3)
    module, x, y = N.Difference().eval(), torch.randn(5, 4), torch.randn(5, 4)
    net = patchclamp.open(module, (x, x))
    got = net.run((x, y), engine="graph").output
    assert torch.equal(got, module(x, y))
    assert not torch.allclose(got, module(x, x))


@pytest.mark.parametrize("make", [N.Counting, N.Remembering, N.RunningBuffer, N.ReplacedBuffer])
def test_state_between_calls_is_caught_and_hooks_still_work(make: Callable[[], nn.Module]) -> None:
    net, x = net_of(make)
    with pytest.raises(CaptureError):
        _ = net.graph
    report = str(net.coverage())
    assert "graph engine: not available" in report
    assert any(word in report for word in ("state", "changes", "differs")), report
    assert "lin" in net.sites
    lin = net.record(x, "lin", engine="auto").tensor("lin")
    assert lin.shape == (5, 3)
    with pytest.raises(CaptureError):
        net.run(x, engine="graph")


@pytest.mark.parametrize("make", [N.Counting, N.Random])
def test_two_calls_that_differ_are_told_as_such(make: Callable[[], nn.Module]) -> None:
    net, _ = net_of(make)
    assert "two calls on the same inputs give different outputs" in str(net.coverage())


@pytest.mark.parametrize("make", [N.Counting, N.Remembering, N.RunningBuffer, N.ReplacedBuffer])
def test_opening_does_not_advance_the_state_of_a_network(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    module, x = make().eval(), torch.randn(5, 4)
    before = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    buffers = dict(module.named_buffers())
    net = patchclamp.open(module, x)
    net.coverage()
    assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == before
    for name, b in module.named_buffers():
        assert b is buffers[name]
        assert b.eq(0).all()


def test_a_way_that_depends_on_the_data_does_not_export_and_the_report_says_why() -> None:
    net, x = net_of(N.DataDependent)
    report = net.coverage()
    assert report.error is not None
    assert "torch.export does not follow DataDependent" in str(report)
    assert "data-dependent" in str(report).lower() or "GuardOnDataDependent" in str(report)
    assert net.run(x).output.equal(net.module(x))
    assert not report.graph
    assert {s.address for s in report.hooks} >= {"lin", ":output"}


def test_training_mode_runs_on_hooks_only() -> None:
    net, x = net_of(N.Dropping, training=True)
    with pytest.raises(CaptureError, match=r"training mode.*hint: call module.eval\(\)"):
        _ = net.graph
    assert net.record(x, "first").tensor("first").shape == (5, 6)
    assert net.module.training


def test_a_network_that_is_put_in_training_mode_later_is_not_served_by_the_graph() -> None:
    net, x = net_of(N.Dropping)
    _ = net.graph
    net.module.train()
    with pytest.raises(EngineError, match="now in training mode"):
        net.run(x, engine="graph")


def test_training_mode_batch_norm_keeps_its_statistics_on_opening() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).train()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    patchclamp.open(module, torch.randn(4, 1, 6, 6)).coverage()
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_dropout_and_casts_to_the_same_type_leave_no_trace() -> None:
    net, x = net_of(N.Dropping)
    operations = {n.operation for n in net.graph.capture.graph.nodes}
    assert not operations & {"dropout", "to", "contiguous", "clone", "_assert_tensor_metadata"}
    assert torch.equal(net.run(x, engine="graph").output, net.module(x))
    assert "drop" in net.graph.sites(), "the module's own value is still there"


# ---- structure --------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_of_a_module_used_several_times_are_told_apart(engine: str) -> None:
    net, x = net_of(N.Reused, 5, 4)
    acts = net.record(x, ["lin@0", "lin@1", "lin@2"], engine=engine)
    expected = x
    for k in range(3):
        with torch.no_grad():
            expected = net.module.lin(expected)
        assert torch.allclose(acts.tensor(f"lin@{k}"), expected, atol=1e-6)
        expected = torch.tanh(expected)
    edited = net.run(x, edits=E.zero("lin@1"), record=["lin@0", "lin@2"], engine=engine).acts
    assert torch.equal(edited.tensor("lin@0"), acts.tensor("lin@0"))
    assert torch.allclose(edited.tensor("lin@2"), net.module.lin.bias.detach().expand(5, 4))


def test_calls_are_counted_afresh_in_every_forward_pass_within_edited() -> None:
    net, x = net_of(N.Reused, 5, 4)
    once = net.run(x, edits=E.zero("lin@2")).output
    with net.edited(E.zero("lin@2")), torch.no_grad():
        assert torch.equal(net.module(x), once)
        assert torch.equal(net.module(x), once)


@pytest.mark.parametrize("engine", ENGINES)
def test_leaves_of_a_structured_output_have_numbers(engine: str) -> None:
    net, x = N.opened("lstm")
    acts = net.record(x, ["lstm[0]", "lstm[1]", "lstm[2]"], engine=engine)
    with torch.no_grad():
        states, (h, c) = net.module.lstm(net.module.embed(x))
    assert torch.allclose(acts.tensor("lstm[0]"), states, atol=1e-6)
    assert torch.allclose(acts.tensor("lstm[1]"), h, atol=1e-6)
    assert torch.allclose(acts.tensor("lstm[2]"), c, atol=1e-6)
    out = net.run(x, edits=E.zero("lstm[0]"), engine=engine).output
    assert torch.allclose(out, net.module.head.bias.detach().expand_as(out))


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_called_with_keyword_arguments(engine: str) -> None:
    net, x = net_of(N.Keyword)
    acts = net.record(x, ["mix", "mix:input", "mix.lin"], engine=engine)
    assert torch.equal(acts.tensor("mix:input"), x)
    with torch.no_grad():
        assert torch.allclose(acts.tensor("mix"), net.module.mix.lin(x) + 6 * x, atol=1e-6)
        out = net.run(x, edits=E.zero("mix:input"), engine=engine).output
        assert torch.allclose(out, net.module.head(net.module.mix.lin.bias + 6 * x), atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_dictionary_outputs(engine: str) -> None:
    net, x = net_of(N.DictOutput)
    run = net.run(x, record=["parts[0]", "parts[1]"], engine=engine)
    with torch.no_grad():
        assert torch.equal(run.output, net.module(x)["logits"])
        up, down = run.acts.tensor("parts[0]"), run.acts.tensor("parts[1]")
        assert {torch.equal(up, -x), torch.equal(down, -x)} == {True, False}
        edited = net.run(x, edits=E.zero("parts[0]"), engine=engine).output
    assert not torch.allclose(edited, run.output)
    assert torch.allclose(edited, net.module.head(down), atol=1e-6)


def test_dataclass_outputs_run_on_hooks_and_the_report_says_why_not_the_graph() -> None:
    net, x = net_of(N.DataclassOutput)
    run = net.run(x, record="first", edits=E.zero("first"))
    with torch.no_grad():
        assert torch.allclose(run.output, net.module.head.bias.expand(5, 2))
    assert "torch.export does not follow DataclassOutput" in str(net.coverage())


@pytest.mark.parametrize("engine", ENGINES)
def test_one_tensor_given_to_a_module_as_several_arguments_is_one_input(engine: str) -> None:
    net, x = N.opened("vit")
    y = torch.randn(3, 17, 32)
    edit = E.patch("blocks.0.attn:input", y)
    out = net.run(x, edits=edit, record="blocks.0.attn", engine=engine)
    with torch.no_grad():
        expected = net.module.blocks[0].attn(y, y, y, need_weights=False)[0]
    assert torch.allclose(out.acts.tensor("blocks.0.attn"), expected, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_length_before_batch(engine: str) -> None:
    torch.manual_seed(3)
    module, x = N.LengthFirst().eval(), torch.randn(6, 3, 4)
    net = patchclamp.open(module, x, axes=[("length", "batch", 4)])
    assert net.sites["lin"].axes == ("position", "batch", "unit")
    assert net.sites["lin"].shape == ("length", "batch", 5)
    with torch.no_grad():
        longer = torch.randn(9, 5, 4)
        assert torch.equal(net.run(longer, engine=engine).output, module(longer))
        got = net.record(x, "lin", edits=E.zero("lin", example=1), engine=engine).tensor("lin")
        assert got[:, 1].eq(0).all()
        assert got[:, [0, 2]].ne(0).any()
        parts = net.record(longer, "lin", batch_size=2, engine=engine).tensor("lin")
        assert torch.allclose(parts, module.lin(longer), atol=1e-6)


# ---- attention --------------------------------------------------------------


ROLES = ("q", "k", "v", "scores", "pattern", "z")
NATURAL = ("batch", "head", "position", "unit")


def reference_attention(module: N.Attend, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries, keys, values, pattern and weighted values by plain softmax attention."""
    heads, kv = module.num_heads, module.num_kv
    q = module.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = module.k(x).unflatten(-1, (kv, -1)).transpose(1, 2)
    v = module.v(x).unflatten(-1, (kv, -1)).transpose(1, 2)
    ks, vs = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, ks) / q.shape[-1] ** 0.5
    length = x.shape[1]
    if module.how == "causal":
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    if module.how == "masked":
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        scores = scores - 0.5 * distance.abs()
    pattern = torch.softmax(scores, -1)
    return {"q": q, "k": k, "v": v, "scores": scores, "pattern": pattern, "z": pattern @ vs}


@pytest.mark.parametrize(
    "how", ["fused", "causal", "masked", "grouped", "eager", "permuted", "einsum"]
)
def test_attention_found_by_structure_equals_softmax_attention(how: str) -> None:
    net, x = net_of(lambda: N.Attend(how), 2, 5, 16)
    run = net.run(x, record=[f"attn.0.{role}" for role in ROLES])
    with torch.no_grad():
        expected = reference_attention(net.module, x)
        assert torch.allclose(run.output, net.module(x), atol=1e-6)
    for role, value in expected.items():
        axes = ("batch", "head", "query", "key") if role in ("scores", "pattern") else NATURAL
        if how == "grouped" and role in ("k", "v"):
            axes = ("batch", "kv_head", "position", "unit")
        got = run.acts[f"attn.0.{role}"]
        assert set(got.dims) == set(axes), role
        assert np.allclose(got.transpose(*axes).values, value, atol=1e-6), role


@pytest.mark.parametrize("how", ["causal", "grouped", "eager"])
def test_an_edited_pattern_moves_the_output(how: str) -> None:
    """Attending only to the first position makes z the first value everywhere."""
    net, x = net_of(lambda: N.Attend(how), 2, 5, 16)
    first = torch.zeros(5)
    first[0] = 1.0
    edit = E.patch("attn.0.pattern", first.expand(1, 4, 5, 5))
    z = net.run(x, edits=edit, record="attn.0.z").acts.tensor("attn.0.z")
    with torch.no_grad():
        v = reference_attention(net.module, x)["v"]
    v = v.repeat_interleave(4 // v.shape[1], 1)
    assert torch.allclose(z, v[:, :, :1].expand_as(z), atol=1e-6)


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_own_multihead_attention(need_weights: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.attn(x, x, x, need_weights=need_weights)[0]
            return made

    net, x = net_of(Own, 3, 5, 16)
    with torch.no_grad():
        _, weights = net.module.attn(x, x, x, need_weights=True, average_attn_weights=False)
    run = net.run(x, record=["attn.0.pattern", "attn.0.v"])
    assert torch.allclose(run.acts.tensor("attn.0.pattern"), weights, atol=1e-6)
    assert run.acts.axes("attn.0.pattern") == ("batch", "head", "query", "key")
    with torch.no_grad():
        w, b = net.module.attn.in_proj_weight[32:], net.module.attn.in_proj_bias[32:]
        v = (x @ w.T + b).unflatten(-1, (4, 4)).transpose(1, 2)
    assert torch.allclose(run.acts.tensor("attn.0.v"), v, atol=1e-6)
    cut = net.run(x, edits=E.zero("attn.0.z", head=[0, 1, 2, 3])).output
    assert torch.allclose(cut, net.module.attn.out_proj.bias.detach().expand_as(cut), atol=1e-6)


# ---- memory -----------------------------------------------------------------


def test_writing_into_a_recorded_value_changes_neither_weights_nor_inputs() -> None:
    net, x = N.opened("vit")
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    kept = x.clone()
    everything = [s.address for s in net.graph.sites().values()]
    acts = net.record(x, everything, engine="graph")
    for name in everything:
        values = acts[name].values
        if values.flags.writeable and values.dtype == np.float32:
            np.multiply(values, 0.0, out=values)
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())
    assert torch.equal(x, kept)

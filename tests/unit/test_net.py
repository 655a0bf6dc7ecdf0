"""What users call: run, record, gradients, edited, generate; early stop; bad input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import patchclamp
from patchclamp import edits as E
from patchclamp.core import errors
from patchclamp.net import Net
from tests.networks import InPlace, TwoLinear, fresh, opened, tiny_gpt2, tiny_llama

ENGINES = ("hooks", "graph")


@pytest.fixture(scope="module")
def linear() -> Net:
    torch.manual_seed(5)
    return patchclamp.open(TwoLinear().double().eval(), torch.zeros(2, 3, dtype=torch.float64))


def x64(rows: int = 4) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * 3, dtype=torch.float64).reshape(rows, 3)


def parts(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The hidden value by hand, and the rest of the network as a function of it."""
    w, b = (p.detach() for p in (net.module.a.weight, net.module.a.bias))
    v, c = (p.detach() for p in (net.module.b.weight, net.module.b.bias))
    return x @ w.T + b, lambda h: h @ v.T + c


# ---- edits against closed forms ---------------------------------------------

HIDDEN: dict[str, tuple[E.Edit, Callable[[torch.Tensor], torch.Tensor]]] = {
    "zero a unit": (E.zero("a", unit=2), lambda h: h * torch.tensor([1.0, 1, 0, 1])),
    "zero an example": (E.zero("a", example=-1), lambda h: torch.cat([h[:-1], 0 * h[:1]])),
    "mean": (E.mean("a"), lambda h: h.mean(0, keepdim=True).expand_as(h)),
    "clamp": (
        E.clamp("a", 0.25, unit=[0, 3]),
        lambda h: h.index_fill(1, torch.tensor([0, 3]), 0.25),
    ),
    "limits": (E.clamp("a", low=-0.1, high=0.1), lambda h: h.clamp(-0.1, 0.1)),
    "steer": (
        E.steer("a", [1.0, 0.0, -1.0, 2.0], 0.5),
        lambda h: h + torch.tensor([0.5, 0, -0.5, 1.0]),
    ),
    "scale": (E.scale("a", 3.0, unit=slice(0, 2)), lambda h: h * torch.tensor([3.0, 3, 1, 1])),
    "patch": (
        E.patch("a", x64(4) @ torch.ones(3, 4).double()),
        lambda h: x64(4) @ torch.ones(3, 4).double(),
    ),
    "callback": (E.callback("a", torch.exp), torch.exp),
    "dictionary": (E.edit_from_dict({"kind": "zero", "site": "a"}), torch.zeros_like),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", HIDDEN)
def test_edits_against_the_closed_form(linear: Net, case: str, engine: str) -> None:
    edit, change = HIDDEN[case]
    hidden, rest = parts(linear, x64())
    run = linear.run(x64(), edits=edit, record="a", engine=engine)
    assert torch.allclose(run.acts.tensor("a"), change(hidden), atol=1e-14), "after its edits"
    assert torch.allclose(run.output, rest(change(hidden)), atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_resample_and_noise_reach_the_output(linear: Net, engine: str) -> None:
    hidden, rest = parts(linear, x64())
    for edit in (E.resample("a", seed=1), E.noise("a", 0.5, seed=1)):
        run = linear.run(x64(), edits=edit, record="a", engine=engine)
        assert not torch.allclose(run.acts.tensor("a"), hidden)
        assert torch.allclose(run.output, rest(run.acts.tensor("a")), atol=1e-13)
        other = linear.run(x64(), edits=edit, engine="hooks").output
        assert torch.equal(other, run.output) or torch.allclose(other, run.output, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_on_one_site_apply_in_the_order_they_are_listed(linear: Net, engine: str) -> None:
    hidden, rest = parts(linear, x64())
    add, double = E.steer("a", torch.ones(4)), E.scale("a", 2.0)
    first = linear.run(x64(), edits=[add, double], engine=engine).output
    second = linear.run(x64(), edits=[double, add], engine=engine).output
    assert torch.allclose(first, rest((hidden + 1) * 2), atol=1e-13)
    assert torch.allclose(second, rest(hidden * 2 + 1), atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_on_different_sites_apply_in_the_order_of_the_forward_pass(
    linear: Net, engine: str
) -> None:
    edits = [
        E.scale("b", 10.0),
        E.zero("a"),
        {"kind": "steer", "site": "b", "direction": [1.0, 2.0]},
    ]
    out = linear.run(x64(), edits=edits, engine=engine).output
    expected = linear.module.b.bias.detach() * 10 + torch.tensor([1.0, 2.0])
    assert torch.allclose(out, expected.expand_as(out), atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_editing_an_input_of_the_network(linear: Net, engine: str) -> None:
    out = linear.run(x64(), edits=E.scale(":input", 2.0), engine=engine).output
    assert torch.allclose(out, linear.module(x64() * 2).detach(), atol=1e-13)


def test_a_glob_edits_every_site_it_matches() -> None:
    net, ids = opened("tiny_lm")
    both = net.run(ids, edits=[E.zero("mlp.0.out"), E.zero("mlp.1.out")]).output
    assert torch.equal(net.run(ids, edits=E.zero("mlp.*.out")).output, both)


def test_position_head_and_unit_restrictions_hit_their_part_only() -> None:
    net, ids = opened("tiny_lm")
    z = net.record(ids, "attn.0.z").tensor("attn.0.z")
    edit = E.zero("attn.0.z", head=[1, 3], position=slice(2, 4), example=0, unit=5)
    got = net.record(ids, "attn.0.z", edits=edit).tensor("attn.0.z")
    expected = z.clone()
    expected[0, 2:4, [[1], [3]], 5] = 0
    assert torch.equal(got, expected)
    assert (got != z).sum() == 4


# ---- record -----------------------------------------------------------------


def test_recorded_values_are_labelled_and_share_memory_with_their_tensor() -> None:
    net, ids = opened("tiny_lm")
    acts = net.record(ids, ["resid_post.*", "attn.0.q"])
    assert list(acts) == ["resid_post.0", "resid_post.1", "attn.0.q"]
    assert len(acts) == 3
    q = acts["attn.0.q"]
    assert isinstance(q, xr.DataArray)
    assert q.dims == ("batch", "position", "head", "unit")
    assert q.attrs == {"site": "blocks.0.attn.q_proj", "dtype": "float32"}
    assert q.name == "attn.0.q"
    q.values[0, 0, 0, 0] = 99.0
    assert acts.tensor("attn.0.q")[0, 0, 0, 0] == 99.0
    with pytest.raises(errors.SiteError, match=r"'resid_post.2' was not recorded.*nearest") as e:
        acts["resid_post.2"]
    assert e.value.nearest in acts
    assert "resid_post.0: {'batch': 3" in repr(acts)


def test_bfloat16_is_shown_as_float32_exactly() -> None:
    module = TwoLinear().eval().bfloat16()
    net = patchclamp.open(module, torch.randn(2, 3, dtype=torch.bfloat16))
    acts = net.record(torch.randn(2, 3, dtype=torch.bfloat16), "a")
    assert acts["a"].dtype == np.float32
    assert acts["a"].attrs["dtype"] == "bfloat16"
    assert torch.equal(torch.from_numpy(acts["a"].values).bfloat16(), acts.tensor("a"))


class Tripwire(nn.Module):
    """Raises when it is called, once it is armed."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            raise AssertionError("a later module was run")
        return x


def test_recording_stops_the_live_network_at_the_last_site_wanted() -> None:
    first, last = nn.Linear(3, 3), Tripwire()
    net = patchclamp.open(nn.Sequential(first, nn.Tanh(), last).eval(), torch.zeros(2, 3))
    last.armed = True
    x = torch.randn(2, 3)
    acts = net.record(x, ["0", "1"])
    assert torch.equal(acts.tensor("1"), torch.tanh(first(x)).detach())
    with pytest.raises(AssertionError, match="a later module was run"):
        net.run(x, record="1")
    with pytest.raises(AssertionError, match="a later module was run"):
        net.record(x, ["1", "2"])


def test_recording_runs_only_what_it_needs_of_the_graph() -> None:
    net, _ = opened("tiny_lm")
    engine = net.graph

    def count(record: str, output: bool) -> int:
        return engine.compiled((net.sites[record].site.address,), (), output=output).num_operators

    first, last, whole = count("resid_post.0", False), count("logits", False), count("embed", True)
    assert first < 0.6 * last
    assert last == whole


def test_a_module_that_swallows_exceptions_does_not_swallow_the_stop() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.tail = Tripwire()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                y = self.lin(x)
            except Exception:
                y = x
            return self.tail(y)  # type: ignore[no-any-return]

    module = Greedy().eval()
    net = patchclamp.open(module, torch.zeros(2, 3))
    module.tail.armed = True
    assert net.record(torch.zeros(2, 3), "lin").tensor("lin").shape == (2, 3)


def test_the_present_weights_are_used_and_not_those_at_capture() -> None:
    module, x = fresh("digits_mlp")
    net = patchclamp.open(module, x)
    before, digest = net.run(x, engine="graph").output, net.hash
    with torch.no_grad():
        module.head.weight.mul_(2.0)
        module.head.bias.mul_(2.0)
    after = net.run(x, engine="graph").output
    assert torch.allclose(after, before * 2)
    assert torch.equal(after, net.run(x, engine="hooks").output)
    assert net.hash != digest


# ---- gradients --------------------------------------------------------------


def test_targets_by_class_by_row_and_by_function_agree(linear: Net) -> None:
    x = x64()
    by_class = linear.gradients(x, "a", 1)
    by_row = linear.gradients(x, "a", torch.tensor([1, 1, 1, 1]))
    by_function = linear.gradients(x, "a", lambda out: out[:, 1])
    for made in (by_row, by_function):
        assert torch.equal(made.grads.tensor("a"), by_class.grads.tensor("a"))
        assert torch.equal(made.target, by_class.target)
    assert torch.allclose(by_class.target, linear.module(x)[:, 1].detach(), atol=1e-14)
    assert torch.equal(by_class.acts.tensor("a"), linear.record(x, "a").tensor("a"))


def test_a_language_models_class_target_is_a_token_at_the_last_position() -> None:
    net, ids = opened("tiny_lm")
    tokens = torch.tensor([5, 6, 7])
    got = net.gradients(ids, "resid_post.1", tokens)
    logits = net.run(ids).output
    assert torch.allclose(got.target, logits[torch.arange(3), -1, tokens], atol=1e-6)
    assert got.grads.tensor("resid_post.1")[:, :-1].eq(0).all(), "others do not see it"
    assert got.grads.tensor("resid_post.1")[:, -1].ne(0).any()


def test_gradients_at_several_sites_of_one_path_are_each_whole(linear: Net) -> None:
    got = linear.gradients(x64(), [":input", "a", "b"], 0)
    w, v = linear.module.a.weight.detach(), linear.module.b.weight.detach()
    assert torch.allclose(got.grads.tensor(":input"), (v[0] @ w).expand(4, 3), atol=1e-14)
    assert torch.allclose(got.grads.tensor("a"), v[0].expand(4, 4), atol=1e-14)
    assert got.grads.tensor("b").tolist() == [[1.0, 0.0]] * 4


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_taken_after_the_edits(linear: Net, engine: str) -> None:
    got = linear.gradients(x64(), ":input", 0, edits=E.zero("a", unit=[0, 1]), engine=engine)
    w, v = linear.module.a.weight.detach(), linear.module.b.weight.detach()
    assert torch.allclose(got.grads.tensor(":input"), (v[0, 2:] @ w[2:]).expand(4, 3), atol=1e-14)
    held = linear.gradients(x64(), "a", 0, edits=E.clamp("a", 1.0), engine=engine)
    assert torch.allclose(held.grads.tensor("a"), v[0].expand(4, 4), atol=1e-14)
    assert held.acts.tensor("a").eq(1).all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda out: out, r"one scalar per row; got shape \(4, 2\); expected shape \(4,\)"),
        (lambda out: out.sum(), r"one scalar per row; got shape \(\)"),
        (lambda out: 3, r"one scalar per row; got shape int"),
        (2, r"not an output of the network; got 2"),
        (-1, r"not an output of the network; got -1"),
        (lambda out: torch.zeros(4, dtype=torch.float64), r"does not depend on"),
    ],
)
def test_bad_targets(linear: Net, target: object, message: str) -> None:
    with pytest.raises(errors.TargetError, match=message):
        linear.gradients(x64(), "a", target)  # type: ignore[arg-type]


def test_a_site_that_the_target_does_not_depend_on_is_named() -> None:
    net, ids = opened("lstm")
    with pytest.raises(errors.TargetError, match=r"does not depend on site 'lstm\[1\]'"):
        net.gradients(ids, ["lstm[0]", "lstm[1]"], 3)
    with pytest.raises(errors.TargetError, match=r"'embed:input' has no gradient; got.*int64"):
        net.gradients(ids, ["lstm[0]", "embed:input"], 3)


# ---- generation -------------------------------------------------------------

PROMPT = torch.tensor([[5, 9, 33, 21, 70, 4], [8, 8, 61, 17, 2 + 3, 90]])
STEERING = torch.linspace(-3, 3, 32)
GENERATED = {
    "all positions": E.steer("resid_post.0", STEERING),
    "from position 3 on": E.steer("resid_post.0", STEERING, position=slice(3, None)),
    "one position of the prompt": E.zero("resid_post.0", position=2),
    "a position that is generated": E.clamp("mlp.1.out", 4.0, position=8),
    "every second position": E.zero("attn.0.z", position=slice(0, None, 2), head=[1, 2]),
    "patch of the whole sequence": E.patch(
        "mlp.0.out", torch.arange(20.0)[None, :, None].expand(1, 20, 32) - 5
    ),
    "values for the positions listed": E.patch(
        "mlp.0.out", torch.arange(3.0)[None, :, None].expand(1, 3, 32) * 9 - 9, position=[7, 1, 9]
    ),
    "a unit of one example": E.clamp("resid_post.1", 9.0, example=1, unit=4),
}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_edited_generation_with_the_cache_equals_that_without(
    make: Callable[[], nn.Module],
) -> None:
    net = patchclamp.open(make(), {"input_ids": PROMPT})
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    plain = net.generate(PROMPT, **options)
    assert plain.shape == (2, 14)
    assert torch.equal(plain[:, :6], PROMPT)
    changed = []
    for name, edit in GENERATED.items():
        with net.edited(edit) as same:
            assert same is net
            cached = net.generate(PROMPT, use_cache=True, **options)
            whole = net.generate(PROMPT, use_cache=False, **options)
        assert torch.equal(cached, whole), name
        if not torch.equal(cached, plain):
            changed.append(name)
    assert len(changed) >= 4, changed
    assert torch.equal(net.generate(PROMPT, **options), plain), "the edits came off"


def test_logits_within_edited_equal_a_run_with_the_same_edits() -> None:
    net = patchclamp.open(tiny_llama(), {"input_ids": PROMPT})
    for edit in GENERATED.values():
        if edit.kind == "patch" or edit.where.get("position") == 8:
            continue  # outside a sequence of six, which `run` refuses
        with net.edited(edit), torch.no_grad():
            live = net.module(input_ids=PROMPT).logits
        assert torch.equal(live, net.run(PROMPT, edits=edit, engine="hooks").output)


def test_edits_nest_and_come_off_after_an_exception() -> None:
    net, x = opened("digits_mlp")
    plain = net.run(x).output
    one = net.run(x, edits=E.zero("layers.0")).output
    with net.edited(E.zero("layers.0")), torch.no_grad():
        assert torch.equal(net.module(x), one)
        with net.edited(E.clamp("head", 1.0)):
            assert net.module(x).eq(1).all()
        with (
            pytest.raises(ZeroDivisionError),
            net.edited([E.clamp("head", 1.0), E.callback("layers.1", lambda part: 1 / 0)]),
        ):
            net.module(x)
        assert torch.equal(net.module(x), one)
    assert torch.equal(net.run(x).output, plain)


def test_a_network_without_generate_says_so() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(errors.EngineError, match=r"DigitsMLP\) has no generate\(\)"):
        net.generate(x)


# ---- bad input --------------------------------------------------------------

CNN: dict[str, tuple[object, type[Exception], str]] = {
    "NaN": (
        torch.full((2, 1, 8, 8), torch.nan),
        errors.InputError,
        r"NaN.*at index \[0, 0, 0, 0\]",
    ),
    "infinity": (torch.rand(2, 1, 8, 8) / 0, errors.InputError, r"NaN or infinity.*hint: clean"),
    "no batch axis": (
        torch.rand(1, 8, 8),
        errors.InputError,
        r"wrong shape; got \(1, 8, 8\); expected 4 axes.*hint: add the batch axis",
    ),
    "too many axes": (torch.rand(1, 1, 1, 8, 8), errors.InputError, r"got \(1, 1, 1, 8, 8\)"),
    "wrong size": (
        torch.rand(2, 1, 9, 8),
        errors.InputError,
        r"wrong shape; got \(2, 1, 9, 8\); expected \(batch, 1, 8, 8\)",
    ),
    "wrong type": (
        torch.rand(2, 1, 8, 8, dtype=torch.float64),
        errors.InputError,
        r"wrong type; got torch.float64.*expected torch.float32.*hint: convert",
    ),
    "integers": (
        torch.zeros(2, 1, 8, 8, dtype=torch.int64),
        errors.InputError,
        r"wrong type; got torch.int64",
    ),
    "empty batch": (torch.rand(0, 1, 8, 8), errors.InputError, r"is empty; got \(0, 1, 8, 8\)"),
    "text": (["a", "b"], errors.InputError, r"no tokenizer and cannot take texts"),
    "one text": ("a", errors.InputError, r"no tokenizer"),
    "ragged list": ([[1.0], [1.0, 2.0]], errors.InputError, r"not a regular array"),
    "objects": (np.array([object()]), errors.InputError, r"Python objects; expected numbers"),
    "a set": ({1.0}, errors.InputError, r"tensors, arrays, or texts.*got set"),
}


@pytest.mark.parametrize("case", CNN)
def test_bad_inputs_of_an_image_network(case: str) -> None:
    net, _ = opened("digits_cnn")
    inputs, error, message = CNN[case]
    for use in (net.run, lambda x: net.record(x, "head"), lambda x: net.gradients(x, "head", 0)):
        with pytest.raises(error, match=message):
            use(inputs)  # type: ignore[operator]


def test_arrays_and_lists_are_taken_as_tensors_are() -> None:
    net, x = opened("digits_cnn")
    expected = net.run(x).output
    assert torch.equal(net.run(x.numpy()).output, expected)
    assert torch.equal(net.run(x.tolist()).output, expected)
    labelled = xr.DataArray(x.numpy(), dims=("batch", "channel", "row", "column"))
    assert torch.equal(net.run(labelled).output, expected)
    assert torch.equal(net.run((x,)).output, expected)


def test_token_ids_outside_the_vocabulary() -> None:
    net = patchclamp.open("tiny-lm")
    with pytest.raises(
        errors.InputError, match=r"outside the vocabulary.*got 0 to 256; expected 0"
    ):
        net.run(torch.tensor([[0, 256]]))
    with pytest.raises(errors.InputError, match=r"got -1 to 3"):
        net.run(torch.tensor([[-1, 3]]))
    with pytest.raises(errors.InputError, match=r"wrong type; got torch.float32"):
        net.run(torch.rand(2, 7))
    with pytest.raises(errors.InputError, match=r"is empty"):
        net.run(torch.zeros(2, 0, dtype=torch.int64))


def test_32_bit_token_ids_are_fine() -> None:
    net, ids = opened("tiny_lm")
    assert torch.equal(net.run(ids.int()).output, net.run(ids).output)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x: n.record(x, "laers.0"), errors.SiteError, r"no site.*nearest 'layers.0'"),
        (lambda n, x: n.record(x, "nothing.*"), errors.SiteError, r"no site matches 'nothing.\*'"),
        (lambda n, x: n.record(x, []), errors.SiteError, r"no sites to record.*hint"),
        (lambda n, x: n.run(x, engine="grph"), errors.OptionError, r"no engine.*nearest 'graph'"),
        (lambda n, x: n.record(x, "head", batch_size=0), errors.OptionError, r"at least 1; got 0"),
        (lambda n, x: n.run(x, edits=E.zero("haed")), errors.SiteError, r"nearest 'head'"),
        (lambda n, x: n.run(x, edits={"kind": "zer", "site": "head"}), errors.EditError, "'zero'"),
        (lambda n, x: n.run(x, edits="zero"), errors.EditError, r"Edit objects or dictionaries"),
        (lambda n, x: n.run(x, edits=E.zero("head", unit=10)), errors.EditError, r"-10 to 9"),
        (lambda n, x: n.run(x, edits=E.zero("head", row=1)), errors.EditError, r"no axis 'row'"),
        (
            lambda n, x: n.run(x, edits=E.patch("head", torch.zeros(7, 10))),
            errors.EditError,
            r"does not fit site 'head'; got shape \(7, 10\); expected.*\(batch=3, unit=10\)",
        ),
        (
            lambda n, x: n.record(x, "head:linear", engine="hooks"),
            errors.EngineError,
            r"cannot reach 'head:linear'.*hint: use engine='graph'",
        ),
    ],
)
def test_bad_requests(
    call: Callable[[Net, torch.Tensor], object], error: type[Exception], message: str
) -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(error, match=message):
        call(net, x)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_that_does_not_fit_is_refused_by_both_engines(engine: str) -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(errors.EditError, match=r"does not fit site 'layers.0'"):
        net.run(x, edits=E.patch("layers.0", torch.zeros(5)), engine=engine)


def test_opening_needs_example_inputs_that_the_network_takes() -> None:
    with pytest.raises(errors.InputError, match=r"opening TwoLinear needs example inputs.*hint"):
        patchclamp.open(TwoLinear())
    with pytest.raises(errors.InputError, match=r"fails on its example inputs.*got \(2, 5\)"):
        patchclamp.open(TwoLinear(), torch.zeros(2, 5))
    with pytest.raises(errors.InputError, match=r"holds NaN"):
        patchclamp.open(TwoLinear(), torch.full((2, 3), torch.nan))
    with pytest.raises(errors.InputError, match=r"hold no tensor"):
        patchclamp.open(TwoLinear(), (1.0,))
    with pytest.raises(errors.SourceError):
        patchclamp.open("no-such-network")


def test_axes_given_by_the_user_must_fit_the_example_inputs() -> None:
    with pytest.raises(errors.InputError, match=r"axes"):
        patchclamp.open(TwoLinear(), torch.zeros(2, 3), axes=[("batch", "unit", "more")])
    with pytest.raises(errors.InputError, match=r"axes"):
        patchclamp.open(TwoLinear(), torch.zeros(2, 3), axes=[])


def test_more_inputs_than_the_network_takes() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(errors.InputError, match=r"arguments|inputs"):
        net.run((x, x))


def test_the_graph_engine_says_why_it_cannot_serve_a_call() -> None:
    net, _ = opened("lstm")
    longer = torch.randint(0, 256, (2, 9))
    assert net.run(longer).output.shape == (2, 9, 256)
    with pytest.raises(errors.EngineError, match=r"captured with input 0 of shape.*hint"):
        net.run(longer, engine="graph")


# ---- describing itself ------------------------------------------------------


def test_what_a_net_says_of_itself() -> None:
    net, _ = opened("digits_mlp")
    assert repr(net) == f"<DigitsMLP: module given, {net.num_parameters:,} parameters>"
    assert net.num_parameters == sum(p.numel() for p in net.module.parameters())
    assert str(net.sites).splitlines()[0].startswith("DigitsMLP: ")
    assert net.input_dims == (("batch", 1, 8, 8),)
    report = net.coverage()
    assert report.check is not None
    assert report.check.passed
    assert report.check.max_error <= 1e-5
    assert "every shared site" in report.check.checks
    assert "hooks engine: 20 sites (ground truth)" in str(report)


def test_a_batch_of_one_as_example_still_leaves_the_batch_open() -> None:
    net = patchclamp.open(InPlace().eval(), torch.randn(1, 4))
    for engine in ENGINES:
        assert net.run(torch.randn(5, 4), engine=engine).output.shape == (5, 2)


def test_a_network_with_a_fixed_batch_says_so() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x.view(2, 3))  # type: ignore[no-any-return]

    net = patchclamp.open(Fixed().eval(), torch.zeros(2, 3))
    assert net.input_dims == ((2, 3),)
    assert "batch is fixed" in str(net.coverage())
    with pytest.raises(errors.InputError, match=r"got \(4, 3\); expected \(2, 3\)"):
        net.run(torch.zeros(4, 3))
    with pytest.raises(errors.InputError, match=r"batch of Fixed is fixed"):
        net.record(torch.zeros(2, 3), "lin", batch_size=1)

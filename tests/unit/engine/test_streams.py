"""Residual streams: what is found in each architecture, and graphs with an input per reader."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError
from patchclamp.engine.rewiring import fanned, heads_back, heads_first, masked
from patchclamp.engine.streams import Streams, find_streams
from patchclamp.model.inputs import principal
from patchclamp.net import Net
from tests.networks import fresh, tiny_bert, tiny_gpt2, tiny_llama

TOKENS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
NAMES = ("tiny_lm", "gpt2", "llama", "bert", "vit")


def opened(name: str) -> tuple[Net, Streams]:
    made = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
    module, example = (made[name](), TOKENS) if name in made else fresh(name)
    net = patchclamp.open(module, example)
    return net, find_streams(net.graph.capture.graph, net.graph.attention, net.sites)


@pytest.fixture(scope="module", params=NAMES)
def found(request: pytest.FixtureRequest) -> tuple[Net, Streams]:
    return opened(request.param)


def test_sources_and_reads_by_name() -> None:
    _, streams = opened("tiny_lm")
    assert [s.site for s in streams.sources[:4]] == ["embed", "position", "attn.0.z", "mlp.0.out"]
    assert [r.site for r in streams.reads[:3]] == ["attn.0.z", "mlp.0.out", "attn.1.z"]
    assert streams.reads[-1].site == "logits"
    first, second = streams.reads[:2]
    assert [streams.sources[i].site for i in first.sources] == ["embed", "position"]
    assert [streams.sources[i].site for i in second.sources] == ["embed", "position", "attn.0.z"]
    assert [(s.role, s.num_heads) for s in first.slots] == [("q", 4), ("k", 4), ("v", 4)]


def test_shared_key_heads_are_readers_of_their_own() -> None:
    _, streams = opened("llama")
    slots = streams.reads[0].slots
    assert [(s.role, s.site, s.num_heads) for s in slots] == [
        ("q", "attn.0.z", 4),
        ("k", "attn.0.k", 2),
        ("v", "attn.0.v", 2),
    ]


def test_one_projection_for_three_roles_is_taken_apart() -> None:
    for name in ("gpt2", "vit"):
        _, streams = opened(name)
        slots = streams.reads[0].slots
        width = slots[0].num_heads * slots[0].head_dim
        assert [s.start for s in slots] == [0, width, 2 * width]
        assert len({s.projection.node for s in slots}) == 1


def test_a_norm_after_the_sum_is_a_reader_and_a_writer() -> None:
    _, streams = opened("bert")
    sites = [s.site for s in streams.sources]
    reads = {r.site: r for r in streams.reads}
    assert "resid_mid.0" in sites
    assert "resid_mid.0" in reads
    assert [sites[i] for i in reads["mlp.0.out"].sources] == ["resid_mid.0"]


def test_activation_written_out_is_no_stream() -> None:
    """GPT-2's activation holds x + c x^3, which adds two values of one shape."""
    _, streams = opened("gpt2")
    assert [s.site for s in streams.sources][2:] == [
        "attn.0.z",
        "mlp.0.out",
        "attn.1.z",
        "mlp.1.out",
    ]


def test_a_network_without_sums_is_refused() -> None:
    net = patchclamp.open(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.zeros(2, 4))
    with pytest.raises(EngineError, match="no residual stream"):
        find_streams(net.graph.capture.graph, net.graph.attention, net.sites)


def test_copies_change_nothing(found: tuple[Net, Streams]) -> None:
    net, streams = found
    with torch.no_grad():
        plain = principal(net.graph.run(net.example)[0])
        rewired = fanned(net.graph, streams)
        again, values = rewired.run(net.example, record=[*rewired.values, *rewired.reads])
    assert torch.allclose(principal(again), plain, atol=1e-5)
    for source, value in zip(streams.sources, values, strict=False):
        if source.attention is not None:
            turned = heads_back(heads_first(value, source.attention), source.attention)
            assert torch.equal(turned, value)


def masks(streams: Streams, fill: float) -> list[Tensor]:
    return [
        torch.full((1, r.num_slots, sum(streams.sources[i].num_writers for i in r.sources)), fill)
        for r in streams.reads
    ]


def references(net: Net, streams: Streams) -> list[Tensor]:
    """Other values of every source, heads first."""
    rewired = fanned(net.graph, streams)
    with torch.no_grad():
        _, values = rewired.run(net.example, record=rewired.values)
    made = []
    for source, value in zip(streams.sources, values, strict=True):
        x = value if source.attention is None else heads_first(value, source.attention)
        made.append(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    return made


def test_cutting_all_edges_of_a_writer_is_replacing_its_value(found: tuple[Net, Streams]) -> None:
    net, streams = found
    rewired, held = masked(net.graph, streams), references(net, streams)
    with torch.no_grad():
        plain = principal(net.graph.run(net.example)[0])
        untouched, _ = rewired.run(net.example, extra=[*held, *masks(streams, 0.0)])
        assert torch.allclose(principal(untouched), plain, atol=1e-5)
        for i, source in enumerate(streams.sources):
            if not source.value.address:
                continue  # a parameter is no site
            unit = source.num_writers - 1
            cut = masks(streams, 0.0)
            for read, mask in zip(streams.reads, cut, strict=True):
                start = 0
                for j in read.sources:
                    if i == j:
                        mask[:, :, start + unit] = 1
                    start += streams.sources[j].num_writers
            got, _ = rewired.run(net.example, extra=[*held, *cut])

            def replace(x: Tensor, i: int = i, unit: int = unit) -> Tensor:
                attention = streams.sources[i].attention
                if attention is None:
                    return held[i].expand_as(x)
                seen = heads_first(x, attention).clone()
                seen[:, unit] = held[i][:, unit]
                return heads_back(seen, attention)

            want, _ = net.graph.run(net.example, transforms={source.value.address: replace})
            assert torch.allclose(principal(got), principal(want), atol=2e-5), source.site
            assert not torch.allclose(principal(want), plain, atol=1e-3), source.site


def test_a_cut_query_reaches_its_own_head_only(found: tuple[Net, Streams]) -> None:
    net, streams = found
    rewired, held = masked(net.graph, streams), references(net, streams)
    i, read = next((i, r) for i, r in enumerate(streams.reads) if r.slots)
    source = streams.sources[read.feeds[0]]
    assert source.attention is not None
    assert source.num_heads is not None
    value = rewired.values[read.feeds[0]]

    def heads(cut: list[Tensor]) -> Tensor:
        with torch.no_grad():
            _, (z,) = rewired.run(net.example, extra=[*held, *cut], record=[value], output=False)
        return heads_first(z, source.attention)  # type: ignore[arg-type]  # asserted above

    before, first = heads(masks(streams, 0.0)), 0
    for slot in read.slots:
        shared = source.num_heads // slot.num_heads
        for head in range(slot.num_heads):
            cut = masks(streams, 0.0)
            cut[i][:, first + head] = 1
            changed = (heads(cut) != before).flatten(2).any(2).any(0)
            own = set(range(head * shared, (head + 1) * shared))
            assert set(changed.nonzero()[:, 0].tolist()) == own, (slot.role, head)
        first += slot.num_heads

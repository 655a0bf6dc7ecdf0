"""Wavefronts over drawn networks, sites, cuts and batches, against one run per variant."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import patchclamp
from patchclamp.engine.wavefront import Wavefront
from patchclamp.model.inputs import principal


class Drawn(nn.Module):
    """A stack of layers that mix rows or do not, forwards in time or both ways.

    Shapes: (batch, length, 6) to the same.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(len(kinds))
        self.kinds = kinds
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            if kind == "local":
                x = x + torch.tanh(y)
            elif kind == "causal":
                at = torch.arange(x.shape[1])
                scores = (y @ x.transpose(1, 2)).masked_fill(at[None] > at[:, None], -torch.inf)
                x = x + scores.softmax(-1) @ y
            elif kind == "past":
                x = x + y.cumsum(1) / 5
            elif kind == "both":
                x = x + (y @ x.transpose(1, 2)).softmax(-1) @ y
            else:
                x = x + y.mean(1, keepdim=True)
        return x


STACKS = (
    ("local", "causal"),
    ("causal", "both"),
    ("both", "past"),
    ("past", "mean"),
    ("causal", "local", "past"),
    ("local", "mean", "causal"),
)
_NETS: dict[tuple[str, ...], patchclamp.Net] = {}


def opened(kinds: tuple[str, ...]) -> patchclamp.Net:
    if kinds not in _NETS:
        example = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
        axes = [("batch", "length", 6)]
        _NETS[kinds] = patchclamp.open(Drawn(kinds).eval(), example, axes=axes)
    return _NETS[kinds]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_wavefront_equals_one_run_per_variant(data: st.DataObject) -> None:
    kinds = data.draw(st.sampled_from(STACKS))
    num, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 7))
    first = data.draw(st.integers(0, length - 1))
    position = data.draw(st.none() | st.integers(-length, length - 1))
    net = opened(kinds)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    call = net.call(torch.randn(num, length, 6, generator=generator))
    wave = Wavefront(net.graph, call)
    offered = [
        s.address
        for s in net.graph.sites().values()
        if s.shape[:2] == ("batch", "length") and len(s.shape) == 3
    ]
    sites = data.draw(st.lists(st.sampled_from(offered), min_size=1, max_size=4, unique=True))
    counts = {address: data.draw(st.integers(0, 3)) for address in sites}

    def variants(address: str) -> Tensor:
        with torch.no_grad():
            base = wave.base(address)
            made = base.repeat(counts[address], 1, 1)
            noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(len(address)))
            noise[:, :first] = 0
            return made + noise

    made = {address: variants(address) for address in sites}
    got = wave.run({a: lambda raw, a=a: made[a] for a in sites}, first_row=first, position=position)
    expected = []
    with torch.no_grad():
        for address in wave.order(sites):
            for one in made[address].split(num) if counts[address] else ():
                raw, _ = net.graph.run(call, transforms={address: lambda _, one=one: one})
                expected.append(principal(raw))
    if not expected:
        assert got.shape[0] == 0
        return
    whole = torch.cat(expected)
    whole = whole if position is None else whole[:, position]
    assert got.shape == whole.shape
    assert float((got - whole).abs().max()) <= 1e-5 * max(1.0, float(whole.abs().max()))

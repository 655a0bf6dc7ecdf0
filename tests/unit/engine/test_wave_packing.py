"""Variants with first positions of their own in one wave, and a second call beside the baseline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import EngineError
from patchclamp.engine.wave_packing import Packing, flat_rows
from patchclamp.engine.wave_rows import Axes, Rows
from patchclamp.engine.wavefront import Wavefront
from patchclamp.model.inputs import principal
from patchclamp.net import Net
from tests import networks as N
from tests.unit.engine.test_wavefront import TRANSFORMERS, transformer

FIRSTS = (0, 2, 5, 2)
LAYOUTS = [Axes(0, 1), Axes(0, 2), Axes(1, 0), Axes(0, 0, merged=True)]


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def laid_out(flat: Tensor, axes: Axes, num_rows: int) -> Tensor:
    """(batch, row, 3) under the axes of a layout."""
    if axes.merged:
        return flat.flatten(0, 1)
    if axes == Axes(0, 2):
        return flat[:, :, None].transpose(1, 2)
    return flat if axes == Axes(0, 1) else flat.transpose(0, 1)


@pytest.mark.parametrize("axes", LAYOUTS)
@pytest.mark.parametrize("want", [Rows(0, 6), Rows(2, 6), Rows(5, 6)])
def test_there_and_back(axes: Axes, want: Rows) -> None:
    """What is packed and unpacked is the baseline before each first position, else the variant."""
    num_examples, length = 2, 6
    packing = Packing(FIRSTS, num_examples, length, torch.device("cpu"))
    base = torch.randn(num_examples, length, 3)
    variants = torch.randn(len(FIRSTS), num_examples, length, 3)
    for k, first in enumerate(FIRSTS):
        variants[k, :, :first] = base[:, :first]
    plain = variants.flatten(0, 1)
    packed = packing.packed(laid_out(plain, axes, length), axes, Rows(0, length), len(FIRSTS))
    assert packed.shape[axes.row or 0] == packing.num_rows(len(FIRSTS)) == 2 * (6 + 4 + 1 + 4)
    rows = [variants[k, :, first:].flatten(0, 1) for k, first in enumerate(FIRSTS)]
    assert torch.equal(flat_rows(packed, axes).reshape(-1, 3), torch.cat(rows))
    raw = laid_out(base, axes, length)
    back = packing.unpacked(packed, raw, axes, want, len(FIRSTS))
    part = plain[:, want.start : want.stop]
    assert torch.equal(back, laid_out(part, axes, want.size))
    later = packing.packed_part(
        laid_out(variants[2:].flatten(0, 1), axes, length), axes, Rows(0, length), 2, 4
    )
    assert torch.equal(flat_rows(later, axes).reshape(-1, 3), torch.cat(rows[2:]))
    filled = packing.of_base(raw, axes, 1, 3)
    expected = torch.cat([base[:, f:].flatten(0, 1) for f in FIRSTS[1:3]])
    assert torch.equal(flat_rows(filled, axes).reshape(-1, 3), expected)


def edited(base: Tensor, axis: int, row_axis: int, firsts: Sequence[int], seed: int) -> Tensor:
    """A variant for each first position, equal to the baseline before it."""
    made = []
    for k, first in enumerate(firsts):
        generator = torch.Generator().manual_seed(100 * seed + k)
        changed = base * (0.5 + torch.rand(base.shape, generator=generator)) + 0.1 * (base == 0)
        kept = torch.arange(base.shape[row_axis]) < first
        kept = kept.view([-1 if i == row_axis else 1 for i in range(base.ndim)])
        made.append(torch.where(kept, base, changed))
    return torch.cat(made, axis)


def assert_mixed(net: Net, inputs: object, sites: Sequence[str], position: int | None) -> None:
    """Variants with different first positions in one run, each against a run of its own."""
    call = net.call(inputs)
    engine = net.graph_for(call)
    wave = Wavefront(engine, call)
    shapes = engine.sites()
    turn = itertools.cycle(range(wave.length))
    firsts = {a: [next(turn) for _ in range(n % 4)] for n, a in enumerate(sites, start=2)}
    made = {}
    for n, a in enumerate(sites):
        axis, row_axis = wave.batch_axis(a), shapes[a].shape.index("length")
        given = edited(wave.base(a), axis, row_axis, firsts[a], n) if firsts[a] else None
        made[a] = wave.base(a).narrow(axis, 0, 0) if given is None else given
    got = wave.run({a: lambda _, a=a: made[a] for a in sites}, first_row=firsts, position=position)
    row = 0
    for a in wave.order(sites):
        axis, size = wave.batch_axis(a), wave.base(a).shape[wave.batch_axis(a)]
        for k in range(len(firsts[a])):
            one = made[a].narrow(axis, k * size, size)
            expected = principal(engine.run(call, transforms={a: lambda _, one=one: one})[0])
            expected = expected if position is None else expected[:, position]
            error = (got[row : row + wave.num_examples] - expected).abs().max()
            assert float(error) <= 1e-5 * max(1.0, float(expected.abs().max())), (a, firsts[a][k])
            row += wave.num_examples
    assert row == len(got)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("position", [None, 3, -1])
def test_first_positions_of_their_own(name: str, position: int | None) -> None:
    """Causal networks and encoders, fused projections, grouped heads, two examples."""
    net, ids = transformer(name)
    known = net.graph_for(net.call(ids)).sites()
    sites = [
        s.address
        for s in known.values()
        if s.shape[:1] == ("batch",) and "length" in s.shape and s.dtype == "float32"
    ]
    assert len(sites) > 40
    assert_mixed(net, ids, sites[::6], position)


def test_rows_are_packed_where_that_is_possible() -> None:
    """A causal network packs the rows of most of its operators."""
    net, ids = transformer("tiny_llama")
    call = net.call(ids)
    wave = Wavefront(net.graph_for(call), call)
    site = net.taps("resid_pre.0")[0].site.address
    firsts = list(range(wave.length))
    made = edited(wave.base(site), 0, 1, firsts, 1)
    wave.run({site: lambda _: made}, first_row={site: firsts}, position=-1)
    (plan,) = (p for (_, cuts), p in wave._plans.items() if len(cuts) > 1)
    rows = [step.take.name for step in plan.steps]
    assert rows.count("PACKED") > rows.count("ALL") + rows.count("FROM")


def test_wrong_first_positions() -> None:
    net, ids = N.opened("tiny_lm")
    call = net.call(ids)
    wave = Wavefront(net.graph_for(call), call)
    raw = wave.base("blocks.0")
    made = edited(raw, 0, 1, [1, 3], 0)
    with pytest.raises(EngineError, match="differ from the baseline before position 2"):
        wave.run({"blocks.0": lambda _: made}, first_row={"blocks.0": [2, 3]})
    with pytest.raises(EngineError, match="other variants than first positions"):
        wave.run({"blocks.0": lambda _: made}, first_row={"blocks.0": [1, 3, 3]})
    with pytest.raises(EngineError, match="outside the sequence"):
        wave.run({"blocks.0": lambda _: made}, first_row={"blocks.0": [1, 7]})


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_call_beside_the_baseline(name: str, warm: bool) -> None:
    """Its values are those of a run of its own, and bit for bit the baseline's where they agree."""
    net, ids = transformer(name)
    other = ids.clone()
    other[:, 4] = 50
    call, beside = net.call(ids), net.call(other)
    engine = net.graph_for(call)
    sites = [t.site.address for t in net.taps("resid_pre.*")]
    if warm:
        Wavefront(engine, call).prepare(sites)
    wave = Wavefront(engine, call)
    found = wave.prepare(sites, other=beside)
    raw, expected = engine.run(beside, record=sites)
    expected[wave.name(None)] = principal(raw)
    for address, value in expected.items():
        error = (found[address] - value).abs().max()
        assert float(error) <= 1e-5 * max(1.0, float(value.abs().max())), address
        assert not torch.equal(found[address], wave.base(address))
    if name != "tiny_bert":
        for address in sites:
            assert torch.equal(found[address][:, :4], wave.base(address)[:, :4])

"""Wavefronts against one edited run each: every site, every kind of network, rows left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.protocol import EngineName
from patchclamp.engine.wavefront import Wavefront
from patchclamp.model.inputs import Call, principal
from patchclamp.net import Net
from tests import networks as N

NUM = 2
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def prepared(net: Net, inputs: object) -> tuple[Wavefront, GraphEngine, Call]:
    call = net.call(inputs)
    engine = net._engine(EngineName.GRAPH, call, [])
    assert isinstance(engine, GraphEngine)
    return Wavefront(engine, call), engine, call


def variants(
    wave: Wavefront, address: str, seed: int, first_row: int = 0, row_axis: int | None = None
) -> Callable[[Tensor], Tensor]:
    """NUM noisy variants, equal to the baseline before `first_row`."""
    axis = wave.batch_axis(address)

    def make(raw: Tensor) -> Tensor:
        made = []
        for k in range(NUM):
            generator = torch.Generator().manual_seed(100 * seed + k)
            factor = 0.5 + torch.rand(raw.shape, generator=generator)  # keeps signs, for roots
            changed = raw * factor + 0.1 * (raw == 0)
            if first_row and row_axis is not None:
                kept = torch.arange(raw.shape[row_axis]) < first_row
                kept = kept.view([-1 if i == row_axis else 1 for i in range(raw.ndim)])
                changed = torch.where(kept, raw, changed)
            made.append(changed)
        return torch.cat(made, axis)

    return make


def assert_exact(
    wave: Wavefront,
    engine: GraphEngine,
    call: Call,
    given: Mapping[str, Callable[[Tensor], Tensor]],
    output: Tensor,
    position: int | None,
) -> None:
    """Every variant against a run of its own."""
    row = 0
    for address in wave.order([*given]):
        axis = wave.batch_axis(address)
        base = wave.base(address)
        made = given[address](base)
        for k in range(made.shape[axis] // base.shape[axis]):
            one = made.narrow(axis, k * base.shape[axis], base.shape[axis])
            raw, _ = engine.run(call, transforms={address: lambda _, one=one: one})
            expected = principal(raw)
            if position is not None:
                expected = expected[:, position]
            got = output[row : row + wave.num_examples]
            error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
            assert error <= TOLERANCE, (address, k, error)
            row += wave.num_examples
    assert row == output.shape[0]


def editable(net: Net, engine: GraphEngine) -> list[str]:
    return [
        site.address
        for site in engine.sites().values()
        if "batch" in site.axes and site.dtype == "float32"
    ]


@pytest.mark.parametrize("name", N.SPECIMENS)
def test_every_value_of_every_specimen(name: str) -> None:
    net, inputs = N.opened(name)
    wave, engine, call = prepared(net, inputs)
    given = {a: variants(wave, a, n) for n, a in enumerate(editable(net, engine))}
    assert_exact(wave, engine, call, given, wave.run(given), None)


TRANSFORMERS = ("tiny_llama", "tiny_gpt2", "tiny_bert")


@cache
def transformer(name: str) -> tuple[Net, Tensor]:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    return patchclamp.open(getattr(N, name)(), ids), ids


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(("first_row", "position"), [(0, -1), (1, 4), (3, -1), (6, 4)])
def test_rows_left_out_of_transformers(name: str, first_row: int, position: int) -> None:
    """Causal or not, fused projections, flattened batches, masks: the numbers are the same."""
    net, ids = transformer(name)
    wave, engine, call = prepared(net, ids)
    known = engine.sites()
    some = [a for a in editable(net, engine) if "length" in known[a].shape][first_row % 3 :: 3]
    given = {
        a: variants(wave, a, n, first_row, known[a].shape.index("length"))
        for n, a in enumerate(some)
    }
    assert len(given) > 20
    output = wave.run(given, first_row=first_row, position=position)
    assert_exact(wave, engine, call, given, output, position)


@pytest.mark.parametrize("first_row", [0, 2])
def test_written_out_attention(first_row: int) -> None:
    net, ids = N.opened("tiny_lm")
    wave, engine, call = prepared(net, ids)
    taps = net.taps(["attn.*.scores", "attn.*.pattern", "attn.*.k", "resid_mid.*"])
    given = {
        t.site.address: variants(wave, t.site.address, n, first_row, t.site.shape.index("length"))
        for n, t in enumerate(taps)
    }
    output = wave.run(given, first_row=first_row, position=-1)
    assert_exact(wave, engine, call, given, output, -1)


def test_causal_networks_leave_rows_out_and_encoders_do_not() -> None:
    for name in TRANSFORMERS:
        net, ids = transformer(name)
        wave, _, _ = prepared(net, ids.repeat(1, 3))
        sites = [t.site.address for t in net.taps("resid_pre.*")]
        whole, late = (
            wave.bytes_per_variant(sites, first_row=first, position=-1) for first in (0, 19)
        )
        saved = 1 - late / whole
        # an encoder saves only on the way to its first attention
        assert (saved < 0.4) if name == "tiny_bert" else (saved > 0.5), (name, saved)


def test_a_mask_that_lets_the_past_see_the_future_is_noticed_at_its_cut() -> None:
    """Prefix attention: the first four positions see each other, all later ones only the past."""
    net = patchclamp.open(Prefix().eval(), torch.randn(2, 6, 8))
    x = torch.randn(2, 7, 8)
    wave, engine, call = prepared(net, x)
    for first_row in (2, 5):
        given = {"up": variants(wave, "up", 1, first_row, 1)}
        for position in (1, 3, 6):
            output = wave.run(given, first_row=first_row, position=position)
            assert_exact(wave, engine, call, given, output, position)
    moved = wave.run({"up": variants(wave, "up", 1, 2, 1)}, first_row=2, position=1)
    assert not torch.allclose(moved[:2], wave.base_output()[:, 1], atol=1e-4)


class Prefix(nn.Module):
    """Attention with a bidirectional prefix of four positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        at = torch.arange(x.shape[1])
        allowed = (at[None] <= at[:, None]) | (at[None] < 4)
        scores = (y @ y.transpose(1, 2)).masked_fill(~allowed, -torch.inf)
        return self.down(scores.softmax(-1) @ y)


class Reversed(nn.Module):
    """Sums from the end: a suffix of its rows is computed from that suffix, and yet not causal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).flip(1).cumsum(1).flip(1))


class Merged(nn.Module):
    """Heads before examples in one axis, which tells variants apart only one at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)  # (batch, 8)
        heads = torch.stack([y[:, :4], y[:, 4:]])  # (2, batch, 4)
        flat = torch.tanh(heads.reshape(-1, 4))  # (2 batch, 4), head first
        return self.down(flat.unflatten(0, (2, -1)).sum(0))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(Reversed(), torch.randn(2, 6, 4)), (Merged(), torch.randn(3, 4))],
    ids=["reversed", "merged"],
)
def test_awkward_layouts(module: nn.Module, inputs: Tensor) -> None:
    net = patchclamp.open(module.eval(), inputs)
    wave, engine, call = prepared(net, inputs)
    rows = wave.length > 0
    for first_row in (0, 3) if rows else (0,):
        given = {"up": variants(wave, "up", 1, first_row, 1 if rows else None)}
        for position in (None, 0, -1) if rows else (None,):
            output = wave.run(given, first_row=first_row, position=position)
            assert_exact(wave, engine, call, given, output, position)


def test_variants_come_in_the_order_of_the_forward_pass_and_a_site_may_have_none() -> None:
    net, ids = N.opened("tiny_lm")
    wave, engine, call = prepared(net, ids)
    given = {
        "blocks.1": variants(wave, "blocks.1", 2),
        "blocks.0.mlp": lambda raw: raw[:0],
        "embed": variants(wave, "embed", 1),
    }
    assert wave.order([*given]) == ["embed", "blocks.0.mlp", "blocks.1"]
    assert_exact(wave, engine, call, given, wave.run(given), None)
    only = {"blocks.0.mlp": lambda raw: raw[:0], "blocks.1": variants(wave, "blocks.1", 2)}
    assert_exact(wave, engine, call, only, wave.run(only), None)


def test_an_inner_value_as_output_and_sites_that_come_after_it() -> None:
    net, ids = N.opened("tiny_lm")
    wave, engine, call = prepared(net, ids)
    given = {"embed": variants(wave, "embed", 1), "blocks.1": variants(wave, "blocks.1", 2)}
    made = wave.run(given, output="blocks.0.mlp", position=2)
    num = wave.num_examples
    plain = wave.base("blocks.0.mlp")[:, 2]
    assert torch.equal(made[2 * num : 3 * num], plain)  # what comes later changes nothing
    one = given["embed"](wave.base("embed"))[:num]
    _, values = engine.run(
        call, transforms={"embed": lambda _: one}, record=["blocks.0.mlp"], output=False
    )
    assert torch.allclose(made[:num], values["blocks.0.mlp"][:, 2], atol=1e-5)


def test_plans_are_shared_and_values_are_not() -> None:
    net, ids = N.opened("tiny_lm")
    for inputs in (ids, (ids + 1) % 256):
        wave, engine, call = prepared(net, inputs)
        given = {"blocks.0": variants(wave, "blocks.0", 1, 2, 1)}
        assert_exact(wave, engine, call, given, wave.run(given, first_row=2, position=-1), -1)
    known = [k for k in engine.planned if ("batch", 3) in k and ("length", 7) in k]
    assert known


def test_new_weights_are_used() -> None:
    module, ids = N.fresh("tiny_lm")
    net = patchclamp.open(module, ids)
    for _ in range(2):
        wave, engine, call = prepared(net, ids)
        given = {"blocks.0": variants(wave, "blocks.0", 1)}
        assert_exact(wave, engine, call, given, wave.run(given), None)
        module.blocks[1].mlp.up = nn.Linear(128, 512).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:, :2], "do not have the shape"),
        (lambda raw: raw[:2], "do not have the shape"),
        (lambda raw: raw.double(), "do not have the shape"),
        (lambda raw: raw + 1, "differ from the baseline before position 3"),
    ],
)
def test_variants_that_do_not_fit(change: Callable[[Tensor], Tensor], message: str) -> None:
    net, ids = N.opened("tiny_lm")
    wave, _, _ = prepared(net, ids)
    with pytest.raises(EngineError, match=message):
        wave.run({"blocks.0": change}, first_row=3, position=-1)


def test_what_cannot_be_asked_for() -> None:
    net, ids = N.opened("tiny_lm")
    wave, _, _ = prepared(net, ids)
    same = {"blocks.0": lambda raw: raw}
    with pytest.raises(EngineError, match=r"nearest 'blocks\.0'"):
        wave.run({"blokcs.0": lambda raw: raw})
    with pytest.raises(EngineError, match="outside the sequence"):
        wave.run(same, position=7)
    with pytest.raises(EngineError, match="outside the sequence"):
        wave.run(same, first_row=7)
    with pytest.raises(EngineError, match="no batch axis"):
        wave.run({"position": lambda raw: raw})
    cnn, images = N.opened("digits_cnn")
    wave, _, _ = prepared(cnn, images)
    with pytest.raises(EngineError, match="no positions"):
        wave.run({"head": lambda raw: raw}, position=0)


class Pooled(nn.Module):
    """Ends in a mean over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean(0)


def test_examples_that_are_averaged_cannot_be_told_apart() -> None:
    net = patchclamp.open(Pooled().eval(), torch.randn(3, 4))
    wave, _, _ = prepared(net, torch.randn(3, 4))
    with pytest.raises(EngineError, match=r"no batch axis, so variants cannot be told apart"):
        wave.run({"up": lambda raw: raw})


def test_a_fixed_batch_is_refused() -> None:
    net = patchclamp.open(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4), axes=[(2, 4)])
    with pytest.raises(EngineError, match="fixed batch"):
        prepared(net, torch.randn(2, 4))

"""`net.bound` on live networks: what it encloses, where it can perturb, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.results import Bounds
from patchclamp.bounding.sets import Around, Ball, Box, Substitutions
from patchclamp.core.edit_kinds import clamp, mean, noise, patch, resample, scale, steer, zero
from patchclamp.core.errors import BoundError, EditError, InputError, OptionError, SiteError
from patchclamp.net import Net
from patchclamp.specimens import build
from tests.networks import Attend, Reused, opened

SMALL: dict[str, tuple[dict[str, object], Callable[[], Tensor], object, float]] = {
    "digits_mlp": ({}, lambda: torch.rand(2, 1, 8, 8), ":input", 0.01),
    "digits_cnn": ({"channels": (3, 4, 4)}, lambda: torch.rand(2, 1, 8, 8), ":input", 0.01),
    "resnet": (
        {"channels": (2, 3), "blocks_per_stage": 1},
        lambda: torch.rand(2, 1, 8, 8),
        ":input",
        0.01,
    ),
    "vit": (
        {"patch": 4, "width": 4, "num_layers": 1, "num_heads": 2},
        lambda: torch.rand(2, 1, 8, 8),
        ":input",
        0.001,
    ),
    "lstm": (
        {"vocab": 11, "width": 3, "hidden": 3},
        lambda: torch.randint(0, 11, (2, 2)),
        "embed",
        0.05,
    ),
    "tiny_lm": (
        {"vocab": 11, "context": 4, "width": 4, "num_heads": 2, "mlp_width": 8},
        lambda: torch.randint(0, 11, (2, 2)),
        "embed",
        0.0003,
    ),
}
"""Options, inputs, what is perturbed and by how much; crown is tighter than intervals there."""


@cache
def small(name: str) -> tuple[Net, Tensor]:
    """A small specimen in float64, opened once."""
    options, inputs, _, _ = SMALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = build(name, **options).eval().double()
        x = inputs()
    x = x.double() if x.is_floating_point() else x
    return patchclamp.open(module, x), x


@cache
def mlp() -> tuple[Net, Tensor]:
    """4 - 8 - 6 - 3 with a ReLU and a tanh, in float32 as networks come."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
        x = torch.randn(3, 4)
    return patchclamp.open(nn.Sequential(*layers).eval(), x), x


def assert_holds(bounds: Bounds, values: Tensor, slack: float = 0.0) -> None:
    """Values (samples, *output) are enclosed."""
    assert bool((values >= bounds.tensors.lower - slack).all())
    assert bool((values <= bounds.tensors.upper + slack).all())


def assert_within(inner: Bounds, outer: Bounds) -> None:
    assert bool((inner.tensors.lower >= outer.tensors.lower - 1e-9).all())
    assert bool((inner.tensors.upper <= outer.tensors.upper + 1e-9).all())


def corners(low: Tensor, high: Tensor, num: int) -> Tensor:
    share = torch.rand(num, *low.shape, dtype=low.dtype)
    share = torch.where(torch.rand_like(share) < 0.5, share.round(), share)
    share[: num // 4] = share[: num // 4].round()
    return low + share * (high - low)


@pytest.mark.parametrize("name", SMALL)
def test_specimen(name: str) -> None:
    """Edited runs of the live network stay inside; a point encloses its own value."""
    net, x = small(name)
    _, _, site, radius = SMALL[name]
    value = net.run(x, record=str(site)).acts.tensor(str(site))
    still = net.bound(x, {str(site): 0.0})
    assert_holds(still, net.run(x).output)
    assert float((still.tensors.upper - still.tensors.lower).max()) < 1e-6
    crown = net.bound(x, {str(site): radius})
    plain = net.bound(x, {str(site): radius}, method="interval")
    assert_within(crown, plain)
    width = [(b.tensors.upper - b.tensors.lower).mean() for b in (crown, plain)]
    assert width[0] < 0.9 * width[1]
    for moved in corners(value - radius, value + radius, 40):
        made = net.run(x, edits=patch(str(site), moved)).output
        assert_holds(crown, made, 1e-12)
    assert crown.holds == "the reals"


def test_spiking_is_refused_by_name() -> None:
    net, x = opened("spiking")
    with pytest.raises(BoundError, match=r"at 'Spike.*has no bound rule.*docs/bounds.md"):
        net.bound(x[:1], 0.01)


@pytest.mark.parametrize("method", ["interval", "forward", "forward+crown", "crown", "alpha"])
def test_every_method_encloses_samples(method: str) -> None:
    """10^4 samples; radius 0 encloses the float64 value; float32 says what it holds over."""
    net, x = mlp()
    found = net.bound(x, 0.1, method=method)
    module = net.module.double()
    try:
        low, high = x.double() - 0.1, x.double() + 0.1
        assert_holds(found, module(corners(low, high, 10_000).flatten(0, 1)).unflatten(0, (-1, 3)))
        assert_holds(net.bound(x, 0.0, method=method), module(x.double()))
    finally:
        net.module.float()
    rough = net.bound(x, 0.1, method=method, dtype="float32")
    assert rough.holds == "float32 arithmetic, without allowance for rounding"
    torch.testing.assert_close(
        rough.tensors.lower.double(), found.tensors.lower, rtol=1e-4, atol=1e-4
    )
    assert found.lower.dims == ("batch", "unit")


def test_methods_in_order_and_smaller_sets() -> None:
    net, x = mlp()
    interval, crown, alpha = (net.bound(x, 0.1, method=m) for m in ("interval", "crown", "alpha"))
    assert_within(crown, interval)
    assert_within(alpha, crown)
    assert float((alpha.upper - alpha.lower).sum()) < float((crown.upper - crown.lower).sum())
    for method in ("interval", "crown", "alpha"):
        assert_within(net.bound(x, 0.05, method=method), net.bound(x, 0.1, method=method))
    assert_within(net.bound(x, Ball(x, 0.1, 1)), net.bound(x, Ball(x, 0.1, 2)))
    assert_within(net.bound(x, Ball(x, 0.1, 2)), net.bound(x, Box(x - 0.1, x + 0.1)))


def test_weights_and_hidden_values() -> None:
    """Several weights at once with the input, a hidden site, and a part of one."""
    net, x = mlp()
    named = dict(net.module.named_parameters())
    moving = {"input": 0.05, "0.weight": 0.02, "2.bias": 0.1}
    for method in ("interval", "crown", "forward+crown"):
        found = net.bound(x, moving, method=method)
        for _ in range(100):
            changed = {
                name: (w + (torch.rand_like(w) * 2 - 1).sign() * moving.get(name, 0.0)).detach()
                for name, w in named.items()
            }
            at = x + (torch.rand_like(x) * 2 - 1) * 0.05
            assert_holds(found, torch.func.functional_call(net.module, changed, (at,)), 1e-5)
    hidden = net.run(x, record="1").acts.tensor("1")
    part = Around(0.3, where={"unit": [1, 2]})
    for spec, mask in ((0.3, torch.ones(8)), (part, torch.eye(8)[1] + torch.eye(8)[2])):
        found = net.bound(x, {"1": spec})
        for move in corners(hidden - 0.3 * mask, hidden + 0.3 * mask, 200):
            assert_holds(found, net.run(x, edits=patch("1", move)).output, 1e-5)
    assert_within(net.bound(x, {"1": part}), net.bound(x, {"1": 0.3}))


def test_a_set_for_each_example() -> None:
    """Examples bounded side by side are bounded as each alone."""
    net, x = mlp()
    together = net.bound(x, Ball(x, torch.tensor([0.1, 0.2, 0.3]), 2))
    for i in range(3):
        alone = net.bound(x[i : i + 1], Ball(x[i : i + 1], 0.1 * (i + 1), 2))
        # near, not equal: what is undecided in one box is looked at in all
        torch.testing.assert_close(
            together.tensors.lower[i], alone.tensors.lower[0], rtol=1e-2, atol=1e-2
        )


def test_rows_and_linear_bounds() -> None:
    """Margins of the predicted class, the same for all or one set for each example."""
    net, x = mlp()
    rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    found = net.bound(x, 0.1, rows=rows, linear=True)
    assert found.lower.dims == ("batch", "row")
    apart = net.bound(x, 0.1, rows=rows.expand(3, 2, 3))
    torch.testing.assert_close(found.tensors.lower, apart.tensors.lower)
    assert found.below is not None
    assert found.above is not None
    for at in corners(x - 0.1, x + 0.1, 100):
        margin = net.module(at) @ rows.T
        flat = at.double()[:, None, None]
        for side, sign in ((found.below, 1), (found.above, -1)):
            line = (side.rows["input"] * flat).flatten(2).sum(2) + side.constant
            assert bool((sign * (margin - line) >= -1e-5).all())
    loose = net.bound(x, 0.1)
    simple = loose.tensors.lower[:, :1] - loose.tensors.upper[:, 1:2]
    assert bool((found.tensors.lower[:, :1] > simple).all())


def test_a_hidden_site_is_bounded_and_restricted() -> None:
    """An activation pattern: units that are off or on, with everything else as it follows."""
    net, x = mlp()
    site = net.bound(x, 0.2, output="1")
    assert site.lower.dims == ("batch", "unit")
    at = corners(x - 0.2, x + 0.2, 3000)
    assert_holds(site, torch.relu(net.module[0](at)), 1e-5)
    free = net.bound(x, 0.2, method="interval")
    open_ = (site.tensors.lower <= 1e-9) & (site.tensors.upper > 0)
    unit = int(open_.all(0).nonzero()[0])
    low, high = torch.full((8,), -math.inf), torch.full((8,), math.inf)
    high[unit] = 0.0
    seen = net.module[0](at)[:, :, unit] <= 0
    assert bool(seen.any())
    values = net.module(at)
    for method in ("interval", "crown", "forward", "alpha"):
        tight = net.bound(x, 0.2, restrict={"0": (low, high)}, method=method)
        assert_within(tight, free)
        assert float((tight.upper - tight.lower).sum()) < float((free.upper - free.lower).sum())
        side = tight.tensors
        kept = ((values >= side.lower - 1e-5) & (values <= side.upper + 1e-5)).all(2)
        assert bool(kept[seen].all())
    with pytest.raises(BoundError, match="nothing in the perturbed set meets"):
        net.bound(x, 0.01, restrict={"0": (50.0, 60.0)})
    with pytest.raises(BoundError, match="the restriction of '0' is empty"):
        net.bound(x, 0.01, restrict={"0": (2.0, 1.0)})


EDITS = [
    zero("1", unit=[0, 3]),
    clamp("1", 0.7, unit=2),
    clamp("1", low=0.1, high=0.4),
    patch("3", torch.linspace(-1, 1, 6)),
    patch("1", torch.linspace(-1, 1, 24).reshape(3, 8)),
    mean("1", torch.rand(5, 8)),
    steer("1", torch.linspace(-1, 1, 8), 0.5),
    scale("1", 0.5, unit=[1, 2]),
    [zero("1", unit=[0, 1]), scale("3", -1.0), clamp("3", high=0.2, unit=4)],
    zero(":input", unit=1),
]


@pytest.mark.parametrize(
    "edits", EDITS, ids=lambda e: str(e[0].kind if isinstance(e, list) else e.kind)
)
def test_edited_networks(edits: object) -> None:
    """Bounds of the edited network hold what edited runs give, at a point and around it."""
    net, x = mlp()
    found = net.bound(x, {"4.bias": 0.0}, edits=edits)  # type: ignore[arg-type]  # one or several
    assert_holds(found, net.run(x, edits=edits).output, 1e-5)  # type: ignore[arg-type]  # as above
    if not isinstance(edits, list) and edits.kind in ("patch", "mean"):
        with pytest.raises(BoundError, match="does not depend on what is perturbed"):
            net.bound(x, 0.1, edits=edits)
        return  # everything is replaced: nothing perturbed reaches the output
    around = net.bound(x, 0.1, edits=edits)  # type: ignore[arg-type]  # as above
    plain = net.bound(x, 0.1)
    for at in corners(x - 0.1, x + 0.1, 50):
        assert_holds(around, net.run(at, edits=edits).output, 1e-5)  # type: ignore[arg-type]  # as above
    assert not torch.equal(around.tensors.lower, plain.tensors.lower)


@pytest.mark.parametrize(
    "edit", [mean("1"), resample("1"), noise("1", 0.1), resample("1", torch.rand(4, 8))]
)
def test_edits_without_a_rule(edit: object) -> None:
    net, x = mlp()
    with pytest.raises(EditError, match="cannot be bounded; expected zero, patch, clamp"):
        net.bound(x, 0.1, edits=edit)  # type: ignore[arg-type]  # an edit


def test_heads_and_patterns_of_attention() -> None:
    """A head is perturbed alone; a fused attention is written out for its pattern."""
    x = torch.randn(2, 3, 16)
    net = patchclamp.open(Attend("fused").eval(), x)
    head = {"attn.0.z": Around(0.1, where={"head": 1})}
    found, pattern = net.bound(x, head), net.bound(x, 0.02, output="attn.0.pattern")
    value = net.run(x, record="attn.0.z").acts.tensor("attn.0.z")
    mask = torch.zeros_like(value)
    mask[:, 1] = 0.1
    for at in corners(value - mask, value + mask, 50):
        assert_holds(found, net.run(x, edits=patch("attn.0.z", at)).output, 1e-5)
    assert pattern.lower.dims == ("batch", "head", "query", "key")
    for at in corners(x - 0.02, x + 0.02, 50):
        assert_holds(pattern, net.record(at, "attn.0.pattern").tensor("attn.0.pattern"), 1e-6)
    assert float((pattern.upper - pattern.lower).max()) < 0.5
    moved = net.bound(x, {"attn.0.pattern": 0.01})
    assert_holds(moved, net.run(x).output, 1e-5)


def test_substituted_words() -> None:
    """All texts with one word exchanged stay inside; more exchanged words can do more."""
    net, ids = small("tiny_lm")
    words = net.module.embed.weight.detach()
    base = words[ids]
    near = base[:, :, None] + torch.randn(2, 2, 2, 4, dtype=torch.float64) * 2e-4
    found = net.bound(ids, {"embed": Substitutions(base, near, None, 1)})
    for position in range(2):
        for word in range(2):
            text = base.clone()
            text[:, position] = near[:, position, word]
            assert_holds(found, net.run(ids, edits=patch("embed", text)).output, 1e-12)
    assert_within(found, net.bound(ids, {"embed": Substitutions(base, near, None, 2)}))


def test_transformer_at_several_radii() -> None:
    """Sound everywhere; decided at a small radius; at a large one wide, and not wrong."""
    net, ids = small("tiny_lm")
    value = net.run(ids, record="embed").acts.tensor("embed")
    logits = net.run(ids).output[:, -1]
    top, second = logits.topk(2, 1).indices.T
    rows = torch.zeros(2, 1, 2, 11)
    rows[torch.arange(2), 0, -1, top] = 1
    rows[torch.arange(2), 0, -1, second] = -1
    decided = []
    for radius in (1e-5, 1e-3, 0.3):
        found = net.bound(ids, {"embed": radius}, rows=rows)
        for at in corners(value - radius, value + radius, 40):
            made = net.run(ids, edits=patch("embed", at)).output
            margin = torch.einsum("brpv,bpv->br", rows.double(), made)
            assert_holds(found, margin, 1e-12)
        decided.append(bool((found.tensors.lower > 0).all()))
    assert decided[0]
    assert not decided[-1]


REFUSED: list[tuple[Callable[[Net, Tensor], object], type[Exception], str]] = [
    (lambda n, x: n.bound(x, -1.0), BoundError, "finite and not negative"),
    (lambda n, x: n.bound(x, math.inf), BoundError, "finite and not negative"),
    (lambda n, x: n.bound(x, {}), BoundError, "nothing is perturbed"),
    (lambda n, x: n.bound(x, {"0": "wide"}), BoundError, "perturbed by a set, or by a number"),
    (lambda n, x: n.bound(x, {"0.weigt": 0.1}), SiteError, "nearest '0.weight'"),
    (lambda n, x: n.bound(x, Box(x[:2], x[:2])), BoundError, r"wrong shape; got \(2, 4\)"),
    (lambda n, x: n.bound(x, Box(x[:, :2], x[:, :2])), BoundError, r"expected \(3 or 1, 1, 4\)"),
    (lambda n, x: n.bound(x, {"3": 0.1}, output="1"), BoundError, "does not depend on '3'"),
    (lambda n, x: n.bound(x, {"input": 0.1, "1": 0.1}), BoundError, "lies behind another"),
    (lambda n, x: n.bound(x, 0.1, rows=torch.ones(2, 4)), BoundError, "rows that do not fit"),
    (lambda n, x: n.bound(x, 0.1, method="crwn"), OptionError, "nearest 'crown'"),
    (lambda n, x: n.bound(x, 0.1, dtype="float16"), OptionError, "float64 or float32"),
    (lambda n, x: n.bound(x[:, :3], 0.1), InputError, "wrong shape"),
    (lambda n, x: n.bound(x, 0.1, edits=zero("3")), BoundError, "does not depend"),
    (
        lambda n, x: n.bound(x, {"0": 0.1}, restrict={":input": (0, 1)}),
        BoundError,
        "no restriction",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_refused(
    call: Callable[[Net, Tensor], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(*mlp())


def test_tokens_do_not_move() -> None:
    net, ids = small("tiny_lm")
    with pytest.raises(BoundError, match=r"takes no real numbers.*perturb a value behind them"):
        net.bound(ids, 0.1)
    with pytest.raises(BoundError, match="holds whole numbers"):
        net.bound(ids, {"embed:input": 0.1})


def test_it_leaves_the_network_as_found() -> None:
    net, x = mlp()
    before, state = net.hash, torch.get_rng_state()
    net.bound(x, {"0.weight": 0.1}, method="alpha")
    assert net.hash == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in net.module.parameters())


def test_a_shared_weight_moves_everywhere() -> None:
    """Under either of its names, and at every place where it is read."""
    net = patchclamp.open(Reused().eval(), torch.randn(2, 4))
    x = torch.randn(2, 4)
    found = net.bound(x, {"lin.weight": 0.05})
    weight = net.module.lin.weight.detach()
    for _ in range(50):
        moved = weight + (torch.rand_like(weight) - 0.5).sign() * 0.05
        made = torch.func.functional_call(net.module, {"lin.weight": moved}, (x,))
        assert_holds(found, made, 1e-5)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).eval()
    tied[2].weight = tied[0].weight
    net = patchclamp.open(tied, torch.randn(2, 3))
    first, second = (net.bound(torch.ones(2, 3), {f"{n}.weight": 0.1}).tensors for n in (0, 2))
    assert torch.equal(first.lower, second.lower)
    assert float((first.upper - first.lower).min()) > 0.3


def test_forward_names_what_it_knows_by_intervals_only() -> None:
    net, ids = small("tiny_lm")
    found = net.bound(ids, {"embed": 1e-5}, method="forward")
    assert any("attention" in name for name in found.constants), found.constants
    assert mlp()[0].bound(mlp()[1], 0.1, method="forward").constants == ()

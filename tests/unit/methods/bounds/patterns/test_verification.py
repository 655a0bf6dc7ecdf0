"""Patterns as specifications: verdicts against an exact peer, and bounds against samples."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.slopes import SlopeSearch
from patchclamp.core.errors import BoundError, InputError, OptionError, SiteError
from patchclamp.methods.bounds.patterns import (
    CompareRegions,
    Domain,
    Outcome,
    Pattern,
    PatternAttack,
    PatternsApart,
    Prover,
    VerifyPattern,
    relu_sites,
)
from patchclamp.methods.bounds.patterns.layers import EmptyError, LayerSearch
from patchclamp.methods.bounds.patterns.network import Constrained
from patchclamp.methods.bounds.patterns.verification import margins
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.methods.bounds.search.neuron_split import NeuronSplit, Root
from patchclamp.net import Net

SIZES = [3, 7, 6, 3]
WHOLE = Domain(torch.full((3,), -1.0).double(), torch.ones(3).double())


def random_net(seed: int) -> Net:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after in pairwise(SIZES):
        linear = nn.Linear(before, after)
        with torch.no_grad():
            linear.weight.mul_(2)  # or one class would have nearly all of the inputs
        parts += [linear, nn.ReLU()]
    return patchclamp.open(nn.Sequential(*parts[:-1]).eval(), torch.zeros(2, 3))


def pattern_of(net: Net, x: Tensor, share: float) -> Pattern:
    """The states of a random part of the units at one input."""
    acts = net.record(x[None], list(relu_sites(net)))
    states = {}
    for site, z in acts.tensors():
        kept = torch.rand(z.shape[1]) < share
        states[site] = torch.where(kept, torch.where(z[0] > 0, 1, -1), 0).to(torch.int8)
    return Pattern(states)


def exact_least(net: Net, pattern: Pattern, row: np.ndarray, domain: Domain) -> float | None:
    """The least row . y where the pattern holds, by mixed-integer programming; None if empty.

    Variables: inputs, then z, h and a binary for each unit; |z| < 50 here.
    """
    linears = [m for m in net.module if isinstance(m, nn.Linear)]
    num_units = sum(SIZES[1:-1])
    num = 3 + 3 * num_units
    A, low, high = [], [], []
    lower = np.concatenate([domain.lower, np.full(num_units, -50), np.zeros(2 * num_units)])
    upper = np.concatenate([domain.upper, np.full(2 * num_units, 50), np.ones(num_units)])

    def add(entries: dict[int, float], lo: float, hi: float) -> None:
        A.append(np.bincount(list(entries), list(entries.values()), num))
        low.append(lo)
        high.append(hi)

    before, at = list(range(3)), 0
    for linear, states in zip(linears[:-1], pattern.states.values(), strict=True):
        now = []
        for j, state in enumerate(states.tolist()):
            z, h, b = (3 + k * num_units + at for k in range(3))
            weights = linear.weight[j].double().tolist()
            bias = float(linear.bias[j].detach())
            add({z: 1.0} | {i: -w for i, w in zip(before, weights, strict=True)}, bias, bias)
            add({h: 1, z: -1}, 0, np.inf)
            add({h: 1, z: -1, b: 50}, -np.inf, 50)  # h <= z + 50 (1 - b)
            add({h: 1, b: -50}, -np.inf, 0)
            if state > 0:
                lower[z] = 0
            if state < 0:
                upper[z] = 0
            now.append(h)
            at += 1
        before = now
    last = linears[-1]
    cost = np.zeros(num)
    cost[before] = row @ last.weight.detach().double().numpy()
    integral = np.r_[np.zeros(3 + 2 * num_units), np.ones(num_units)]
    made = milp(
        cost,
        constraints=LinearConstraint(np.array(A), low, high),
        bounds=Bounds(lower, upper),
        integrality=integral,
    )
    if made.status == 2:
        return None
    assert made.status == 0
    return float(made.fun) + float(row @ last.bias.detach().double().numpy())


def exactly(net: Net, x: Tensor) -> tuple[list[list[Fraction]], list[Fraction]]:
    """Arguments of the ReLUs and outputs at one input, without rounding."""
    held = [Fraction(v) for v in x.tolist()]
    read = []
    for m in net.module:
        if isinstance(m, nn.Linear):
            held = [
                sum((Fraction(w) * h for w, h in zip(ws, held, strict=True)), Fraction(b))
                for ws, b in zip(m.weight.tolist(), m.bias.tolist(), strict=True)
            ]
            read.append(held)
        else:
            held = [max(h, Fraction(0)) for h in held]
    return read[:-1], held


def follows_exactly(net: Net, pattern: Pattern, x: Tensor) -> bool:
    read, _ = exactly(net, x)
    return all(
        z > 0 if state > 0 else z <= 0
        for zs, states in zip(read, pattern.states.values(), strict=True)
        for z, state in zip(zs, states.tolist(), strict=True)
        if state
    )


def test_verdicts_are_those_of_mixed_integer_programming() -> None:
    seen = set()
    for seed in (1, 5, 8):
        net = random_net(seed)
        x = torch.rand(3) * 2 - 1
        label = int(net.run(x[None])[0].argmax())
        pattern = pattern_of(net, x, 0.75)
        made = VerifyPattern(prover=Prover(timeout=10)).run(net, pattern, label, WHOLE)
        assert not made.empty
        for other, decision in made.decisions.items():
            row = margins(label, [other], 3)[0].numpy()
            least = exact_least(net, pattern, row, WHOLE)
            assert least is not None
            assert decision.outcome is (Outcome.PROVED if least > 0 else Outcome.REFUTED)
            seen.add(decision.outcome)
            if decision.witness is not None:
                assert bool(WHOLE.holds(decision.witness[None]).all())
                assert follows_exactly(net, pattern, decision.witness)
                y = exactly(net, decision.witness)[1]
                assert y[label] <= y[other]
    assert seen == {Outcome.PROVED, Outcome.REFUTED}


def test_an_empty_pattern_is_plain_verification() -> None:
    net = random_net(5)
    x = torch.rand(3) * 2 - 1
    label = int(net.run(x[None])[0].argmax())
    plain = Constrained.of(net, Pattern({}))
    seen = set()
    for eps in (0.1, 1.0):
        domain = WHOLE.ball(x, eps)
        made = VerifyPattern(prover=Prover(timeout=10)).run(net, Pattern({}), label, domain)
        root = Root.of(plain.network, domain.lower, domain.upper, SlopeSearch(), rounded=True)
        for other, decision in made.decisions.items():
            row = margins(label, [other], 3)[0]
            least = exact_least(net, free(net), row.numpy(), domain)
            seen.add(decision.outcome)
            assert least is not None
            assert (decision.outcome is Outcome.PROVED) == (least > 0)
            if decision.outcome is Outcome.PROVED:
                leaves = NeuronSplit().run(
                    root,
                    row.reshape(1, 1, *plain.network.output.shape),
                    row.new_zeros(1, 1),
                    lambda leaves: [True] * len(leaves),
                    Limits(10),
                )
                assert leaves
    assert seen == {Outcome.PROVED, Outcome.REFUTED}


def free(net: Net) -> Pattern:
    sizes = zip(relu_sites(net), SIZES[1:-1], strict=True)
    return Pattern({site: torch.zeros(num, dtype=torch.int8) for site, num in sizes})


@pytest.mark.parametrize("num_steps", [0, 20])
def test_layers_enclose_every_sample_that_follows_the_pattern(num_steps: int) -> None:
    net = random_net(1)
    x = torch.rand(3) * 2 - 1
    pattern = pattern_of(net, x, 0.3)
    made = Constrained.of(net, pattern)
    root = LayerSearch(num_steps=num_steps).run(made, WHOLE, Limits(60))
    samples = WHOLE.sampled(20_000, torch.Generator().manual_seed(0))
    samples = torch.cat([samples, torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()])
    kept = samples[(made.run(samples)[1] >= 0).all(1)]
    assert 50 < len(kept) < 15_000
    held = kept
    for m, value in zip(
        net.module.double(), [v for v in made.network.values if v.rule is not None], strict=True
    ):
        held = m(held)
        if isinstance(m, nn.Linear) and value in root.places:
            lower, upper = (side.flatten() for side in root.bounds.interval(value))
            assert bool(((held >= lower) & (held <= upper)).all())


def test_multipliers_narrow_layers() -> None:
    net = random_net(1)
    made = Constrained.of(net, pattern_of(net, torch.rand(3) * 2 - 1, 0.5))
    widths = []
    for num_steps in (0, 20):
        root = LayerSearch(num_steps=num_steps).run(made, WHOLE, Limits(60))
        boxes = [root.bounds.interval(v) for v in root.places]
        widths.append(sum(float((b.upper - b.lower).sum()) for b in boxes))
    assert widths[1] < 0.95 * widths[0]


def test_balls_are_no_smaller_than_asked_for() -> None:
    whole = Domain.box(torch.zeros(100), -1.0, 1.0)
    centre = torch.rand(100).double() * 1.4 - 0.7
    ball = whole.ball(centre, 0.1)
    for low, x, high in zip(ball.lower.tolist(), centre.tolist(), ball.upper.tolist(), strict=True):
        assert Fraction(low) <= Fraction(x) - Fraction(0.1)
        assert Fraction(x) + Fraction(0.1) <= Fraction(high) <= Fraction(x) + Fraction(0.1000001)


def test_nothing_follows_a_pattern_that_cannot_be() -> None:
    """Unit 0 is 1 + x, unit 1 is -(1 + x) - 1: they are not active together."""
    module = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        module[0].bias.copy_(torch.tensor([1.0, -2.0]))
    net = patchclamp.open(module, torch.zeros(2, 1))
    (site,) = relu_sites(net)
    domain = Domain.box(torch.zeros(1), -9.0, 9.0)
    both = Pattern({site: torch.tensor([1, 1], dtype=torch.int8)})
    made = VerifyPattern().run(net, both, 0, domain)
    assert made.outcome is Outcome.PROVED
    one = Pattern({site: torch.tensor([1, 0], dtype=torch.int8)})
    other = Pattern({site: torch.tensor([0, 1], dtype=torch.int8)})
    apart = PatternsApart().run(net, one, other, (0, 1), domain)
    assert apart.outcome is Outcome.PROVED
    with pytest.raises(EmptyError):
        LayerSearch().run(
            Constrained.of(net, other), Domain.box(torch.zeros(1), 0.0, 9.0), Limits(9)
        )


def test_patterns_are_told_apart_or_a_witness_follows_both() -> None:
    net = random_net(2)
    x = torch.rand(3) * 2 - 1
    first, second = pattern_of(net, x, 0.4), pattern_of(net, x, 0.4)
    made = PatternsApart().run(net, first, second, (0, 1), WHOLE)
    assert made.outcome is Outcome.REFUTED
    assert made.witness is not None
    assert follows_exactly(net, first.joined(second), made.witness)
    opposite = Pattern({site: -states for site, states in first.states.items()})
    clash = PatternsApart().run(net, first, opposite, (0, 1), WHOLE)
    assert clash.outcome is Outcome.PROVED
    assert "clash" in clash.reason
    with pytest.raises(OptionError, match="one class"):
        PatternsApart().run(net, first, second, (1, 1), WHOLE)


def test_a_search_without_time_says_nothing() -> None:
    net = random_net(0)
    made = VerifyPattern(prover=Prover(timeout=0.0)).run(net, Pattern({}), 0, WHOLE)
    assert made.outcome is Outcome.UNKNOWN
    assert {d.outcome for d in made.decisions.values()} == {Outcome.UNKNOWN}


def test_regions_beside_a_ball() -> None:
    net = random_net(5)
    x = torch.rand(3) * 2 - 1
    label = int(net.run(x[None])[0].argmax())
    pattern = pattern_of(net, x, 1.0)
    held_out = torch.cat([x + 0.3 * torch.randn(30, 3), x[None]]).clamp(-1, 1)
    compare = CompareRegions(
        largest=1.0,
        tolerance=0.3,
        num_samples=500,
        verify=VerifyPattern(attack=PatternAttack(num_steps=30)),
    )
    made = compare.run(net, pattern, label, x, held_out, WHOLE)
    assert made.with_pattern.eps >= made.ball.eps > 0
    constrained = Constrained.of(net, pattern)
    assert made.recall_pattern.hits == int(
        (constrained.run(held_out.double())[1] >= 0).all(1).sum()
    )
    inside = (held_out - x).abs().amax(1) <= made.ball.eps
    assert made.recall_ball.hits == int(inside.sum()) >= 1
    assert made.recall_both.hits <= made.recall_pattern.hits
    assert made.ball.failed is not None
    with pytest.raises(InputError, match="of the class"):
        compare.run(net, pattern, (label + 1) % 3, x, held_out, WHOLE)


def test_what_is_refused() -> None:
    net = random_net(0)
    first = relu_sites(net)[0]
    verify = VerifyPattern()
    with pytest.raises(SiteError, match="no ReLU reads"):
        verify.run(net, Pattern({":output": torch.ones(3, dtype=torch.int8)}), 0, WHOLE)
    with pytest.raises(InputError, match="number of units"):
        verify.run(net, Pattern({first: torch.ones(5, dtype=torch.int8)}), 0, WHOLE)
    with pytest.raises(InputError, match="no class 3"):
        verify.run(net, Pattern({}), 3, WHOLE)
    with pytest.raises(InputError, match="another size"):
        verify.run(net, Pattern({}), 0, Domain.box(torch.zeros(4), 0.0, 1.0))
    with pytest.raises(BoundError, match="empty"):
        Domain.box(torch.zeros(3), 1.0, 0.0)
    with pytest.raises(InputError, match="ball"):
        WHOLE.ball(torch.zeros(3), -1.0)
    with pytest.raises(OptionError, match="nothing to try"):
        CompareRegions(largest=0.1, tolerance=0.1)

"""Certified and attacked radii: closed forms, contracts, and what must stay unproved."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.ways import Method
from patchclamp.core.errors import BoundError, EngineError, InputError
from patchclamp.methods.bounds.margins import Classifier
from patchclamp.methods.bounds.nearest_attack import NearestAttack
from patchclamp.methods.bounds.radius import CertifiedRadius, RadiusResult
from patchclamp.net import Net
from patchclamp.rules.base import Interval
from tests.networks import opened

UP_TO_CROWN = (Method.INTERVAL, Method.FORWARD_CROWN, Method.CROWN)
QUICK = CertifiedRadius(methods=UP_TO_CROWN, attack=NearestAttack(num_rounds=8))


class Spike(nn.Module):
    """Class 0 everywhere but where the first input passes `at`: margin 1 - 10 relu(x0 - at)."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        fall = 10 * torch.relu(x[:, :1] - self.at)
        return torch.cat([1 - fall, torch.zeros_like(fall)], 1)


class Unruled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x, 1)


def mlp(seed: int) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU())
    x = torch.rand(6, 5)
    return patchclamp.open(nn.Sequential(*module, nn.Linear(10, 4)).eval(), x), x


def linear_radii(module: nn.Linear, x: Tensor) -> Tensor:
    """margin / ||w_i - w_j||_1, the smallest over j."""
    w, b, x = module.weight.double(), module.bias.double(), x.double()
    y = x @ w.T + b
    c = y.argmax(1)
    margin = y.gather(1, c[:, None]) - y
    norm = (w[c][:, None] - w[None]).abs().sum(2)
    return (margin / norm.clamp(min=1e-300)).scatter(1, c[:, None], torch.inf).amin(1)


def radii(result: RadiusResult) -> tuple[list[float | None], list[float | None]]:
    return [r.certified for r in result.rows], [r.attacked for r in result.rows]


def test_the_radius_of_a_linear_classifier_is_the_closed_form() -> None:
    torch.manual_seed(3)
    module, x = nn.Linear(7, 5).eval(), torch.randn(12, 7)
    with torch.no_grad():
        expected = linear_radii(module, x)
    method = dataclasses.replace(QUICK, max_radius=10.0, tolerance=1e-7)
    result = method.run(patchclamp.open(module, x), x)
    for row, radius in zip(result.rows, expected.tolist(), strict=True):
        assert row.certified is not None
        assert row.attacked is not None
        assert radius - 1e-6 <= row.certified <= radius
        assert radius < row.attacked <= 1.01 * radius + 1e-6


def test_limits_of_pixels_make_larger_radii_provable() -> None:
    """Class 0 as long as x0 + x1 < 1.5 and x0 is at most 1: no x1 within [0, 0.5] changes it."""
    module = nn.Linear(2, 2).eval()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
        module.bias.copy_(torch.tensor([1.6, 0.0]))
    x = torch.tensor([[0.5, 0.25]])
    net = patchclamp.open(module, x)
    exact = CertifiedRadius(max_radius=2.0, tolerance=1e-7)
    free = exact.run(net, x).rows[0]
    within = (torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.5]))
    kept = exact.run(net, x, within=within).rows[0]
    assert free.certified == pytest.approx(0.425, abs=1e-6)
    assert free.attacked is not None
    assert (kept.certified, kept.attacked) == (2.0, None)
    with pytest.raises(InputError, match="outside the range"):
        QUICK.run(net, x, within=(torch.tensor(0.0), torch.tensor(0.4)))


def test_a_row_of_another_class_has_no_certified_radius() -> None:
    net, x = mlp(0)
    right = Classifier(net, net.call(x)).live(Classifier(net, net.call(x)).points())
    wrong = (right + 1) % 4
    for row in QUICK.run(net, x, labels=wrong).rows:
        assert not row.is_right
        assert row.certified is None
        assert row.attacked == 0.0
    assert all(r.certified for r in QUICK.run(net, x, labels=right).rows)


@pytest.mark.parametrize("at", [0.05, 0.3])
def test_a_planted_change_bounds_the_radius_from_above(at: float) -> None:
    x = torch.zeros(2, 3)
    result = QUICK.run(patchclamp.open(Spike(at).eval(), x), x)
    for row in result.rows:
        assert row.certified is not None
        assert row.attacked is not None
        assert 0 < row.certified < at + 0.1 < row.attacked < at + 0.102
        assert row.certified >= at + 0.098, "one undecided ReLU is exact behind a box"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_certified_is_below_attacked_and_holds_on_samples(seed: int) -> None:
    net, x = mlp(seed)
    result = CertifiedRadius(max_radius=2.0).run(net, x)
    generator = torch.Generator().manual_seed(seed)
    for i, row in enumerate(result.rows):
        assert row.certified is not None
        assert row.attacked is None or row.certified < row.attacked
        moves = torch.rand(2000, 5, generator=generator) * 2 - 1
        moves[:1000] = moves[:1000].sign()
        near = x[i : i + 1] + 0.9999 * row.certified * moves
        assert bool((net.run(near).output.argmax(1) == row.label).all())
    assert any(r.certified for r in result.rows)


def test_an_attacked_point_changes_the_class_of_the_live_network() -> None:
    net, x = opened("digits_mlp")
    result = QUICK.run(net, x, within=(torch.tensor(0.0), torch.tensor(1.0)))
    assert result.points
    for i, point in result.points.items():
        row = result.rows[i]
        assert row.attacked is not None
        assert point.shape == x[i].shape
        assert int(net.run(point[None]).output.argmax(1)) != row.label
        assert float((point.double() - x[i].double()).abs().max()) <= row.attacked
        assert 0 <= float(point.min()) <= float(point.max()) <= 1


def test_tighter_methods_never_lose_a_radius() -> None:
    net, x = mlp(4)
    first = before = [0.0] * len(x)
    for num in range(1, 4):
        found = dataclasses.replace(QUICK, methods=UP_TO_CROWN[:num]).run(net, x)
        now = [r.certified or 0.0 for r in found.rows]
        assert all(b <= a + 0.03 * a for b, a in zip(before, now, strict=True))
        first = now if num == 1 else first
        before = now
    assert any(b > a for a, b in zip(first, before, strict=True))


def test_without_time_nothing_is_known_and_it_is_said() -> None:
    net, x = mlp(0)
    result = QUICK.run(net, x, seconds=0.0)
    assert radii(result) == ([0.0] * 6, [None] * 6)
    assert not any(r.searched for r in result.rows)
    assert result.left_out == {"attack": 6, "interval": 6, "forward+crown": 6, "crown": 6}


def test_the_same_seed_gives_the_same_radii() -> None:
    net, x = mlp(1)
    assert QUICK.run(net, x).rows == QUICK.run(net, x).rows


def test_a_wrong_bound_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack contradicts a bound that lets too much through."""
    bound = Classifier.bound

    def too_high(
        self: Classifier, box: Interval, rows: Tensor, method: Method, *, rounded: bool = True
    ) -> Interval:
        found = bound(self, box, rows, method, rounded=rounded)
        radius = float((box.upper - box.lower).max()) / 2
        return Interval(found.lower + 100 * radius, found.upper)

    net, x = mlp(0)
    monkeypatch.setattr(Classifier, "bound", too_high)
    with pytest.raises(EngineError, match="was proved to keep its class"):
        dataclasses.replace(QUICK, max_radius=4.0).run(net, x)


def test_networks_that_are_no_classifiers_of_real_numbers_are_refused() -> None:
    net, tokens = opened("tiny_lm")
    with pytest.raises(InputError, match="real numbers"):
        QUICK.run(net, tokens)
    x = torch.rand(2, 3)
    with pytest.raises(BoundError, match="cumprod"):
        QUICK.run(patchclamp.open(Unruled().eval(), x), x)
    net, x = mlp(0)
    with pytest.raises(InputError, match="labels must be classes"):
        QUICK.run(net, x, labels=torch.full((6,), 4))
    with pytest.raises(InputError, match="one number for each row"):
        QUICK.run(net, x, labels=torch.zeros(5))

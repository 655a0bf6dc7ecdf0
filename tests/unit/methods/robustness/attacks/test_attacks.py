"""Every attack against the closed form of linear classifiers, and where it must find nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.bounding.ways import Method
from patchclamp.data import load_data
from patchclamp.methods.bounds.nearest_attack import NearestAttack
from patchclamp.methods.bounds.radius import CertifiedRadius
from patchclamp.methods.robustness.attacks.apgd import APGD, checkpoints
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack
from patchclamp.methods.robustness.attacks.boundary import Boundary
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.fgsm import FGSM
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.robustness.attacks.sparse import SparseSearch
from patchclamp.methods.robustness.attacks.square import Square, pyramids
from patchclamp.net import Net
from tests.unit.methods.robustness.attacks.linear import difference, linear

ALL: tuple[Attack, ...] = (
    FGSM(),
    PGD(num_restarts=2),
    PGD(loss=Loss.MARGIN, momentum=0.75),
    APGD(num_steps=10),
    APGD(num_steps=10, loss=Loss.DLR),
    APGD(num_steps=10, loss=Loss.DLR, num_targets=3),
    Square(num_queries=40),
    SparseSearch(num_queries=40),
    Boundary(num_steps=20),
)
EACH = [(a, norm) for a in ALL for norm in a.norms]
RADII = {Norm.LINF: 0.05, Norm.L2: 0.2, Norm.L0: 2.0}


def some(num: int = 12, size: int = 8) -> Tensor:
    return torch.rand(num, size, generator=torch.Generator().manual_seed(7))


def worst(x: Tensor, w: Tensor, b: Tensor, norm: Norm, radius: float) -> Tensor:
    """The smallest margin w x + b over the ball within [0, 1], (n,)."""
    margin = (x * w).sum(1) + b
    room = torch.where(w > 0, x, 1 - x)  # how far each element may go down its own way
    if norm is Norm.LINF:
        return margin - (w.abs() * room.clamp(max=radius)).sum(1)
    if norm is Norm.L0:
        return margin - (w.abs() * room).topk(int(radius), 1).values.sum(1)
    low, high = torch.zeros(len(x), 1), torch.full((len(x), 1), 1e3)
    for _ in range(80):  # the multiplier by bisection
        middle = (low + high) / 2
        size = torch.minimum(middle * w.abs(), room).norm(dim=1, keepdim=True)
        low, high = (
            torch.where(size <= radius, middle, low),
            torch.where(size > radius, middle, high),
        )
    return margin - (w.abs() * torch.minimum(low * w.abs(), room)).sum(1)


CLOSED = [
    (PGD(num_steps=30, step=0.5, random_start=False), Norm.LINF, 1e-5),
    (FGSM(), Norm.LINF, 1e-5),
    (APGD(num_steps=30), Norm.LINF, 1e-5),
    (APGD(num_steps=30, loss=Loss.MARGIN), Norm.LINF, 1e-5),
    (Square(num_queries=200), Norm.LINF, 1e-5),
    (PGD(num_steps=30, step=0.5, random_start=False), Norm.L2, 1e-4),
    (APGD(num_steps=40, loss=Loss.MARGIN), Norm.L2, 1e-3),
    (FGSM(), Norm.L0, 1e-5),
    (PGD(num_steps=5), Norm.L0, 1e-5),
    (SparseSearch(num_queries=300), Norm.L0, 1e-5),
]


@pytest.mark.parametrize(("attack", "norm", "slack"), CLOSED, ids=lambda v: getattr(v, "name", v))
def test_linear_classifiers_closed_form(attack: Attack, norm: Norm, slack: float) -> None:
    """Rows that cannot be broken are attacked to the end: their margin is the exact minimum."""
    x = some()
    classifier, layer, labels = linear(x, within=(0.0, 1.0))
    with torch.no_grad():  # a large margin that nothing overcomes
        layer.bias[0] += 8  # and at which the cross-entropy in float32 is not saturated yet
    labels = torch.zeros_like(labels)
    exact = worst(x, *difference(layer, labels), norm, RADII[norm])
    found = attack.run(classifier, x, labels, RADII[norm], norm=norm)
    assert not bool(found.is_broken.any())
    assert bool((found.margins >= exact - 1e-4).all())  # never below what is possible
    assert bool((found.margins <= exact + slack + 1e-5).all())


@pytest.mark.parametrize(("attack", "norm", "slack"), CLOSED, ids=lambda v: getattr(v, "name", v))
def test_linear_classifiers_are_broken_exactly_where_they_can_be(
    attack: Attack, norm: Norm, slack: float
) -> None:
    x = some(40)
    classifier, layer, _ = linear(x, within=(0.0, 1.0))
    with torch.no_grad():
        layer.bias[0] += 2.0 if norm is Norm.L0 else 0.0  # so that some rows hold
        labels = layer(x).argmax(1)
    exact = worst(x, *difference(layer, labels), norm, RADII[norm])
    found = attack.run(classifier, x, labels, RADII[norm], norm=norm)
    assert 0 < int((exact < 0).sum()) < 40
    assert not bool((found.is_broken & (exact > 1e-5)).any())
    assert bool(found.is_broken[exact < -slack - 1e-5].all())
    assert bool((found.classes[found.is_broken] == 1 - labels[found.is_broken]).all())


def test_square_in_l2_comes_near_the_exact_minimum() -> None:
    """A random search is not exact: of what can be gained it gains most."""
    x = some()
    classifier, layer, labels = linear(x, within=(0.0, 1.0))
    with torch.no_grad():
        layer.bias[0] += 8
    labels = torch.zeros_like(labels)
    w, b = difference(layer, labels)
    margin, exact = (x * w).sum(1) + b, worst(x, w, b, Norm.L2, 0.2)
    found = Square(num_queries=100).run(classifier, x, labels, 0.2, norm=Norm.L2)
    gained = (margin - found.margins) / (margin - exact)
    assert float(gained.max()) <= 1 + 1e-5
    assert float(gained.min()) >= 0.5
    assert float(gained.median()) >= 0.75


def test_the_boundary_attack_nears_the_distance_to_a_plane() -> None:
    x = some(12, 4)
    classifier, layer, labels = linear(x, within=(-2.0, 3.0))
    w, b = difference(layer, labels)
    exact = ((x * w).sum(1) + b) / w.norm(dim=1)
    found = Boundary(num_steps=400).run(classifier, x, labels, 1.05 * exact.double(), norm=Norm.L2)
    assert found.accuracy == 0
    assert bool((found.distances >= exact.double() - 1e-6).all())
    less = Boundary(num_steps=100).run(classifier, x, labels, 0.99 * exact.double(), norm=Norm.L2)
    assert less.accuracy == 1


@pytest.mark.parametrize(("attack", "norm"), EACH, ids=lambda v: getattr(v, "name", v))
def test_radius_nought_changes_nothing(attack: Attack, norm: Norm) -> None:
    x = some(6)
    classifier, _, labels = linear(x, 5, within=(0.0, 1.0))
    found = attack.run(classifier, x, labels, 0.0, norm=norm)
    assert torch.equal(found.points, x)
    assert found.accuracy == 1
    wrong = attack.run(classifier, x, (labels + 1) % 5, 0.0, norm=norm)
    assert wrong.accuracy == 0
    assert torch.equal(wrong.points, x)


class Constant(nn.Module):
    """The same logits for everything, through a path that has a gradient of 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.sum(1, keepdim=True) + torch.tensor([1.0, 0.0, 0.5, 0.2])


@pytest.mark.parametrize(("attack", "norm"), EACH, ids=lambda v: getattr(v, "name", v))
def test_a_constant_classifier_cannot_be_broken(attack: Attack, norm: Norm) -> None:
    x = some(5)
    classifier = Classifier.open(patchclamp.open(Constant().eval(), x), x, within=(0.0, 1.0))
    found = attack.run(classifier, x, torch.zeros(5, dtype=torch.long), 4.0, norm=norm)
    assert found.accuracy == 1
    assert bool(torch.isfinite(found.margins).all())


@pytest.fixture(scope="module")
def digits() -> tuple[Net, Tensor, Tensor]:
    data = load_data("digits")
    assert data.labels is not None
    return patchclamp.open("digits-mlp"), data.inputs[:24], data.labels[:24]


@pytest.mark.parametrize(("attack", "norm"), EACH, ids=lambda v: getattr(v, "name", v))
def test_the_contract(digits: tuple[Net, Tensor, Tensor], attack: Attack, norm: Norm) -> None:
    """Inside ball and limits; seeded; module and global random state as found; counted."""
    net, x, y = digits
    state, flags = torch.get_rng_state(), [p.requires_grad for p in net.module.parameters()]
    classifier = Classifier.open(net, x, within=(0.0, 1.0))
    radius = torch.linspace(0.2, 1.0, 24, dtype=torch.float64) * RADII[norm]
    radius = radius.round() if norm is Norm.L0 else radius
    found = attack.run(classifier, x, y, radius, norm=norm)
    assert bool((found.distances <= radius + 1e-6).all())
    assert float(found.points.min()) >= 0
    assert float(found.points.max()) <= 1
    with torch.no_grad():
        answers = net.module(found.points).argmax(1)
    assert torch.equal(
        answers[found.is_broken] != y[found.is_broken], torch.ones_like(y[found.is_broken]).bool()
    )
    assert bool((answers[~found.is_broken] == y[~found.is_broken]).all())
    again = attack.run(classifier, x, y, radius, norm=norm)
    assert torch.allclose(again.points, found.points, atol=1e-4)  # sums differ with the batch
    assert torch.equal(again.is_broken, found.is_broken)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in net.module.parameters()] == flags
    assert all(p.grad is None for p in net.module.parameters())
    assert found.passes.forwards > 0
    assert (found.passes.backwards > 0) is attack.needs_gradient
    assert attack.source
    assert isinstance(found.options, dict)


@pytest.mark.parametrize(("attack", "norm"), EACH, ids=lambda v: getattr(v, "name", v))
def test_any_number_of_rows_at_a_time_gives_the_same(attack: Attack, norm: Norm) -> None:
    """In float64, where sums of another order do not turn a sign."""
    x = some(10).double()
    many, _, labels = linear(x, 5, within=(0.0, 1.0))
    few = Classifier.open(many.net, x, within=(0.0, 1.0), memory=1)
    a, b = (attack.run(c, x, labels, RADII[norm], norm=norm) for c in (many, few))
    assert torch.allclose(a.points, b.points, atol=1e-9)
    assert torch.equal(a.is_broken, b.is_broken)
    assert (a.passes.forwards, a.passes.backwards) == (b.passes.forwards, b.passes.backwards)


@pytest.mark.parametrize(
    "attack",
    [FGSM(), PGD(num_steps=20), APGD(num_steps=20, loss=Loss.MARGIN), Square(num_queries=300)],
    ids=lambda a: a.name,
)
def test_targets_are_reached_or_not_counted(attack: Attack) -> None:
    x = some(12)
    classifier, layer, labels = linear(x, 3, within=(0.0, 1.0))
    targets = (labels + 1) % 3
    found = attack.run(classifier, x, labels, 1.0, targets=targets)
    assert torch.equal(found.classes == targets, found.is_broken)
    # At radius 1 every corner is allowed; where one reaches the target, so do these attacks
    # for the most part, and what no corner reaches must not be counted.
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    y = layer(corners).detach()
    can = torch.tensor([bool((y.argmax(1) == t).any()) for t in targets.tolist()])
    assert not bool((found.is_broken & ~can).any())
    assert int(found.is_broken.sum()) >= 0.7 * int(can.sum())


def test_certified_radii_are_never_broken(digits: tuple[Net, Tensor, Tensor]) -> None:
    net, x, y = digits
    x, y = x[:4], y[:4]
    proof = CertifiedRadius(
        methods=(Method.INTERVAL,),
        max_radius=0.3,
        attack=NearestAttack(num_samples=8, num_restarts=1, num_steps=2, num_rounds=1),
    ).run(net, x, labels=y, within=(torch.tensor(0.0), torch.tensor(1.0)))
    certified = torch.tensor([row.certified or 0.0 for row in proof.rows], dtype=torch.float64)
    right = torch.tensor([row.is_right for row in proof.rows])
    assert float(certified[right].min()) > 0.002
    classifier = Classifier.open(net, x, within=(0.0, 1.0))
    for attack in ALL:
        if Norm.LINF in attack.norms:
            assert not bool(attack.run(classifier, x, y, certified).is_broken[right].any())
    far = APGD(num_steps=20).run(classifier, x, y, 20 * certified)  # and they could be
    assert bool(far.is_broken[right].any())


def test_rows_that_are_broken_drop_out(digits: tuple[Net, Tensor, Tensor]) -> None:
    net, x, y = digits
    classifier = Classifier.open(net, x, within=(0.0, 1.0))
    easy = PGD(num_steps=50).run(classifier, x, y, 0.5)
    hard = PGD(num_steps=50).run(classifier, x, y, 1e-4)
    assert easy.accuracy == 0
    assert easy.passes.backwards < 0.3 * hard.passes.backwards
    assert hard.passes.backwards <= 50 * 24


def test_pgd_10_takes_ten_gradients(digits: tuple[Net, Tensor, Tensor]) -> None:
    net, x, _ = digits
    y = net.module(x).argmax(1)
    classifier = Classifier.open(net, x)
    found = PGD(num_steps=10).run(classifier, x, y, 1e-5)
    assert found.passes.backwards == 10 * 24
    assert found.passes.forwards == 13 * 24
    plain = PGD(num_steps=10, random_start=False).run(classifier, x, y, 1e-5)
    assert plain.passes.forwards == 12 * 24


def test_the_checkpoints_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_pyramids_are_of_norm_one_and_of_two_signs() -> None:
    for height, width in ((1, 1), (5, 5), (4, 6), (1, 7)):
        made = pyramids(height, width)
        assert made.shape == (height, width)
        assert float(made.norm()) == pytest.approx(1)
        assert (float(made.min()) < 0) is (width > 1)


def test_square_moves_squares(digits: tuple[Net, Tensor, Tensor]) -> None:
    """From the first stripes on all elements are at the sides of the ball."""
    net, x, _ = digits
    y = net.module(x).argmax(1)
    found = Square(num_queries=3).run(Classifier.open(net, x), x, y, 1e-3)
    moved = (found.points - x).abs()[found.distances > 0]
    assert len(moved) > 10
    assert torch.allclose(moved, torch.full_like(moved, 1e-3), atol=1e-6)


class Fickle(nn.Module):
    """Wrong in its first runs, right ever after."""

    left = 0

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return torch.stack([x.sum(1), x.sum(1) + (1.0 if self.left >= 0 else -1.0)], 1)


def test_only_what_a_fresh_run_confirms_counts() -> None:
    x, module, labels = some(1, 3), Fickle().eval(), torch.zeros(1, dtype=torch.long)
    classifier = Classifier.open(patchclamp.open(module, x), x)
    Square(num_queries=1).run(classifier, x, labels, 0.01)  # memory is measured once
    module.left = 1
    found = Square(num_queries=1).run(classifier, x, labels, 0.01)
    assert (found.num_unconfirmed, found.accuracy) == (1, 1.0)
    module.left = 2
    found = Square(num_queries=1).run(classifier, x, labels, 0.01)
    assert (found.num_unconfirmed, found.accuracy) == (0, 0.0)


class OfBatches(nn.Module):
    """Near a tie, of one sign in a batch and of the other alone."""

    def forward(self, x: Tensor) -> Tensor:
        shift = -1e-5 if len(x) > 1 else 1e-5
        one = 1 + 0 * x.sum(1)
        return torch.stack([one + shift, one], 1)


def test_near_ties_are_run_alone() -> None:
    x = some(7)
    classifier = Classifier.open(patchclamp.open(OfBatches().eval(), x), x)
    labels = torch.zeros(7, dtype=torch.long)
    found = FGSM().run(classifier, x, labels, 0.0)
    assert found.num_unconfirmed > 0
    assert not bool(found.is_broken.any())
    assert bool((found.margins > 0).all())

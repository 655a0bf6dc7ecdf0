"""One clear error for each thing that cannot be attacked, and nothing left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import EngineError, InputError, OptionError, TargetError
from patchclamp.methods.robustness.attacks.apgd import APGD
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task
from patchclamp.methods.robustness.attacks.boundary import Boundary
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.ensemble import Ensemble
from patchclamp.methods.robustness.attacks.fgsm import FGSM
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attacks.masking import MaskingCheck
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.robustness.attacks.sparse import SparseSearch
from patchclamp.methods.robustness.attacks.square import Square
from tests.unit.methods.robustness.attacks.linear import linear


@pytest.fixture
def rows() -> tuple[Classifier, Tensor, Tensor]:
    x = torch.rand(4, 6)
    classifier, _, labels = linear(x, 3, within=(0.0, 1.0))
    return classifier, x, labels


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([0, -1, 0, 0]),
        torch.zeros(3).long(),
        torch.zeros(4),
    ],
)
def test_labels(rows: tuple[Classifier, Tensor, Tensor], labels: Tensor) -> None:
    classifier, x, _ = rows
    with pytest.raises(TargetError, match="labels are"):
        PGD().run(classifier, x, labels, 0.1)


def test_targets(rows: tuple[Classifier, Tensor, Tensor]) -> None:
    classifier, x, labels = rows
    with pytest.raises(TargetError, match="the label itself"):
        PGD().run(classifier, x, labels, 0.1, targets=labels)
    with pytest.raises(OptionError, match="aims at those"):
        APGD(num_targets=1).run(classifier, x, labels, 0.1, targets=(labels + 1) % 3)


@pytest.mark.parametrize("radius", [-1.0, float("nan")])
def test_radii(rows: tuple[Classifier, Tensor, Tensor], radius: float) -> None:
    classifier, x, labels = rows
    for attack in (FGSM(), Square()):
        with pytest.raises(OptionError, match="not negative"):
            attack.run(classifier, x, labels, radius)
    with pytest.raises(OptionError, match="not negative"):
        MaskingCheck().run(classifier, x, labels, radius)


def test_points(rows: tuple[Classifier, Tensor, Tensor]) -> None:
    classifier, x, labels = rows
    with pytest.raises(InputError, match="outside the limits"):
        PGD().run(classifier, x + 1, labels, 0.1)
    with pytest.raises(InputError, match="NaN"):
        PGD().run(classifier, x / 0 * 0, labels, 0.1)
    with pytest.raises(InputError, match="points are not those"):
        PGD().run(classifier, x[:, :5], labels, 0.1)
    with pytest.raises(InputError, match="rows say"):
        PGD().run(classifier, torch.cat([x, x]), torch.cat([labels, labels]), 0.1)


def test_limits(rows: tuple[Classifier, Tensor, Tensor]) -> None:
    classifier, x, _ = rows
    with pytest.raises(InputError, match="smallest value, then the largest"):
        Classifier.open(classifier.net, x, within=(1.0, 0.0))
    with pytest.raises(InputError, match="smallest value, then the largest"):
        Classifier.open(classifier.net, x, within=(float("nan"), 1.0))
    with pytest.raises(InputError, match="do not fit"):
        Classifier.open(classifier.net, x, within=(torch.zeros(5), torch.ones(5)))


def test_limits_by_channel() -> None:
    """As after a normalisation that differs by channel."""
    x = torch.rand(2, 3, 2, 2)
    low, high = -torch.arange(3.0).reshape(3, 1, 1), torch.arange(1.0, 4.0).reshape(3, 1, 1)
    classifier, _, labels = linear(x, within=(low, high))  # type: ignore[arg-type]
    found = Square(num_queries=30).run(classifier, x, labels, 10.0)
    assert bool((found.points >= low).all() & (found.points <= high).all())


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 1), nn.Unflatten(1, (2, 3))], ids=["one number", "three axes"]
)
def test_no_classifier(module: nn.Module) -> None:
    x = torch.rand(2, 6)
    with pytest.raises(TargetError, match="is no classifier"):
        Classifier.open(patchclamp.open(module.eval(), x), x)


class Cut(nn.Module):
    """No gradient reaches the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.detach())
        return y


def test_no_gradient_is_one_error_and_other_attacks_work() -> None:
    x, module = torch.rand(12, 6), Cut().eval()
    classifier = Classifier.open(patchclamp.open(module, x), x, within=(0.0, 1.0))
    labels = module(x).argmax(1)
    for attack in (FGSM(), PGD(), APGD()):
        with pytest.raises(TargetError, match="no gradient of Cut reaches 'input'"):
            attack.run(classifier, x, labels, 0.5)
    assert not module._forward_hooks
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert Square(num_queries=100).run(classifier, x, labels, 1.0).accuracy < 1
    both = Ensemble.standard(Norm.LINF, 3, num_queries=100).run(classifier, x, labels, 1.0)
    refused = [t.refused is not None for t in both.tried]
    assert refused == [True, True, False]
    with pytest.raises(TargetError, match="no gradient"):
        Ensemble(attacks=(PGD(), APGD())).run(classifier, x, labels, 1.0)
    masked = MaskingCheck(num_queries=50).run(classifier, x, labels, 1.0)
    assert masked.gradient_accuracy is None
    assert [s.name for s in masked.found] == ["no gradient"]
    assert "say nothing" in masked.statement


def test_options(rows: tuple[Classifier, Tensor, Tensor]) -> None:
    classifier, x, labels = rows
    with pytest.raises(OptionError, match="does not keep to l2"):
        SparseSearch().run(classifier, x, labels, 1.0, norm=Norm.L2)
    with pytest.raises(OptionError, match="does not keep to l0"):
        Boundary().run(classifier, x, labels, 1.0, norm=Norm.L0)
    with pytest.raises(OptionError, match="targeted DLR is not defined for 3"):
        APGD(loss=Loss.DLR, num_targets=2).run(classifier, x, labels, 0.1)
    for wrong in (
        lambda: PGD(num_steps=0),
        lambda: PGD(num_restarts=2, random_start=False),
        lambda: PGD(step=0.0),
        lambda: PGD(momentum=1.0),
        lambda: APGD(num_steps=1),
        lambda: Square(num_queries=0),
        lambda: SparseSearch(share=0.0),
        lambda: Boundary(sideways=1.0),
        lambda: Ensemble(attacks=()),
        lambda: MaskingCheck(num_steps=1),
    ):
        with pytest.raises(OptionError):
            wrong()


class Overflow(nn.Module):
    """Not finite away from the data."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sum(1), 1 / (x.amax(1) <= 1).to(x.dtype)], 1)


def test_logits_that_are_not_finite_are_refused() -> None:
    x = torch.full((3, 4), 0.6)
    classifier = Classifier.open(patchclamp.open(Overflow().eval(), x), x)
    with pytest.raises(TargetError, match="not finite"):
        Square(num_queries=20).run(classifier, x, torch.zeros(3).long(), 3.0)


@dataclass(frozen=True, kw_only=True)
class Cheat(Attack):
    """Leaves the ball."""

    name: ClassVar[str] = "cheat"
    source: ClassVar[str] = "none"
    norms: ClassVar[tuple[Norm, ...]] = tuple(Norm)

    def search(self, task: Task) -> Best:
        return Best(task.points + 2e-6, torch.full((task.num,), -1.0))


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L0])
def test_an_attack_that_leaves_the_ball_is_an_error(
    rows: tuple[Classifier, Tensor, Tensor], norm: Norm
) -> None:
    classifier, x, labels = rows
    with pytest.raises(EngineError, match="left the ball"):
        Cheat().run(classifier, x * 0.5, labels, 0.0, norm=norm)

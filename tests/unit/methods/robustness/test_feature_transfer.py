"""Attacks on features where it is known which features carry over and which layer is weak."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import OptionError, SiteError, TargetError
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.feature_transfer import (
    FeatureAttack,
    Maker,
    Transfer,
    TransferBench,
)

SIZE = 32
RADIUS = 0.15


class Halves(nn.Module):
    """A body that passes the input on, centred (and rotated), and a head that reads one half."""

    def __init__(self, half: int, *, rotation: int | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 2, bias=False)
        with torch.no_grad():
            turn = torch.eye(SIZE)
            if rotation is not None:
                generator = torch.Generator().manual_seed(rotation)
                turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
            self.body.weight.copy_(turn)
            self.body.bias.copy_(-turn @ torch.full((SIZE,), 0.5))
            way = torch.zeros(SIZE)
            way[half * SIZE // 2 : (half + 1) * SIZE // 2] = 1
            self.head.weight.copy_(torch.stack([way, -way]) @ turn.T)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.body(x))
        return made


def rows(num: int = 60) -> Tensor:
    """Each half lies .02 to .12 above or below the middle."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (num, 2), generator=generator) * 2.0 - 1
    size = 0.02 + 0.1 * torch.rand((num, 2), generator=generator)
    offset = (side * size).repeat_interleave(SIZE // 2, 1)
    return 0.5 + offset + 0.02 * torch.randn((num, SIZE), generator=generator)


def opened(module: nn.Module, x: Tensor) -> Classifier:
    return Classifier.open(patchclamp.open(module.eval(), x[:1]), x, within=(0.0, 1.0))


def shown(norm: Norm = Norm.LINF, radius: float = RADIUS) -> Transfer:
    x = rows()
    pretrained, downstream = opened(Halves(0), x), opened(Halves(1), x)
    labels = downstream.answers(x, torch.arange(len(x))).argmax(1)
    bench = TransferBench(attack=FeatureAttack(sites=("body",)))
    return bench.run(pretrained, downstream, x, labels, radius, norm=norm)


def test_what_the_pretrained_head_ignores_is_attacked_too() -> None:
    found = shown()
    assert found.of(Maker.FEATURES).success >= 0.95
    assert found.of(Maker.LOGITS).success <= 0.2
    assert found.of(Maker.NOISE).success <= 0.2
    assert found.over_noise[1].low > 0.5
    assert found.over_logits[1].low > 0.5
    assert found.over_stranger is None
    assert not found.is_shown  # without a stranger nothing says that the weights carry it
    assert float(found.features.similarities.max()) < 0
    assert found.features.sites == ("body",)


def test_points_keep_to_the_ball_in_either_norm() -> None:
    x = rows()
    for norm, radius in ((Norm.LINF, 0.1), (Norm.L2, 0.5)):
        made = FeatureAttack(sites=("body",), num_steps=5).run(
            opened(Halves(0), x), x, radius, norm=norm
        )
        away = (made.points - x).double()
        size = away.abs().amax(1) if norm is Norm.LINF else away.norm(dim=1)
        assert float(size.max()) <= radius + 1e-6
        assert float(size.min()) > 0


def test_a_rotation_of_the_features_changes_no_cosine() -> None:
    x = rows()
    attack = FeatureAttack(sites=("body",), num_steps=10)
    turned = attack.run(opened(Halves(0, rotation=3), x), x, RADIUS)
    plain = attack.run(opened(Halves(0), x), x, RADIUS)
    torch.testing.assert_close(turned.similarities, plain.similarities, rtol=0, atol=1e-3)


class Deep(nn.Module):
    """Three layers of features; all but `weak` have an offset that holds the cosine near 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weak, self.last = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.head = nn.Linear(SIZE, 2)
        with torch.no_grad():
            for layer, gain, bias in (
                (self.first, 1.0, 5.0),
                (self.weak, 1.0, -5.0),
                (self.last, 1.0, 5.0),
            ):
                layer.weight.copy_(gain * torch.eye(SIZE))
                layer.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.last(self.weak(self.first(x))))
        return made


def test_the_weakest_layer_is_found() -> None:
    x = rows(12)
    attack = FeatureAttack(sites=("first", "weak", "last"), num_steps=10)
    found = attack.run(opened(Deep(), x), x, RADIUS)
    assert "weak" in found.sites
    singles = {line.sites: line.similarity for line in found.tried if len(line.sites) == 1}
    assert min(singles, key=lambda sites: singles[sites]) == ("weak",)


def test_rows_at_once_change_nothing_and_no_hook_is_left() -> None:
    x = rows(20)
    classifier = opened(Deep(), x)
    sites = ("first", "weak", "last")
    whole = FeatureAttack(sites=sites, num_steps=6).run(classifier, x, RADIUS)
    parts = FeatureAttack(sites=sites, num_steps=6, rows_at_once=3).run(classifier, x, RADIUS)
    torch.testing.assert_close(whole.points, parts.points, rtol=0, atol=1e-5)
    assert whole.sites == parts.sites
    assert not any(m._forward_hooks for m in classifier.net.module.modules())
    assert all(p.grad is None for p in classifier.net.module.parameters())


def test_bad_input_is_said() -> None:
    x = rows(12)
    classifier = opened(Halves(0), x)
    with pytest.raises(SiteError, match="one module"):
        FeatureAttack(sites=("*st",)).run(opened(Deep(), x), x, RADIUS)  # first and last
    with pytest.raises(SiteError, match="token"):
        FeatureAttack(sites=("body",), token=0).run(classifier, x, RADIUS)
    with pytest.raises(OptionError, match="steps"):
        FeatureAttack(sites=("body",)).run(classifier, x, 3, norm=Norm.L0)
    with pytest.raises(OptionError, match="sites"):
        FeatureAttack(sites=())
    wrong = 1 - classifier.answers(x, torch.arange(12)).argmax(1)
    bench = TransferBench(attack=FeatureAttack(sites=("body",), num_steps=2))
    with pytest.raises(TargetError, match="no row right"):
        bench.run(classifier, classifier, x, wrong, RADIUS)
    with pytest.raises(OptionError, match="no line"):
        shown().of(Maker.NOISE, "stranger")

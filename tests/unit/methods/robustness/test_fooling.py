"""Fooling images of networks whose surest input is known, and what evolves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import OptionError, TargetError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.fooling import Encoding, FoolByEvolution, FoolByGradient
from patchclamp.methods.robustness.patterns import Patterns, Pixels

SHAPE = (1, 4, 4)


class Flat(nn.Module):
    """Two logits that are linear in the image: log-odds of the first = weight . x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([score, torch.zeros_like(score)], 1)


def opened(scale: float = 1.0, within: tuple[float, float] | None = (0.0, 1.0)) -> Classifier:
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(16, generator=generator)
    x = torch.rand(6, *SHAPE, generator=generator)
    return Classifier.open(patchclamp.open(Flat(weight).eval(), x[:1]), x, within=within)


def weight_of(classifier: Classifier) -> Tensor:
    weight = classifier.net.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


BOTH = torch.tensor([0, 1])
METHODS = [
    FoolByGradient(confidence=0.9999999, num_steps=100),
    FoolByEvolution(confidence=0.9999999, num_rounds=400),
]


@pytest.mark.parametrize("method", METHODS, ids=["gradient", "evolution"])
def test_they_end_at_the_corner_that_is_surest(
    method: FoolByGradient | FoolByEvolution,
) -> None:
    classifier = opened()
    found = method.run(classifier, BOTH)
    weight = weight_of(classifier)
    best = torch.stack([weight.clamp(min=0).sum(), -weight.clamp(max=0).sum()])
    torch.testing.assert_close(found.confidences, torch.sigmoid(best.double()), rtol=0, atol=1e-3)
    assert not bool(found.is_fooled.any())
    assert bool(((found.points >= 0) & (found.points <= 1)).all())


@pytest.mark.parametrize("method", [FoolByGradient(), FoolByEvolution()], ids=["g", "e"])
def test_they_stop_where_it_is_enough_and_count(
    method: FoolByGradient | FoolByEvolution,
) -> None:
    classifier = opened(scale=10.0)
    found = method.run(classifier, BOTH)
    assert bool(found.is_fooled.all())
    assert int(found.num_rounds.max()) < 400
    assert 0 < found.passes.forwards < 20000
    assert (found.passes.backwards > 0) == isinstance(method, FoolByGradient)


def test_the_penalised_point_is_the_known_one() -> None:
    classifier, penalty = opened(), 40.0
    found = FoolByGradient(penalty=penalty, confidence=0.5, step=0.05, num_steps=150).run(
        classifier, BOTH[:1]
    )
    best = 0.5 + weight_of(classifier) * 16 / (2 * penalty)
    torch.testing.assert_close(found.points.flatten(), best.clamp(0, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_evolution_follows_its_seed_only(encoding: Encoding) -> None:
    method = FoolByEvolution(encoding=encoding, num_rounds=20, num_children=5)
    torch.manual_seed(1)
    first = method.run(opened(), BOTH)
    torch.manual_seed(2)
    again = method.run(opened(), BOTH)
    other = FoolByEvolution(encoding=encoding, num_rounds=20, num_children=5, seed=1)
    assert torch.equal(first.points, again.points)
    assert not torch.equal(first.points, other.run(opened(), BOTH).points)
    assert first.passes.backwards == 0


def test_nothing_fools_a_network_that_does_not_look() -> None:
    blind = opened(scale=0.0)
    for method in (FoolByEvolution(num_rounds=30), FoolByGradient(num_steps=30)):
        found = method.run(blind, BOTH)
        assert found.confidences.tolist() == [0.5, 0.5]
        assert not bool(found.is_fooled.any())


def test_mutation_changes_few_elements_and_stays_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = Pixels.drawn(50, SHAPE, generator)
    children = pixels.mutated(torch.arange(50), 0.1, generator)
    changed = (children.shares != pixels.shares).flatten(1).sum(1)
    assert int(changed.min()) >= 1
    assert float(changed.double().mean()) < 5
    assert bool(((children.shares >= 0) & (children.shares <= 1)).all())


def test_painters_make_the_same_picture_at_any_size() -> None:
    small = Patterns.drawn(3, (1, 9, 9), torch.Generator().manual_seed(0))
    large = Patterns((1, 17, 17), small.weights, small.kinds)

    def limits(side: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, side, side), torch.ones(1, side, side)

    torch.testing.assert_close(
        small.images(limits(9)), large.images(limits(17))[:, :, ::2, ::2], rtol=0, atol=1e-5
    )


def test_bad_input_is_said() -> None:
    with pytest.raises(OptionError, match="finite limits"):
        FoolByGradient().run(opened(within=None), BOTH)
    with pytest.raises(TargetError, match="not classes"):
        FoolByEvolution().run(opened(), torch.tensor([2]))
    with pytest.raises(OptionError, match="no row"):
        FoolByEvolution().run(opened(), BOTH, row=6)
    with pytest.raises(OptionError, match="confidence"):
        FoolByGradient(confidence=1.0)
    module = nn.Linear(3, 2).eval()
    flat = Classifier.open(
        patchclamp.open(module, torch.rand(1, 3)), torch.rand(2, 3), within=(0.0, 1.0)
    )
    with pytest.raises(OptionError, match="images only"):
        FoolByEvolution(encoding=Encoding.INDIRECT).run(flat, BOTH)

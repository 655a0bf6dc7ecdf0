"""Level set traversal against what is known in closed form of networks that are linear."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError, TargetError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.level_sets import LevelSetTraversal, triangle

SIZE = 40


def linear(weight: Tensor, bias: float, x: Tensor) -> Classifier:
    """Two classes, log-odds of the first = weight . x + bias; inputs from 0 to 1."""
    module = nn.Linear(len(weight), 2).eval()
    with torch.no_grad():
        module.weight.copy_(torch.stack([weight, torch.zeros_like(weight)]))
        module.bias.copy_(torch.tensor([bias, 0.0]))
    return Classifier.open(patchclamp.open(module, x[:1]), x, within=(0.0, 1.0))


def planted(visible: int) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """A network that sees the first elements only; a source and a target across the border."""
    weight = torch.zeros(SIZE)
    weight[:visible] = 8.0 / visible
    generator = torch.Generator().manual_seed(0)
    source = 0.75 + 0.2 * torch.rand(1, SIZE, generator=generator)
    target = 0.05 + 0.2 * torch.rand(1, SIZE, generator=generator)
    return linear(weight, -4.0, source), source, target, weight


def test_it_ends_at_the_nearest_point_that_is_sure_enough() -> None:
    classifier, source, target, weight = planted(10)
    found = LevelSetTraversal(near=1e-4, num_steps=120).run(classifier, source, target)
    odds = float(weight @ target[0] - 4)
    start = float(weight @ source[0] - 4)

    def distance(drop: float) -> float:
        kept = 1 / (1 + math.exp(-start)) - drop
        return (math.log(kept / (1 - kept)) - odds) / float(weight.norm()) / math.sqrt(SIZE)

    assert distance(0.2) - 1e-6 <= float(found.rmse) <= distance(0.1) + 1e-3
    assert float(found.falls) <= 0.2
    assert not bool(found.is_reached)
    # what the network does not see is the target's
    torch.testing.assert_close(found.points[:, 10:], target[:, 10:], rtol=0, atol=1e-3)


def test_a_blind_network_is_crossed_and_one_that_sees_everything_is_not() -> None:
    classifier, source, target, _ = planted(1)
    found = LevelSetTraversal(num_steps=50).run(classifier, source, target)
    # the one element that is seen differs by about .6: at most .6 / sqrt(40) = .095 is left
    assert float(found.rmse) <= 0.1
    assert float(found.start_rmse) >= 0.6
    wide, source, target, _ = planted(SIZE)
    stuck = LevelSetTraversal(num_steps=50).run(wide, source, target)
    assert float(stuck.rmse) >= 0.3
    assert not bool(stuck.is_reached)


def test_the_line_and_the_triangle_hold_in_a_convex_set() -> None:
    classifier, source, target, _ = planted(10)
    other = target.flip(1)
    x = source.repeat(2, 1)
    pair = Classifier.open(classifier.net, x, within=(0.0, 1.0))
    found = LevelSetTraversal(num_steps=60).run(pair, x, torch.cat([target, other]))
    assert found.line.shape == (2, 21)
    assert float(found.falls.max()) <= 0.2
    torch.testing.assert_close(found.line[:, 0], found.source_confidences)
    torch.testing.assert_close(found.line[:, -1], found.confidences)
    assert float(found.target_confidences.max()) < 0.1
    inside = triangle(pair, source[0], found.points[0], found.points[1])
    assert inside.weights.shape == (66, 3)
    assert inside.share == 1.0
    assert inside.fall <= 0.2 + 1e-6
    across = triangle(pair, source[0], target[0], other[0])
    assert across.share < 0.5


def test_rows_do_not_depend_on_their_neighbours_and_passes_are_counted() -> None:
    classifier, source, target, _ = planted(10)
    x = torch.cat([source, source - 0.05, source + 0.01])
    three = Classifier.open(classifier.net, x, within=(0.0, 1.0))
    together = LevelSetTraversal(num_steps=30).run(three, x, target.repeat(3, 1))
    alone = LevelSetTraversal(num_steps=30).run(three, x[1:2], target, rows=torch.tensor([1]))
    torch.testing.assert_close(together.points[1:2], alone.points, rtol=0, atol=1e-4)
    assert 30 <= alone.passes.backwards <= 60  # the line's weakest place costs another
    assert bool(((together.points >= 0) & (together.points <= 1)).all())


def test_bad_input_is_said() -> None:
    classifier, source, target, _ = planted(10)
    method = LevelSetTraversal()
    with pytest.raises(TargetError, match="already has the answer"):
        method.run(classifier, source, source)
    with pytest.raises(InputError, match="each source"):
        method.run(classifier, source, target.repeat(2, 1))
    with pytest.raises(InputError, match="limits"):
        method.run(classifier, source, target - 1)
    with pytest.raises(InputError, match="NaN"):
        method.run(classifier, source, target * math.nan)
    unlimited = Classifier.open(classifier.net, source)
    with pytest.raises(OptionError, match="finite limits"):
        method.run(unlimited, source, target)
    with pytest.raises(OptionError, match="shares"):
        LevelSetTraversal(drop=0.0)
    with pytest.raises(OptionError, match="one shape"):
        triangle(classifier, source[0], target[0], target)

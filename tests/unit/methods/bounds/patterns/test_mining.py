"""Mining of activation patterns: what is in a pattern, what is said of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.methods.bounds.patterns import MinePatterns, Pattern, Share, relu_sites
from patchclamp.methods.bounds.patterns.shares import binomial_lower, clopper_pearson
from patchclamp.net import Net


def reading_signs(num: int) -> Net:
    """Unit i is active where input i is positive."""
    module = nn.Sequential(nn.Linear(num, num, bias=False), nn.ReLU(), nn.Linear(num, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(num))
    return patchclamp.open(module.eval(), torch.zeros(2, num))


def with_share(num: int, *shares: float) -> Tensor:
    """Rows of which column i is positive in a share of exactly shares[i]."""
    columns = [
        torch.where(torch.arange(num) < round(share * num), 1.0, -1.0)[torch.randperm(num)]
        for share in shares
    ]
    return torch.stack(columns, 1)


def test_units_are_in_a_pattern_from_a_share_of_delta_on() -> None:
    net = reading_signs(6)
    mine = with_share(100, 1.0, 0.95, 0.94, 0.06, 0.05, 0.0)
    others = with_share(100, *[0.5] * 6)
    inputs = torch.cat([mine, others])
    labels = torch.arange(2).repeat_interleave(100)
    mined = MinePatterns(delta=0.95).run(net, inputs, labels, (inputs, labels))
    (states,) = mined[0].pattern.states.values()
    assert states.tolist() == [1, 1, 0, 0, -1, -1]
    assert mined[0].num_mined == 100
    assert mined[1].pattern.size == 0  # the negative control: nothing is dominant
    assert mined[1].recall.value == mined[1].others.value == 1.0
    follows = (mine[:, :2] > 0).all(1) & (mine[:, 4:] <= 0).all(1)
    assert mined[0].recall.hits == int(follows.sum())
    (lower,) = mined[0].lower.values()
    assert (lower[states == 0] == 0).all()
    assert 0.8 < float(lower[1]) < 0.95
    assert float(lower[1]) < float(lower[0]) < 1


def test_lower_bounds_of_all_units_hold_together() -> None:
    """Truth 0.97 in 20 units; all 20 bounds hold in far more than 95% of the runs."""
    net = reading_signs(20)
    misses = 0
    for _ in range(40):
        inputs = torch.where(torch.rand(200, 20) < 0.97, 1.0, -1.0)
        labels = (torch.arange(200) < 100).long()
        mined = MinePatterns(delta=0.9).run(net, inputs, labels, (inputs, labels))
        misses += any(bool((m.lower[s] > 0.97).any()) for m in mined.values() for s in m.lower)
    assert misses <= 4  # 40 runs with two classes each; at most 4 expected


@pytest.mark.parametrize(("hits", "num"), [(0, 7), (7, 7), (3, 7), (99, 100), (50, 1000)])
def test_intervals_are_those_of_clopper_and_pearson(hits: int, num: int) -> None:
    found = clopper_pearson(hits, num, 0.9)
    low = stats.beta.ppf(0.05, hits, num - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.95, hits + 1, num - hits) if hits < num else 1.0
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)
    assert binomial_lower(hits, num, 0.05) == pytest.approx(low, abs=1e-9)


def test_a_random_pattern_is_followed_by_chance() -> None:
    """Five independent signs: one in 32."""
    net = reading_signs(8)
    states = torch.tensor([1, 1, -1, 0, -1, 0, 1, 0], dtype=torch.int8)
    (site,) = relu_sites(net)
    follows = Pattern({site: states}).followed(net, torch.randn(20_000, 8))
    share = Share.of(follows, 0.999)
    assert share.interval.low < 1 / 32 < share.interval.high
    assert share.interval.high < 1 / 20


def test_held_out_examples_are_the_same_for_a_seed_and_not_mined() -> None:
    net = reading_signs(4)
    inputs, labels = torch.randn(100, 4), torch.arange(100) % 2
    first, again = (MinePatterns(delta=0.6, seed=3).run(net, inputs, labels) for _ in range(2))
    for label in (0, 1):
        assert first[label].num_mined == 35
        assert first[label].recall.num == 15
        assert first[label].pattern.to_text() == again[label].pattern.to_text()


def test_patterns_as_text() -> None:
    states = {"a": torch.tensor([1, 0, -1], dtype=torch.int8), "b": torch.zeros(2).to(torch.int8)}
    pattern = Pattern(states, 4)
    read = Pattern.from_text(pattern.to_text())
    assert read.label == 4
    assert {s: x.tolist() for s, x in read.states.items()} == {"a": [1, 0, -1], "b": [0, 0]}
    assert (pattern.size, pattern.num_units) == (2, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"label": 1}',
        '{"label": 1, "sites": {"a": {"num_units": 2, "active": [2], "inactive": []}}}',
        '{"label": 1, "sites": {"a": {"num_units": 2, "active": [0], "inactive": [0]}}}',
        '{"label": 1, "sites": {"a": {"num_units": 2, "active": [true], "inactive": []}}}',
    ],
)
def test_text_that_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        Pattern.from_text(text)


def test_patterns_clash_or_join() -> None:
    first = Pattern({"a": torch.tensor([1, 0, -1], dtype=torch.int8)})
    second = Pattern({"a": torch.tensor([1, -1, 0], dtype=torch.int8)})
    third = Pattern({"a": torch.tensor([-1, 0, 1], dtype=torch.int8)})
    assert first.clashes(second) == []
    assert first.joined(second).states["a"].tolist() == [1, -1, -1]
    assert first.clashes(third) == [("a", 0), ("a", 2)]
    with pytest.raises(DataError, match="clash"):
        first.joined(third)


def test_what_is_refused() -> None:
    net = reading_signs(2)
    inputs, labels = torch.randn(20, 2), torch.arange(20) % 2
    for wrong in ({"delta": 0.5}, {"delta": 1.1}, {"confidence": 1.0}, {"held_out": 0.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            MinePatterns(**wrong)
    with pytest.raises(DataError, match="fit their inputs"):
        MinePatterns().run(net, inputs, labels[:-1])
    with pytest.raises(DataError, match="too few"):
        MinePatterns().run(net, inputs, torch.arange(20))
    with pytest.raises(DataError, match="in it and outside"):
        MinePatterns().run(net, inputs, labels, (inputs, labels * 0))
    with pytest.raises(DataError, match="no pattern"):
        Pattern({"a": torch.tensor([2])})
    smooth = patchclamp.open(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval(), torch.zeros(2, 2))
    with pytest.raises(SiteError, match="no ReLU"):
        relu_sites(smooth)


def test_units_of_images_are_counted_flat() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    net = patchclamp.open(module, torch.zeros(2, 1, 4, 4))
    (site,) = relu_sites(net)
    inputs = torch.randn(50, 1, 4, 4)
    active = (module[0](inputs) > 0).flatten(1)
    states = torch.zeros(8, dtype=torch.int8)
    states[5], states[2] = 1, -1
    follows = Pattern({site: states}).followed(net, inputs)
    assert torch.equal(follows, active[:, 5] & ~active[:, 2])
    assert 0 < int(follows.sum()) < 50
    assert np.isfinite(Share.of(follows, 0.95).value)

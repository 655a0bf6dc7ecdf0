"""A true mask beats a misplaced one with every removal; random maps are at chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.attribution.faithfulness.curves import (
    CurveMetric,
    Deletion,
    Insertion,
    PixelFlipping,
    RemoveAndDebias,
)
from patchclamp.methods.attribution.faithfulness.infidelity import Infidelity
from patchclamp.methods.attribution.faithfulness.removal import (
    Black,
    Blur,
    Constant,
    LayerMasked,
    Mean,
    NoisyLinear,
)
from patchclamp.net import Net

SIDE, NUM, STEPS = 16, 12, 6
REMOVALS = (Black(), Mean(), Blur(width=0.2), NoisyLinear(), LayerMasked())
METRICS = [
    Deletion(removals=REMOVALS, num_steps=STEPS),
    Insertion(removals=REMOVALS, num_steps=STEPS),
    PixelFlipping(removals=REMOVALS, num_steps=STEPS),
    RemoveAndDebias(removals=REMOVALS, num_steps=STEPS),
    Infidelity(removals=REMOVALS, num_samples=20),
]


class Texture(nn.Module):
    """How much fine chequer there is anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3)) * 100


@pytest.fixture(scope="module")
def planted() -> tuple[Net, Tensor, Tensor]:
    """Chequer at one place of each image, smooth light elsewhere; and where the chequer is."""
    generator = torch.Generator().manual_seed(0)
    light = torch.rand(NUM, 1, 4, 4, generator=generator) * 0.5 + 0.25
    x = nn.functional.interpolate(light, size=(SIDE, SIDE), mode="bicubic")
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    chequer = ((rows + columns) % 2).float()
    true = torch.zeros(NUM, SIDE, SIDE)
    for n in range(NUM):
        i, j = torch.randint(0, SIDE - 6, (2,), generator=generator).tolist()
        x[n, 0, i : i + 6, j : j + 6] = chequer[i : i + 6, j : j + 6]
        true[n, i : i + 6, j : j + 6] = 1
    return patchclamp.open(Texture().eval(), x), x, true


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_the_true_mask_beats_a_misplaced_one(metric: CurveMetric, planted) -> None:
    net, x, true = planted
    made = metric.run(net, x, 0, true)
    assert {made.verdict("map", "random", b) for b in made.baselines} == {"better"}
    assert not any(c.flips for c in made.disagreement().comparisons)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_random_maps_are_at_chance(metric: CurveMetric | Infidelity, planted) -> None:
    """A 95% interval misses one time in twenty; of three pairs at most one may be told apart."""
    net, x, _ = planted
    generator = torch.Generator().manual_seed(1)
    noise = {f"{i}": torch.rand(x[:, 0].shape, generator=generator) for i in range(5)}
    made = replace(metric, removals=(Black(), Mean())).run(net, x, 0, noise)
    for baseline in made.baselines:
        pairs = (("0", "random"), ("1", "2"), ("3", "4"))  # no map twice
        assert sum(made.verdict(a, b, baseline) != "undecided" for a, b in pairs) <= 1


def test_the_baseline_alone_can_turn_the_verdict() -> None:
    """A network that looks for light: black takes it away, white puts it there."""
    x = torch.rand(NUM, 1, 6, 6, generator=torch.Generator().manual_seed(2))

    class Light(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    net = patchclamp.open(Light().eval(), x)
    metric = PixelFlipping(removals=(Black(), Constant(number=1.0)), num_steps=12)
    made = metric.run(net, x, 0, {"light": x[:, 0], "dark": -x[:, 0]})
    # With white the score rises whatever goes; it rises least where it was light already.
    assert {made.verdict("light", "dark", b) for b in made.baselines} == {"better"}
    steady = (x[:, 0] - 0.5).abs()
    made = metric.run(net, x, 0, {"light": x[:, 0], "extreme": steady})
    assert made.verdict("light", "extreme", made.baselines[0]) == "better"
    told = made.disagreement().correlations
    assert all(-1 <= v <= 1 for v in told.values())
    assert told["light", made.baselines[0], made.baselines[1]] > 0

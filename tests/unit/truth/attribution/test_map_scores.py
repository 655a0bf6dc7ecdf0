"""Scores of maps against hand-made ones, chance, the gate, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.truth.attribution import Gate, PlantedMaps
from patchclamp.truth.attribution.base import auc, pointing_game, signal_area, signal_mass

SIGNAL = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 1]]]).bool()


def _planted(signal: Tensor = SIGNAL, distractor: Tensor | None = None) -> PlantedMaps:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    x, labels = torch.rand(2, 1, 1, 4), torch.tensor([0, 1])
    return PlantedMaps(
        net=patchclamp.open(module, x),
        inputs=x,
        labels=labels,
        signal=signal,
        distractor=distractor,
        gate=Gate.measure(module, labels, x, x, None),
    )


def test_signal_mass_is_the_share_and_even_by_area() -> None:
    maps = torch.tensor([[[3.0, 1.0, 1.0, 5.0]]]).double()
    signal = torch.tensor([[[True, False, False, False]]])
    other = torch.tensor([[[False, True, False, False]]])
    assert float(signal_mass(maps, signal, other)) == 0.75
    # a map that is the same everywhere gets one half whatever the areas are
    assert float(signal_mass(torch.ones_like(maps), signal, ~signal)) == 0.5
    assert float(signal_mass(maps, signal, ~signal)) == pytest.approx(3 / (3 + 7 / 3))
    nowhere = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).double()
    assert float(signal_mass(nowhere, signal, other)) == 0.5


def test_pointing_counts_ties_in_part() -> None:
    signal = torch.tensor([[True, False, False]]).expand(3, 3)
    maps = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert pointing_game(maps, signal).tolist() == [1.0, 0.5, 0.0]


def test_area_is_the_chance_of_being_above() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(4, (40,), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.4
    yes, no = values[positive][:, None], values[~positive][None]
    expected = ((yes > no).double() + 0.5 * (yes == no).double()).mean()
    assert float(auc(values, positive)) == pytest.approx(float(expected), abs=1e-12)
    assert signal_area(SIGNAL.double(), SIGNAL).tolist() == [1.0, 1.0]
    assert signal_area((~SIGNAL).double(), SIGNAL).tolist() == [0.0, 0.0]


def test_truth_scores_one_the_distractor_none_and_noise_chance() -> None:
    planted = _planted(distractor=~SIGNAL)
    right = planted.scores(SIGNAL.float())
    wrong = planted.scores((~SIGNAL).float())
    for name in ("signal_mass", "area"):
        assert getattr(right, name).mean == 1.0
        assert getattr(wrong, name).mean == 0.0
        assert getattr(right, name).chance == 0.5
    assert right.pointing.mean == 1.0
    assert right.pointing.interval.low <= right.pointing.mean <= right.pointing.interval.high
    signed = planted.scores(-SIGNAL.float())
    assert signed.signal_mass.mean == 1.0


def test_a_methods_maps_are_taken_as_they_come() -> None:
    planted = _planted()
    maps = Gradient().run(planted.net, planted.inputs, planted.labels)
    weight = planted.net.module[1].weight.detach().abs().double()  # type: ignore[index, union-attr]  # a Sequential
    expected = [float(weight[k, SIGNAL[k, 0]].sum() / weight[k].sum()) for k in (0, 1)]
    assert planted.scores(maps).signal_mass.rows.tolist() == pytest.approx(expected, abs=1e-6)


def test_useless_maps_are_refused_by_name() -> None:
    planted = _planted()
    nan = torch.ones(2, 1, 4)
    nan[1, 0, 2] = torch.nan
    with pytest.raises(InputError, match=r"NaN.*example 1"):
        planted.scores(nan)
    empty = torch.ones(2, 1, 4)
    empty[1] = 0
    with pytest.raises(InputError, match=r"zero everywhere.*example 1"):
        planted.scores(empty)
    allowed = planted.scores(empty, allow_empty=True)
    assert allowed.num_empty == 1
    assert float(allowed.signal_mass.rows[1]) == 0.5
    with pytest.raises(InputError, match=r"heat\(\)"):
        planted.scores(torch.ones(2, 1, 1, 4))


def test_masks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="overlap"):
        _planted(distractor=SIGNAL)
    with pytest.raises(InputError, match="bool"):
        _planted(signal=SIGNAL.float())
    with pytest.raises(InputError, match="empty"):
        _planted(signal=torch.zeros_like(SIGNAL))
    with pytest.raises(InputError, match="all signal"):
        _planted(signal=torch.ones_like(SIGNAL))
    with pytest.raises(InputError, match="different examples"):
        _planted(signal=SIGNAL[:1])


class _ReadsFirst(nn.Module):
    """Class 1 where the first feature is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1)


def test_the_gate_says_what_the_network_reads() -> None:
    labels = torch.arange(40) % 2
    x = torch.stack([labels, labels], 1).float()
    no_first, no_second = x.clone(), x.clone()
    no_first[:, 0], no_second[:, 1] = 0, 0
    gate = Gate.measure(_ReadsFirst(), labels, x, no_first, no_second)
    assert gate.holds
    assert (gate.accuracy.value, gate.without_target.value, gate.chance) == (1.0, 0.5, 0.5)
    assert gate.accuracy.interval.low < 1.0
    wrong = Gate.measure(_ReadsFirst(), labels, x, no_second, no_first)
    assert not wrong.holds
    assert len(wrong.failures) == 2
    assert not Gate.measure(_ReadsFirst(), 1 - labels, x, no_first, None).holds

"""Measures of faithfulness: closed forms on linear networks, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError, TargetError
from patchclamp.methods.attribution.base import Explainer
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
from patchclamp.methods.attribution.faithfulness.sensitivity import MaxSensitivity
from patchclamp.methods.attribution.gradients.plain import Gradient, GradientTimesValue
from patchclamp.net import Net
from tests.networks import opened

TWO = (Constant(number=0.0), Constant(number=1.0))
CURVES = [Deletion, Insertion, PixelFlipping, RemoveAndDebias]


class Linear(nn.Module):
    """The image times a template, for two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x.flatten(1))
        return made


@pytest.fixture(scope="module")
def linear() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(2)
    module, x = Linear().eval(), torch.rand(5, 1, 6, 6)
    return patchclamp.open(module, x), x, module.head.weight[1].detach().reshape(6, 6)


def test_deletion_insertion_and_flipping_of_a_linear_network(linear) -> None:
    net, x, weight = linear
    share = (x[:, 0] * weight).flatten(1)  # of the score, on a baseline of 0
    falls = share.sort(descending=True).values.cumsum(1)
    away = torch.cat([torch.zeros(5, 1), falls], 1)  # what is gone after each step
    scores = net.run(x).output[:, 1]
    options = {"num_steps": 36, "removals": TWO}
    made = Deletion(**options).run(net, x, 1, share.reshape(5, 6, 6))
    curve = scores[:, None] - away
    torch.testing.assert_close(made.curves[0, 0], curve, rtol=1e-4, atol=1e-5)
    expected = torch.trapezoid(curve, dim=1) / 36
    torch.testing.assert_close(made.of("map", "constant (number=0.0)"), expected)
    made = Insertion(**options).run(net, x, 1, share.reshape(5, 6, 6))
    curve = scores[:, None] - share.sum(1, keepdim=True) + away
    torch.testing.assert_close(made.curves[0, 0], curve, rtol=1e-4, atol=1e-5)
    made = PixelFlipping(**options).run(net, x, 1, share.reshape(5, 6, 6))
    torch.testing.assert_close(made.values[0, 0], falls.mean(1), rtol=1e-4, atol=1e-5)
    assert made.passes.forwards == 2 * 2 * 36 * 5  # maps, removals, steps, examples


def test_each_map_is_best_on_its_own_baseline(linear) -> None:
    """The order by w x is right for a baseline of 0, that by w (x - 1) for one of 1."""
    net, x, weight = linear
    maps = {"zero": x[:, 0] * weight, "one": (x[:, 0] - 1) * weight}
    made = PixelFlipping(num_steps=36, removals=TWO).run(net, x, 1, maps)
    zero, one = made.baselines
    assert made.advantage("zero", "one", zero).value > 0
    assert made.advantage("zero", "one", one).value < 0
    told = made.disagreement()
    (pair,) = (c for c in told.comparisons if (c.first, c.second) == ("zero", "one"))
    assert pair.flips
    assert pair.verdicts == {zero: "better", one: "worse"}
    assert pair.flipped == 1.0
    assert pair in told.flips


def test_road_is_symmetric(linear) -> None:
    """A map turned round gives the opposite curve."""
    net, x, weight = linear
    heat = x[:, 0] * weight
    made = RemoveAndDebias(removals=(NoisyLinear(noise=0.0), Mean())).run(
        net, x, 1, {"up": heat, "down": -heat}
    )
    torch.testing.assert_close(made.values[0], -made.values[1], rtol=1e-3, atol=1e-4)
    assert bool((made.values[0, 1] > 0).all())


def test_infidelity_of_a_linear_network(linear) -> None:
    net, x, weight = linear
    shares = (x[:, 0] * weight)[:, None]
    right = Infidelity(removals=(Constant(number=0.0), Mean()), scaled=False)
    made = right.run(net, x, 1, {"share": shares, "nothing": torch.zeros_like(shares)})
    torch.testing.assert_close(made.of("share", made.baselines[0]), torch.zeros(5).double(),
                               rtol=0, atol=1e-9)  # fmt: skip
    assert bool((made.of("share", "mean") > 0.01).all())
    assert torch.equal(made.of("nothing", "mean"), torch.ones(5).double())
    # A slope is right for every baseline, and so is twice the slope after scaling.
    slopes = weight.expand(5, 1, 6, 6)
    for scaled, factor in ((False, 1), (True, 2)):
        made = Infidelity(slopes=True, scaled=scaled).run(net, x, 1, factor * slopes)
        assert float(made.values[0].max()) < 1e-6
        assert float(made.values[1].min()) > 1e-3  # the misplaced map


def test_max_sensitivity_of_a_linear_network(linear) -> None:
    net, x, weight = linear
    metric = MaxSensitivity(radii=(0.1, 0.2), num_samples=3)
    made = metric.run(net, x, 1, {"slope": Gradient(), "share": GradientTimesValue()})
    assert not made.values[0].any()
    assert bool((made.values[1] > 0).all())
    torch.testing.assert_close(made.values[1, 1], 2 * made.values[1, 0], rtol=1e-4, atol=0)
    spread = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    most = 0.2 * spread * weight.norm() / (x[:, 0] * weight).flatten(1).norm(dim=1)
    assert bool((made.values[1, 1] <= most).all())


@pytest.mark.parametrize("metric", [*CURVES, Infidelity])
def test_rows_per_pass_and_company_change_nothing(metric: type) -> None:
    net, x = opened("resnet")
    heat = torch.rand(3, 8, 8).round(decimals=1)  # with ties
    few = {"num_samples": 16} if metric is Infidelity else {"num_steps": 6}
    measure = metric(removals=(Constant(number=0.0), NoisyLinear()), seed=4, **few)
    all_ = measure.run(net, x, 3, heat)
    again = measure.run(net, x, 3, heat)
    torch.testing.assert_close(again.values, all_.values, rtol=1e-3, atol=1e-5)
    one = measure.run(net, x[1:2], 3, heat[1:2])
    torch.testing.assert_close(one.values[:, :, 0], all_.values[:, :, 1], rtol=1e-3, atol=1e-4)
    other = replace(measure, seed=5).run(net, x, 3, heat)
    assert not torch.equal(all_.values[1], other.values[1])


def test_every_removal_leaves_what_is_kept() -> None:
    net, x = opened("digits_cnn")
    heat = torch.rand(3, 8, 8)
    removals = (Black(), Mean(), Blur(), NoisyLinear(), LayerMasked())
    made = Deletion(num_steps=8, removals=removals).run(net, x, 1, heat)
    assert made.curves.shape == (2, 5, 3, 9)
    for k in range(5):
        torch.testing.assert_close(made.curves[0, k, :, 0], net.run(x).output[:, 1])
    assert made.baselines[:2] == ("black", "mean")
    assert made.mean("map", "black").interval.low <= made.mean("map", "black").value


def test_interpolation_solves_its_equations() -> None:
    from patchclamp.methods.attribution.faithfulness.removal import _interpolated

    ramp = torch.arange(12.0).expand(1, 2, 12, 12).clone()  # linear: its own interpolation
    kept = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    kept[..., 0], kept[..., -1], kept[..., 0, :], kept[..., -1, :] = True, True, True, True
    made = _interpolated(torch.where(kept, ramp, -50.0), kept)
    torch.testing.assert_close(made, ramp, rtol=0, atol=0.05)
    assert torch.equal(made[kept.expand_as(made)], ramp[kept.expand_as(made)])
    line = _interpolated(
        torch.tensor([[[2.0, 0, 0, 0, 10]]]), torch.tensor([[[1, 0, 0, 0, 1]]]) > 0
    )
    torch.testing.assert_close(line, torch.tensor([[[2.0, 4, 6, 8, 10]]]), rtol=0, atol=0.02)
    none = _interpolated(ramp, torch.zeros_like(kept))
    torch.testing.assert_close(none, torch.full_like(ramp, 5.5))


def test_tables_have_no_blur(linear) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 7)
    net = patchclamp.open(nn.Linear(7, 2).eval(), x)
    made = Deletion(num_steps=7).run(net, x, 0, torch.rand(4, 7))
    assert made.baselines == ("black", "mean")
    with pytest.raises(OptionError, match="needs rows and columns"):
        Deletion(num_steps=7, removals=(Mean(), Blur())).run(net, x, 0, torch.rand(4, 7))
    with pytest.raises(InputError, match="nothing is removed"):
        Deletion(num_steps=7).run(net, x[:1], 0, torch.rand(1, 7))


def test_options_and_maps_are_checked(linear) -> None:
    net, x, _ = linear
    heat = torch.rand(5, 6, 6)
    for metric in CURVES:
        with pytest.raises(OptionError, match="at least 1"):
            metric(num_steps=0)
        with pytest.raises(OptionError, match="more steps than places"):
            metric(num_steps=37).run(net, x, 1, heat)
        with pytest.raises(OptionError, match="at least two different"):
            metric(removals=(Mean(),)).run(net, x, 1, heat)
    with pytest.raises(OptionError, match="at least two different"):
        Infidelity(removals=(Mean(), Mean())).run(net, x, 1, heat)
    for wrong, message in (
        (torch.rand(5, 3, 3), "does not fit"),
        (heat / 0, "NaN or infinity"),
        ({}, "give maps"),
        ({"random": heat}, "other than 'random'"),
    ):
        with pytest.raises(InputError, match=message):
            Deletion().run(net, x, 1, wrong)
    with pytest.raises(TargetError):
        Deletion().run(net, x, 2, heat)
    with pytest.raises(TargetError, match="stays the same"):
        Infidelity().run(net, x, lambda out: out[:, 0] * 0, heat)
    with pytest.raises(InputError, match="slopes=False"):
        Infidelity(slopes=True).run(net, x, 1, heat)
    with pytest.raises(OptionError, match="layer masking puts nothing"):
        Infidelity(slopes=True, removals=(LayerMasked(), Mean())).run(net, x, 1, x)
    for options in ({"num_samples": 1}, {"patch": 0}):
        with pytest.raises(OptionError):
            Infidelity(**options)
    for options in ({"num_samples": 0}, {"radii": (0.1,)}, {"radii": (0.0, 0.1)}):
        with pytest.raises(OptionError):
            MaxSensitivity(**options)
    for made in (lambda: Blur(width=0.0), lambda: NoisyLinear(noise=-1.0)):
        with pytest.raises(OptionError):
            made()
    made = Deletion(num_steps=3).run(net, x, 1, heat)
    with pytest.raises(OptionError, match="no 'mop' was measured; expected one of map"):
        made.mean("mop", "black")


def test_left_as_found_after_an_error() -> None:
    net, x = opened("resnet")

    class Broken:
        """A metric that fails in the middle."""

        name, position = "broken", None

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 2:
                raise ValueError("mine")
            return output[:, 0]

    removals = (LayerMasked(), Mean())
    for measure in (*(m(removals=removals) for m in CURVES), Infidelity(removals=removals)):
        with pytest.raises(ValueError, match="mine"):
            measure.run(net, x, Broken(), torch.rand(3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(net.module(x), net.module(x))
    assert issubclass(Gradient, Explainer)
    assert issubclass(Deletion, CurveMetric)

"""Path and perturbation methods on a network that looks at two patches of an image only.

The score is what a template finds in one patch (supporting) less what it finds in another
(opposing); a third patch shows the same glyph, brightly, and no weight touches it. Maps must
lie in the two patches with the right signs, and nowhere else.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.gradients.integrated import IntegratedGradients
from patchclamp.methods.attribution.gradients.smooth import (
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from patchclamp.methods.attribution.perturbation.kernel_shap import KernelShap
from patchclamp.methods.attribution.perturbation.lime import Lime
from patchclamp.methods.attribution.perturbation.occlusion import Occlusion

FOR, AGAINST, DISTRACTOR = (
    (slice(0, 4), slice(0, 4)),
    (slice(8, 12), slice(4, 8)),
    (
        slice(4, 8),
        slice(8, 12),
    ),
)
GLYPH = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).float() / 8

SIGNED = (
    IntegratedGradients(),
    Occlusion(window=4),
    Lime(patch=4, num_samples=300),
    KernelShap(patch=4, num_samples=256),
)
UNSIGNED = (SmoothGrad(), SmoothGradSquared(), VarGrad())


class TwoPatches(nn.Module):
    """Two scores: a template's smooth response in two patches of the image, and 0."""

    def __init__(self, glyph: Tensor) -> None:
        super().__init__()
        self.glyph = nn.Parameter(glyph)

    def forward(self, x: Tensor) -> Tensor:
        found = [F.softplus(8 * (x[:, 0][:, *at] * self.glyph).sum((1, 2)) - 1) for at in PATCHES]
        score = found[0] - found[1]
        return torch.stack([score, 0 * score], 1)


PATCHES = (FOR, AGAINST)


def images() -> Tensor:
    x = 0.05 * torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for at, strength in ((FOR, 1.0), (AGAINST, 0.8), (DISTRACTOR, 3.0)):
        x[:, 0, *at] += strength * (GLYPH > 0)
    return x


def mapped(method: Explainer, module: nn.Module) -> Attribution:
    x = images()
    return method.run(patchclamp.open(module.eval(), x), x, 0)


def outside(maps: Tensor) -> Tensor:
    maps = maps.clone()
    for at in PATCHES:
        maps[:, *at] = 0
    return maps


@pytest.mark.parametrize("method", SIGNED, ids=lambda m: m.name)
def test_support_and_opposition_are_found_with_their_signs(method: Explainer) -> None:
    heat = mapped(method, TwoPatches(GLYPH)).heat(signed=True)
    assert bool((heat[:, *FOR].sum((1, 2)) > 0.5).all())
    assert bool((heat[:, *AGAINST].sum((1, 2)) < -0.5).all())
    share = outside(heat).abs().sum((1, 2)) / heat.abs().sum((1, 2))
    # Windows of occlusion overlap the patches, and LIME estimates its zeros from samples.
    most = {Occlusion.name: 0.5, Lime.name: 0.05}.get(method.name, 1e-6)
    assert float(share.max()) < most
    flat = heat[:, *DISTRACTOR].abs().amax((1, 2)) / heat[:, *FOR].abs().amax((1, 2))
    assert float(flat.max()) < max(most, 0.01)


@pytest.mark.parametrize("method", UNSIGNED, ids=lambda m: m.name)
def test_no_slope_where_no_weight_is(method: Explainer) -> None:
    heat = mapped(method, TwoPatches(GLYPH)).heat()
    assert float(outside(heat).max()) == 0.0
    inside = heat[:, *FOR]
    assert float(inside[:, GLYPH > 0].min()) > 0
    assert float(inside[:, GLYPH == 0].max()) == 0.0


@pytest.mark.parametrize("method", [*SIGNED, *UNSIGNED], ids=lambda m: m.name)
def test_a_network_without_the_template_gives_nothing(method: Explainer) -> None:
    found = mapped(method, TwoPatches(torch.zeros(4, 4)))
    assert float(found.values.abs().max()) < 1e-6


@pytest.mark.parametrize("method", SIGNED, ids=lambda m: m.name)
def test_another_network_gives_another_map(method: Explainer) -> None:
    """A method that drew the image would not notice that the template is turned over."""
    there = mapped(method, TwoPatches(GLYPH)).heat(signed=True)
    back = mapped(method, TwoPatches(-GLYPH)).heat(signed=True)
    assert bool((there[:, *FOR].sum((1, 2)) > 0).all())
    assert bool((back[:, *FOR].sum((1, 2)) < 0).all())

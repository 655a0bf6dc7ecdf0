"""Maps find the glyph that the score reads, not the distractor that another channel sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.attribution.cam.cf_cam import CFCAM
from patchclamp.methods.attribution.cam.grad_cam import (
    ActivationMap,
    GradCAM,
    GradCAMPlusPlus,
    SmoothGradCAMPlusPlus,
)
from patchclamp.methods.attribution.cam.layers import Seen
from patchclamp.methods.attribution.cam.score_cam import ScoreCAM
from patchclamp.net import Net

SIDE, GLYPH = 20, 3
CROSS = torch.tensor([[-1.5, 1, -1.5], [1, 1, 1], [-1.5, 1, -1.5]])
SQUARE = torch.tensor([[1.0, 1, 1], [1, -4, 1], [1, 1, 1]])
METHODS = [
    GradCAM(),
    GradCAMPlusPlus(),
    SmoothGradCAMPlusPlus(noise=0.02),
    CFCAM(dominant=0.25, min_channels=2),
]


class GlyphDetector(nn.Module):
    """Class 0 is how much cross there is; two channels see squares, and no class reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, GLYPH, padding=1)
        self.act = nn.ReLU()
        self.spread = nn.MaxPool2d(2 * GLYPH + 1, 1, GLYPH)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.stack([CROSS, 0.9 * CROSS, SQUARE, SQUARE])[:, None])
            self.conv.bias.copy_(torch.tensor([-3.5, -3.5, -6, -6]))
            self.head.weight.copy_(torch.tensor([[3.0, 2.0, 0, 0], [0, 0, 0, 0]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.spread(self.act(self.conv(x))).mean((2, 3)) * 20)
        return made


def _images(glyphs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a glyph in one half and another in the other, and where the two are."""
    generator = torch.Generator().manual_seed(5)
    images = torch.zeros(12, 1, SIDE, SIDE)
    where = torch.zeros(2, 12, SIDE, SIDE, dtype=torch.bool)
    for n in range(12):
        for k in (0, 1):
            row = int(torch.randint(1, SIDE - GLYPH - 1, (1,), generator=generator))
            column = int(torch.randint(1, SIDE // 2 - GLYPH - 1, (1,), generator=generator))
            column += SIDE // 2 * ((k + n) % 2)
            at = slice(row, row + GLYPH), slice(column, column + GLYPH)
            images[n, 0][at] = (glyphs[k] > 0).float()
            where[k, n][at] = True
    return images, where[0], where[1]


@pytest.fixture(scope="module")
def detector() -> Net:
    return patchclamp.open(GlyphDetector().eval(), torch.zeros(2, 1, SIDE, SIDE))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_glyph_is_found_and_the_distractor_is_not(method: ActivationMap, detector: Net) -> None:
    images, glyph, distractor = _images((CROSS, SQUARE))
    made = method.run(detector, images, 0, at="act").values
    heat = made.flatten(1).argmax(1)
    hit = glyph.flatten(1).gather(1, heat[:, None])[:, 0]
    assert bool(hit.all())
    inside, beside = (made * glyph).sum((1, 2)), (made * distractor).sum((1, 2))
    assert bool((inside > 3 * beside).all())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_nothing_is_found_where_no_class_looks(method: ActivationMap, detector: Net) -> None:
    images, _, _ = _images((SQUARE, SQUARE))
    assert not method.run(detector, images, 1, at="act").values.any()


def test_score_cam_finds_the_half_with_the_glyph(detector: Net) -> None:
    """At a layer whose maps cover the glyph; a map that shows one pixel of it masks the rest."""
    images, glyph, _ = _images((CROSS, SQUARE))
    made = ScoreCAM().run(detector, images, 0, at="spread").values
    left = made[:, :, : SIDE // 2].sum((1, 2)) > 3 * made[:, :, SIDE // 2 :].sum((1, 2))
    right = made[:, :, SIDE // 2 :].sum((1, 2)) > 3 * made[:, :, : SIDE // 2].sum((1, 2))
    assert torch.equal(left, glyph[:, :, : SIDE // 2].flatten(1).any(1))
    assert torch.equal(right, ~left)
    # A class that reads nothing weighs all maps alike.
    flat = ScoreCAM(coarse=True).run(detector, images, 1, at="spread").values
    act = detector.record(images, "spread").tensor("spread")
    seen = (act.flatten(2).amax(2) > act.flatten(2).amin(2)).float()
    expected = torch.einsum("nc,ncij->nij", seen / seen.sum(1, keepdim=True), act)
    torch.testing.assert_close(flat, expected)


def test_discarding_noise_keeps_cf_cam_off_lonely_channels(detector: Net) -> None:
    """A channel of noise with a weight of its own spoils Grad-CAM more than CF-CAM."""
    generator = torch.Generator().manual_seed(0)
    cross = torch.zeros(8, 8)
    cross[2:5, 2:5] = (CROSS > 0).float()
    lonely = torch.rand(6, 8, 8, generator=generator) * (
        torch.rand(6, 8, 8, generator=generator) < 0.1
    )
    values = torch.cat([cross.expand(4, 8, 8), lonely])
    grads = torch.ones_like(values)
    seen = Seen(values[None], grads[None], torch.zeros(1))
    made = CFCAM(dominant=0.0, min_channels=3)._combined(seen)[0]
    plain = GradCAM()._combined(seen)[0]
    assert float(made[cross == 0].abs().max()) < 1e-6
    assert float(plain[cross == 0].abs().max()) > 0.1

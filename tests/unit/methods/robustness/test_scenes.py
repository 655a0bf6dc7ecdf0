"""Scenes taken apart and put together: identities, whole-pixel maps, filled holes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import DataError, InputError, OptionError
from patchclamp.methods.robustness.scenes import Scenes, Warp, blurred, centres, filled

SIDE = 12


def scenes() -> Scenes:
    """A 4 x 4 patch of random colours in the middle of a random background."""
    generator = torch.Generator().manual_seed(0)
    plates = torch.rand((2, 3, SIDE, SIDE), generator=generator)
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[:, :, 4:8, 4:8] = 1
    paint = torch.rand((2, 3, SIDE, SIDE), generator=generator)
    return Scenes.of(plates * (1 - masks) + paint * masks, masks, plates)


def expected(made: Scenes, paint: Tensor, mask: Tensor) -> Tensor:
    return made.plates * (1 - mask) + paint * mask


def test_doing_nothing_gives_the_image() -> None:
    made = scenes()
    torch.testing.assert_close(made.composed, made.images)
    torch.testing.assert_close(made.moved(Warp()), made.images)
    torch.testing.assert_close(made.with_plates(made.plates).images, made.images)


def test_whole_pixels_quarter_turns_and_mirrors_are_exact() -> None:
    made = scenes()
    paint, mask = made.images, made.masks
    cases = {
        "down and left": (
            Warp(shift=(2 / SIDE, -3 / SIDE)),
            paint.roll((2, -3), (2, 3)),
            mask.roll((2, -3), (2, 3)),
        ),
        "quarter turn": (Warp(degrees=90), paint.rot90(1, (2, 3)), mask),
        "mirror": (Warp(mirrored=True), paint.flip(3), mask),
    }
    for name, (warp, moved, where) in cases.items():
        torch.testing.assert_close(
            made.moved(warp), expected(made, moved, where), rtol=0, atol=1e-5, msg=name
        )
        torch.testing.assert_close(
            made.moved(warp, warp.back()), made.images, rtol=0, atol=1e-5, msg=name
        )


def test_a_scale_changes_the_area_by_its_square_and_keeps_the_middle() -> None:
    made = scenes()
    for scale in (0.5, 1.5):
        mask = Warp(scale=scale).of(made.masks, made.masks)
        assert float(mask[0].sum()) == pytest.approx(16 * scale**2, rel=0.15)
        torch.testing.assert_close(centres(mask), centres(made.masks), rtol=0, atol=1e-4)


def test_what_leaves_the_image_is_lost_on_the_way_back_too() -> None:
    made = scenes()
    warp = Warp(shift=(0.5, 0.0))
    kept = warp.of(made.masks, made.masks)
    assert float(kept[0].sum()) == pytest.approx(8)
    assert float(warp.back().of(kept, kept)[0].sum()) == pytest.approx(8)


def test_holes_are_filled_from_around_them() -> None:
    made = scenes()
    flat = torch.full_like(made.images, 0.3)
    shown = flat * (1 - made.masks) + 0.9 * made.masks
    torch.testing.assert_close(filled(shown, made.masks), flat, rtol=0, atol=1e-5)
    own = filled(made.images, made.masks)
    torch.testing.assert_close(own * (1 - made.masks), made.images * (1 - made.masks))
    ramp = torch.arange(SIDE).float().expand(1, 1, SIDE, SIDE) / SIDE
    guess = filled(ramp * (1 - made.masks[:1]), made.masks[:1])
    assert float((guess - ramp).abs().max()) < 0.2


def test_a_blur_keeps_what_is_flat_and_the_mean() -> None:
    flat = torch.full((1, 2, SIDE, SIDE), 0.4)
    torch.testing.assert_close(blurred(flat, 2.0), flat)
    noise = torch.rand(1, 1, SIDE, SIDE)
    assert float(blurred(noise, 2.0).std()) < 0.3 * float(noise.std())


def test_bad_input_is_said() -> None:
    made = scenes()
    with pytest.raises(InputError, match="a mask for each"):
        Scenes.of(made.images, made.masks[:1])
    with pytest.raises(InputError, match="0 to 1"):
        Scenes.of(made.images, 2 * made.masks)
    with pytest.raises(InputError, match="scenes are images"):
        Scenes.of(made.images[0], made.masks)
    with pytest.raises(InputError, match="NaN"):
        Scenes.of(made.images * torch.nan, made.masks)
    with pytest.raises(DataError, match="nowhere"):
        Scenes.of(made.images, 0 * made.masks)
    with pytest.raises(InputError, match="backgrounds"):
        Scenes.of(made.images, made.masks, made.plates[:1])
    with pytest.raises(OptionError, match="warp"):
        Warp(scale=0)
    with pytest.raises(OptionError, match="no way back"):
        Warp(mirrored=True, degrees=10).back()
    with pytest.raises(OptionError, match="blur"):
        blurred(made.images, 0)

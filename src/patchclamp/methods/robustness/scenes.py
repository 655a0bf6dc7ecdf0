"""Images taken apart into an object, its mask and what is behind it, and put together again.

Edits are in closed form: object and mask go through one affine map, the background through
another or through a change of its own, and the two are blended by the mask. Everything but the
mask's soft edge therefore stays what it was, and each edit has a null made by the same steps.

Source: the attributes are those of ImageNet-E, Li et al. 2023, arXiv 2303.17096, which edits by
diffusion; here nothing is generated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.core.errors import DataError, InputError, OptionError


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenes:
    """Images with the masks of their objects.

    Shapes: images, plates (n, channel, row, column); masks (n, 1, row, column) from 0 to 1.

    Attributes:
        images: as they are.
        masks: 1 on the object; values between at its edge.
        plates: what is behind the objects, everywhere; `Scenes.of` fills it in where unknown.
    """

    images: Tensor
    masks: Tensor
    plates: Tensor

    @classmethod
    def of(cls, images: Tensor, masks: Tensor, plates: Tensor | None = None) -> Scenes:
        """Checked scenes.

        Args:
            plates: the true backgrounds; by default the hole is filled with what is around it,
                by averages over ever wider windows.

        Raises:
            InputError: shapes that do not fit, NaN, mask values outside 0 to 1.
            DataError: an object that is nowhere, or everywhere.
        """
        shape = tuple(images.shape)
        if images.ndim != 4 or not images.is_floating_point() or not len(images):
            raise InputError(
                "scenes are images",
                got=f"{images.dtype} of shape {shape}",
                expected="real numbers (n, channel, row, column)",
            )
        if tuple(masks.shape) != (shape[0], 1, *shape[2:]):
            raise InputError(
                "a mask for each image",
                got=f"shape {tuple(masks.shape)}",
                expected=f"{(shape[0], 1, *shape[2:])}",
            )
        if plates is not None and plates.shape != images.shape:
            raise InputError("backgrounds are of the images' shape", got=f"{tuple(plates.shape)}")
        masks = masks.to(images)
        given = [images, masks] if plates is None else [images, masks, plates]
        if not all(bool(torch.isfinite(x).all()) for x in given):
            raise InputError("images, masks or backgrounds hold NaN or infinity")
        if float(masks.min()) < 0 or float(masks.max()) > 1:
            raise InputError("masks go from 0 to 1", got=f"{masks.min():g} to {masks.max():g}")
        area = masks.flatten(1).mean(1)
        odd = ((area <= 0) | (area >= 1)).nonzero().flatten()
        if len(odd):
            raise DataError(f"the object of image {int(odd[0])} is nowhere, or everywhere")
        behind = filled(images, masks) if plates is None else plates.to(images)
        return cls(images=images, masks=masks, plates=behind)

    def pick(self, index: Tensor) -> Scenes:
        """Some of them."""
        return Scenes(images=self.images[index], masks=self.masks[index], plates=self.plates[index])

    @property
    def composed(self) -> Tensor:
        """Object over background: the images, where the backgrounds are the true ones."""
        return self.plates + self.masks * (self.images - self.plates)

    def with_plates(self, plates: Tensor) -> Scenes:
        """The same objects before other backgrounds: objects keep only what the masks hold."""
        made = replace(self, plates=plates)
        return replace(made, images=made.composed)

    def moved(self, *warps: Warp) -> Tensor:
        """Images with the object alone mapped, by one map after another.

        What is transported is the mask and the object times the mask, so that no background
        comes along at the edge of the mask.
        """
        weight, paint = self.masks, self.masks * self.images
        for warp in warps:
            weight, paint = warp.of(weight, weight), warp.of(paint, weight)
        return self.plates * (1 - weight) + paint


@dataclass(frozen=True, kw_only=True)
class Warp:
    """An affine map of an object about its own centre of mass; what leaves the image is lost.

    Attributes:
        scale: of its sides.
        degrees: counter-clockwise.
        shift: (rows, columns), in shares of the image's sides.
        mirrored: left and right exchanged.
    """

    scale: float = 1.0
    degrees: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False

    def __post_init__(self) -> None:
        numbers = (self.scale, self.degrees, *self.shift)
        if not all(math.isfinite(v) for v in numbers) or self.scale <= 0:
            raise OptionError("a warp is finite, with a scale above 0", got=f"{self}")

    def of(self, x: Tensor, masks: Tensor) -> Tensor:
        """Mapped values, bilinear, 0 from outside: (n, channel, row, column)."""
        return functional.grid_sample(
            x, self._grid(x, masks), padding_mode="zeros", align_corners=False
        )

    def back(self) -> Warp:
        """The opposite map, for objects that have been through this one.

        Raises:
            OptionError: for a rotation that is mirrored too.
        """
        if self.mirrored and self.degrees:
            raise OptionError(
                "a mirrored rotation has no way back of this form", hint="one after the other"
            )
        return Warp(
            scale=1 / self.scale,
            degrees=-self.degrees,
            shift=(-self.shift[0], -self.shift[1]),
            mirrored=self.mirrored,
        )

    def _grid(self, x: Tensor, masks: Tensor) -> Tensor:
        """Where each place comes from, as `grid_sample` counts: (n, row, column, 2)."""
        height, width = x.shape[2:]
        centre = centres(masks)
        rows = torch.arange(height, dtype=torch.float64)[None, :, None]
        columns = torch.arange(width, dtype=torch.float64)[None, None, :]
        up = rows - centre[:, 0, None, None] - self.shift[0] * height
        right = columns - centre[:, 1, None, None] - self.shift[1] * width
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle) / self.scale, math.sin(angle) / self.scale
        from_row = cos * up + sin * right
        from_column = -sin * up + cos * right
        if self.mirrored:
            from_column = -from_column
        from_row = from_row + centre[:, 0, None, None]
        from_column = from_column + centre[:, 1, None, None]
        u = (2 * from_column + 1) / width - 1
        v = (2 * from_row + 1) / height - 1
        return torch.stack([u, v], -1).to(x)


def centres(masks: Tensor) -> Tensor:
    """Centres of mass, (n, 2) float64 as row and column."""
    mass = masks[:, 0].double()
    total = mass.sum((1, 2))
    rows = torch.arange(mass.shape[1], dtype=torch.float64)
    columns = torch.arange(mass.shape[2], dtype=torch.float64)
    row = (mass.sum(2) * rows).sum(1) / total
    column = (mass.sum(1) * columns).sum(1) / total
    return torch.stack([row, column], 1)


def filled(images: Tensor, masks: Tensor) -> Tensor:
    """Backgrounds with the hole filled by averages of what is around it, near before far."""
    seen = 1 - masks
    total, weight, size = images * seen, seen, 3
    made, known = total, seen
    largest = 2 * max(images.shape[2:])
    while bool((known < 1e-6).any()) and size <= largest:
        around = functional.avg_pool2d(total, size, 1, size // 2, count_include_pad=False)
        share = functional.avg_pool2d(weight, size, 1, size // 2, count_include_pad=False)
        new = (known < 1) & (share > 1e-6)
        guess = around / share.clamp(min=1e-6)
        made = torch.where(new, made + (1 - known) * guess, made)
        known = torch.where(new, torch.ones_like(known), known)
        size = 2 * size - 1
    return made


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with edges mirrored; `sigma` in pixels."""
    if not 0 < sigma < math.inf:
        raise OptionError("a blur is wider than 0", got=f"{sigma:g}")
    reach = min(math.ceil(3 * sigma), min(x.shape[2:]) - 1)
    places = torch.arange(-reach, reach + 1, dtype=x.dtype)
    bell = torch.exp(-places.square() / (2 * sigma**2))
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    padded = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
    wide = functional.conv2d(padded, bell, groups=x.shape[1])
    return functional.conv2d(wide, bell.transpose(2, 3), groups=x.shape[1])

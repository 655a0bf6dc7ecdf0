"""Scenes with a planted background shortcut, and the same scenes without it.

An object on a plain, slightly noisy background, the class being the object's form. In the world
with the shortcut every class has a brightness of background of its own, which is by far the
easier thing to learn; in the world without, the brightness is drawn for each image alone. A network
trained in the first must lose accuracy when backgrounds are exchanged between classes; one trained
in the second must not.

Source: shortcut features as in Geirhos et al. 2020, arXiv 2004.07780; the bench is that of
`methods.robustness.attributes`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.scenes import Scenes
from patchclamp.truth.attribution.fitting import Recipe, convolutional, fitted

SIDE = 16
_GLYPH = 7
_LEVELS = (0.0, 0.2, 0.4, 0.6)
"""Brightness of backgrounds, one for each class where there is a shortcut."""
_PAINT = 0.9
_NOISE = 0.02
NUM_CLASSES = len(_LEVELS)


def planted_scenes(num: int, *, shortcut: bool, seed: int) -> tuple[Scenes, Tensor]:
    """Scenes (num, 1, 16, 16) from 0 to 1, and labels (num,): bar, post, cross, frame."""
    if num < NUM_CLASSES:
        raise OptionError("a scene of each class or more", got=str(num))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % NUM_CLASSES
    levels = labels
    if not shortcut:
        levels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    brightness = torch.tensor(_LEVELS)[levels][:, None, None, None]
    noise = _NOISE * torch.rand((num, 1, SIDE, SIDE), generator=generator)
    plates = (brightness + noise).expand(num, 1, SIDE, SIDE)
    places = torch.randint(SIDE - _GLYPH + 1, (num, 2), generator=generator)
    masks = torch.zeros(num, 1, SIDE, SIDE)
    glyphs = _glyphs()
    for index, (row, at) in enumerate(places.tolist()):
        masks[index, 0, row : row + _GLYPH, at : at + _GLYPH] = glyphs[int(labels[index])]
    images = plates * (1 - masks) + _PAINT * masks
    return Scenes.of(images, masks, plates.clone()), labels


def trained(*, shortcut: bool, seed: int, num: int = 600, epochs: int = 8) -> nn.Module:
    """A small convolutional network trained on planted scenes, in eval mode."""
    scenes, labels = planted_scenes(num, shortcut=shortcut, seed=seed)
    recipe = Recipe(epochs=epochs, rows=32)
    return fitted(convolutional, scenes.images, labels, NUM_CLASSES, recipe, seed=seed)


def _glyphs() -> Tensor:
    """(class, row, column), about equally large."""
    made = torch.zeros(NUM_CLASSES, _GLYPH, _GLYPH)
    made[0, 2:5] = 1
    made[1, :, 2:5] = 1
    made[2, 3] = 1
    made[2, :, 3] = 1
    made[3, 0], made[3, -1], made[3, :, 0], made[3, :, -1] = 1, 1, 1, 1
    return made

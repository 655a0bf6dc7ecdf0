"""Images made into what a network takes: resized, cropped, scaled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.core.errors import DataError
from patchclamp.model.sources import Layout, Preprocessing


def prepared(images: Tensor, how: Preprocessing) -> Tensor:
    """Images (row, channel, height, width) in [0, 1] as the network takes them.

    Raises:
        DataError: the images have another number of channels.
    """
    if images.shape[1] != how.channels:
        raise DataError(
            "the images have the wrong number of channels",
            got=str(images.shape[1]),
            expected=str(how.channels),
            hint="save them with that many channels: (row, channel, height, width)",
        )
    whole = (round(how.height / how.crop), round(how.width / how.crop))
    if tuple(images.shape[2:]) != whole:
        images = functional.interpolate(
            images, size=whole, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    top, left = (whole[0] - how.height) // 2, (whole[1] - how.width) // 2
    images = images[:, :, top : top + how.height, left : left + how.width]
    mean = torch.tensor(how.mean).reshape(1, -1, 1, 1)
    std = torch.tensor(how.std).reshape(1, -1, 1, 1)
    images = (images * how.scale - mean) / std
    return images.permute(0, 2, 3, 1) if how.layout is Layout.CHANNELS_LAST else images

"""Edges of images: where brightness changes, which needs no network to see.

Source: Sobel & Feldman 1968, as printed in Duda & Hart 1973, p. 271.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, pad

from patchclamp.core.errors import InputError

_KERNEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))


def edge_strength(x: Tensor) -> Tensor:
    """Length of the slope at each place, by Sobel's kernels or, along one axis, by differences.

    Beyond the border the image goes on as at its border, so that the border itself is no edge.

    Shapes: (..., row, column) or, of three axes, (num, channel, position); the same come back.
    """
    if x.ndim < 3:
        raise InputError("edges need an axis of space", got=str(tuple(x.shape)))
    kernel = torch.tensor(_KERNEL, dtype=x.dtype, device=x.device)[None, None]
    if x.ndim == 3:
        flat = pad(x.flatten(0, 1)[:, None], (1, 1), mode="replicate")
        return conv1d(flat, kernel[:, :, 1]).abs().reshape(x.shape)
    flat = pad(x.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="replicate")
    across, down = conv2d(flat, kernel), conv2d(flat, kernel.transpose(2, 3))
    return (across**2 + down**2).sqrt().reshape(x.shape)

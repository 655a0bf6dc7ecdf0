"""Ranges of every activation's input over a box, by interval arithmetic rounded outward.

Better ranges from any other sound method can be given to the Lipschitz methods instead.
Source: Moore 1966; Gowal et al. 2018 (boxes through linear layers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz.layers import (
    Activation,
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Layer,
    Linear,
    Residual,
)
from patchclamp.methods.bounds.lipschitz.rounding import UNIT

Box = tuple[Tensor, Tensor]
_TINY = 1e-290


def check_box(box: Box, num_inputs: int) -> Box:
    """The box in float64.

    Raises:
        InputError: wrong shape, NaN, infinite, or lower above upper.
    """
    lower, upper = (x.detach().to("cpu", torch.float64).flatten() for x in box)
    if lower.shape != (num_inputs,) or upper.shape != (num_inputs,):
        raise InputError(
            "a box does not fit the chain",
            got=f"{len(lower)} and {len(upper)} elements",
            expected=f"{num_inputs} each",
        )
    if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        raise InputError("a box has a bound that is NaN or infinite")
    if bool((lower > upper).any()):
        raise InputError("an empty box: a lower bound is above its upper bound")
    return lower, upper


def activation_ranges(chain: Chain, box: Box) -> list[Box]:
    """Bounds of the input of every one of `chain.activations` over the box.

    Shapes: box, two of (num_inputs,); ranges, two of (unit,) each.
    Holds over the reals.
    """
    found: list[Box] = []
    _through(chain.layers, check_box(box, chain.num_inputs), found)
    return found


def _through(layers: Sequence[Layer], box: Box, found: list[Box]) -> Box:
    for layer in layers:
        match layer:
            case Linear(weight=weight, bias=bias):
                box = _linear(weight, bias, box)
            case Residual(body=body, skip=skip):
                left = _through(skip, box, found)
                right = _through(body, box, found)
                box = _wider(left[0] + right[0], left[1] + right[1], 1)
            case _:
                found.append(box)
                box = _activation(layer, box)
    return box


def _wider(lower: Tensor, upper: Tensor, num_operations: int) -> Box:
    """Outward by the rounding of that many operations on numbers of the results' size."""
    return (
        lower - (num_operations * UNIT * lower.abs() + _TINY),
        upper + (num_operations * UNIT * upper.abs() + _TINY),
    )


def _linear(weight: Tensor, bias: Tensor | None, box: Box) -> Box:
    lower, upper = box
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    offset = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias
    size = weight.abs() @ torch.maximum(lower.abs(), upper.abs()) + offset.abs()
    error = (2 * weight.shape[1] + 8) * UNIT * size * (1 + 2.0**-20) + _TINY
    return up @ lower + down @ upper + offset - error, up @ upper + down @ lower + offset + error


def _activation(activation: Activation, box: Box) -> Box:
    lower, upper = box
    match activation:
        case Elementwise(increasing=True):
            # 16: the functions are good to a few units in the last place.
            return _wider(activation(lower), activation(upper), 16)
        case Elementwise():
            # f(lower) plus slopes times width: holds for any function whose slopes are known.
            start = activation(lower)
            width = upper - lower
            low = start + min(activation.slopes[0], 0.0) * width
            high = start + max(activation.slopes[1], 0.0) * width
            size = start.abs() + width * max(abs(s) for s in activation.slopes)
            return low - 16 * UNIT * size - _TINY, high + 16 * UNIT * size + _TINY
        case GroupSort():
            return activation(lower), activation(upper)  # sorting is increasing, and exact
        case Householder():
            return _householder(activation, box)
    raise InputError(f"no interval rule for activation {type(activation).__name__}")


def _householder(activation: Householder, box: Box) -> Box:
    """x - 2 v min(v . x, 0) / |v|^2 element by element."""
    v = activation.directions.to("cpu", torch.float64)
    lower, upper = (x.unflatten(0, tuple(v.shape)) for x in box)
    up, down = v.clamp(min=0), v.clamp(max=0)
    size = (v.abs() * torch.maximum(lower.abs(), upper.abs())).sum(1)
    error = (2 * v.shape[1] + 8) * UNIT * size
    least = ((up * lower + down * upper).sum(1) - error).clamp(max=0)
    most = ((up * upper + down * lower).sum(1) + error).clamp(max=0)
    scale = 2 * v / v.square().sum(1, keepdim=True)
    ends = torch.stack([-scale * least[:, None], -scale * most[:, None]])
    low, high = lower + ends.min(0).values, upper + ends.max(0).values
    room = (4 * v.shape[1] + 32) * UNIT * (ends.abs().max(0).values + lower.abs() + upper.abs())
    return (low - room).flatten(), (high + room).flatten()

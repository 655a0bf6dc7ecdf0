"""Feed-forward chains as data: what the Lipschitz methods work on.

A chain is a tuple of layers, each one of: `Linear`; an activation (`Elementwise`,
`GroupSort`, `Householder`); `Residual`, the sum of two branches. Weights are float64;
a network's float32 weights are kept exactly.

Shapes: a chain maps (batch, num_inputs) to (batch, num_outputs).
Source: Anil et al. 2019 (GroupSort, MaxMin); Singla et al. 2022 (Householder).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp.core.errors import InputError

_LARGEST = 1e30
"""Weights above it could overflow float64 in products over layers."""


class Activation(ABC):
    """A nonlinearity that keeps its input's width."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: (batch, unit) to (batch, unit)."""

    def check(self, width: int) -> None:
        """Refuse a width that the activation cannot take. Most take any."""
        return None


@dataclass(frozen=True, kw_only=True)
class Elementwise(Activation):
    """The same function of every unit, with known bounds of its slope.

    Attributes:
        name: for messages.
        function: the function.
        slopes: smallest and largest slope between any two points.
        slopes_on: slopes on elementwise intervals, where more is known; takes lower and
            upper, returns least and largest slope, all (unit,). Must be outward rounded.
        increasing: it never decreases, so that it maps interval ends to interval ends.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slopes: tuple[float, float]
    slopes_on: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    increasing: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def check(self, width: int) -> None:
        """Refuse slopes that are not an interval."""
        low, high = self.slopes
        if not (-float("inf") < low <= high < float("inf")):
            raise InputError(
                f"slopes of activation '{self.name}' are no interval", got=f"[{low}, {high}]"
            )


@dataclass(frozen=True, kw_only=True)
class GroupSort(Activation):
    """Sorts neighbouring units in groups of `size`; MaxMin is size 2, descending."""

    size: int
    descending: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.size))
        ordered: Tensor = groups.sort(-1, descending=self.descending).values
        return ordered.flatten(-2)

    def check(self, width: int) -> None:
        """Refuse a width that is no multiple of the group size."""
        if self.size < 1 or width % self.size:
            raise InputError(
                f"GroupSort of size {self.size} cannot take {width} units",
                expected=f"a multiple of {self.size}",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Householder(Activation):
    """Reflects a group of neighbouring units onto the half-space v . x >= 0.

    Attributes:
        directions: v of every group, of any length but zero; (group, unit of group).
    """

    directions: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        v = self.directions.to(x.dtype)
        groups = x.unflatten(-1, tuple(v.shape))
        along = (groups * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
        reflected: Tensor = groups - 2 * v * along.clamp(max=0)
        return reflected.flatten(-2)

    def check(self, width: int) -> None:
        """Refuse directions of length zero, or of other sizes than the units."""
        v = self.directions
        if v.ndim != 2 or v.numel() != width:
            raise InputError(
                f"Householder directions of shape {tuple(v.shape)} cannot take {width} units",
                expected="(group, unit of group) that multiply to the width",
            )
        if not bool(torch.isfinite(v).all()) or bool((v.square().sum(1) == 0).any()):
            raise InputError("a Householder direction is zero or not finite")


@dataclass(frozen=True, eq=False)
class Linear:
    """y = W x + b. Shapes: weight (output, input), bias (output,) or None for zero."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, x, rank in (("weight", self.weight, 2), ("bias", self.bias, 1)):
            if x is None:
                continue
            if x.ndim != rank or x.numel() == 0:
                raise InputError(f"a {name} of shape {tuple(x.shape)}", expected=f"{rank} axes")
            exact = x.detach().to("cpu", torch.float64)
            if not bool(torch.isfinite(exact).all()):
                raise InputError(f"a {name} holds NaN or infinity", hint="look at the checkpoint")
            largest = float(exact.abs().max())
            if largest > _LARGEST:
                raise InputError(
                    f"a {name} holds {largest:.0e}", expected=f"at most {_LARGEST:.0e}"
                )
            object.__setattr__(self, name, exact)
        if self.bias is not None and self.bias.shape[0] != self.weight.shape[0]:
            raise InputError(
                "a bias does not fit its weight",
                got=f"{tuple(self.bias.shape)} and {tuple(self.weight.shape)}",
            )

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(x.dtype)


@dataclass(frozen=True)
class Residual:
    """The sum of two branches of the same input.

    Attributes:
        body: the layers of one branch.
        skip: the layers of the other; none for the identity.
    """

    body: tuple[Layer, ...]
    skip: tuple[Layer, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return through(self.skip, x) + through(self.body, x)


Layer: TypeAlias = "Linear | Activation | Residual"


@dataclass(frozen=True)
class Chain:
    """Layers from input to output, checked against each other.

    Attributes:
        layers: in order of the forward pass.
        num_inputs: width of the input.
        num_outputs: width of the output; computed.

    Raises:
        InputError: widths that do not fit, NaN weights, no layer.
    """

    layers: tuple[Layer, ...]
    num_inputs: int
    num_outputs: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a chain without layers", expected="at least one")
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "num_outputs", _width(self.layers, self.num_inputs))

    def __call__(self, x: Tensor) -> Tensor:
        return through(self.layers, x)

    @property
    def activations(self) -> list[Activation]:
        """Every activation, in the order in which all results list them: a residual's skip first.

        An activation object that is used twice is listed twice.
        """
        return list(_activations(self.layers))


def through(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The value behind the layers."""
    for layer in layers:
        x = layer(x)
    return x


def _activations(layers: Sequence[Layer]) -> Iterator[Activation]:
    for layer in layers:
        if isinstance(layer, Activation):
            yield layer
        elif isinstance(layer, Residual):
            yield from _activations(layer.skip)
            yield from _activations(layer.body)


def _width(layers: Sequence[Layer], width: int) -> int:
    """Width behind the layers, checked on the way."""
    for number, layer in enumerate(layers):
        match layer:
            case Linear(weight=weight):
                if weight.shape[1] != width:
                    raise InputError(
                        f"layer {number} takes {weight.shape[1]} units", got=f"{width}"
                    )
                width = weight.shape[0]
            case Residual(body=body, skip=skip):
                widths = _width(skip, width), _width(body, width)
                if widths[0] != widths[1]:
                    raise InputError(f"branches of layer {number} end in widths {widths}")
                width = widths[0]
            case Activation():
                layer.check(width)
            case _:
                raise InputError(
                    f"layer {number} is no layer of a chain",
                    got=type(layer).__name__,
                    expected="Linear, Residual, Elementwise, GroupSort or Householder",
                )
    return width

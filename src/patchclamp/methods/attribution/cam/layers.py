"""What class activation maps share: the layer, its values with their gradients, upsampling.

A class activation map is a weighted sum of a layer's maps, one for each channel. The methods
differ only in the weights; where the maps come from and how the sum is laid over the input is
the same for all, and is here.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchclamp.core.errors import InputError, OptionError, SiteError, TargetError
from patchclamp.core.sites import Site, Tap
from patchclamp.engine.axes import name_axes
from patchclamp.engine.targets import Metric, Target, as_metric, measured
from patchclamp.methods.attribution.base import SPACE
from patchclamp.methods.scoring import Pace, Passes
from patchclamp.model.inputs import BATCH, Call
from patchclamp.net import Net

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_FEW_CHANNELS = 4
_SHOWN = 8


class Seen(NamedTuple):
    """Of some rows: values and gradients (n, channel, *space), scores (n,)."""

    values: Tensor
    grads: Tensor
    scores: Tensor


@dataclass(eq=False)
class Layer:
    """A network's layer with spatial axes, as class activation maps look at it.

    Attributes:
        net: left as found, whatever happens.
        call: the inputs.
        tap: the site of the layer.
        target: what is explained.
        num: how many examples.
        space: names of the layer's spatial axes.
        size: of the input along these; None where it has others.
        passes: rows that were run so far.
    """

    net: Net
    call: Call
    tap: Tap
    target: Metric | Target
    num: int
    space: tuple[str, ...]
    size: tuple[int, ...] | None
    passes: Passes = field(default_factory=Passes)

    @classmethod
    def of(cls, net: Net, inputs: object, target: Metric | Target, *, at: str | None) -> Layer:
        """Find the layer and check the inputs.

        Raises:
            SiteError: no such site, several, or one without spatial axes.
            InputError: the inputs are not those of the network, or hold NaN.
        """
        call = net.call(inputs)
        if any(m.training for m in net.module.modules()):
            warnings.warn(
                f"{net.name} is in training mode: dropout and batch norm change from run to run "
                "(call net.module.eval())",
                stacklevel=3,
            )
        tap = default_layer(net) if at is None else _asked(net, at)
        space = tuple(a for a in tap.axes if a in SPACE)
        sizes = _input_space(net, call)
        size = tuple(sizes[a] for a in space) if set(space) == set(sizes) else None
        dims = net.call_dims(call)
        sizes_of_batch = [
            x.shape[d.index(BATCH)] for x, d in zip(call.tensors(), dims, strict=True) if BATCH in d
        ]
        num = sizes_of_batch[0] if sizes_of_batch else 1
        return cls(net, call, tap, target, num, space, size)

    def rows(self, index: Tensor) -> Call:
        """The inputs of some examples, each as often as it is listed."""
        return self.call.rows(index, self.net.call_dims(self.call))

    def gradients(self, index: Tensor, x: Tensor | None = None) -> Seen:
        """Values, gradients and scores of some examples in one pass.

        Args:
            index: which examples the rows belong to.
            x: their first input of real numbers, where it is not the examples' own.

        Raises:
            TargetError: the target is not one finite scalar per row, does not depend on the
                layer, or its gradient is not finite.
        """
        given = self.rows(index)
        if x is not None:
            tensors = given.tensors()
            number = next(i for i, old in enumerate(tensors) if old.is_floating_point())
            tensors[number] = x
            given = given.mapped(tensors)
        made = self.net.gradients(given, self.tap.label, lambda out: self.score(out, index))
        self.passes.forwards += len(index)
        self.passes.backwards += len(index)
        values, grads = made.acts.tensor(self.tap.label), made.grads.tensor(self.tap.label)
        if not bool(torch.isfinite(grads).all()):
            raise TargetError(
                f"the gradient with respect to '{self.tap.label}' of {self.net.name} is not finite",
                hint="a root or a logarithm at 0 on the way, or numbers too large for the type",
            )
        return Seen(self.channels_first(values), self.channels_first(grads), made.target)

    def plain(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Values (num, channel, *space) and scores (num,) of all examples, without gradients."""
        parts, scores = [], []
        for at in paced(self.num, batch_size):
            index = torch.arange(at.start, at.stop)
            made = self.net.run(self.rows(index), record=self.tap.label)
            parts.append(self.channels_first(made.acts.tensor(self.tap.label)))
            scores.append(self.score(made.output, index))
            self.passes.forwards += len(index)
        return torch.cat(parts), torch.cat(scores)

    def score(self, output: Tensor, index: Tensor) -> Tensor:
        """The target of rows of an output that belong to these examples."""
        return measured(as_metric(self.target, positions=output.ndim == 3), output, index)

    def channels_first(self, x: Tensor) -> Tensor:
        """All axes but the batch and the spatial ones as one axis of channels."""
        axes = self.tap.axes
        batch = axes.index("batch")
        rest = [i for i, a in enumerate(axes) if i != batch and a not in self.space]
        x = x.permute(batch, *rest, *(axes.index(a) for a in self.space))
        return x.flatten(1, len(rest)) if rest else x[:, None]

    def upsampled(self, maps: Tensor) -> Tensor:
        """Maps (num, *space) at the input's resolution.

        Raises:
            SiteError: the layer's axes are not the input's.
        """
        if self.size is None:
            raise SiteError(
                f"maps at '{self.tap.label}' of {self.net.name} cannot be laid over its input",
                got=f"axes {', '.join(self.space)} at the site, others at the input",
                hint="coarse=True gives the map as the layer has it",
            )
        return resized(maps[:, None], self.size)[:, 0]


def resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear interpolation of maps (n, channel, *space) to another size."""
    if tuple(maps.shape[2:]) == size:
        return maps
    mode = _MODES[len(size)]
    return nn.functional.interpolate(maps, size=size, mode=mode, align_corners=False)


def paced(num: int, batch_size: int) -> Iterator[slice]:
    """Slices of 0..num, as many rows at a time as is fastest but no more than `batch_size`.

    Raises:
        OptionError: no row at a time.
    """
    if batch_size < 1:
        raise OptionError("batch_size must be at least 1", got=str(batch_size))
    pace, start = Pace(batch_size), 0
    while start < num:
        at = slice(start, min(num, start + pace.size))
        began = time.process_time()
        yield at
        pace.took(at.stop - at.start, time.process_time() - began)
        start = at.stop


def default_layer(net: Net) -> Tap:
    """The last value of the shape that the last convolution gives, before anything pools it.

    So it is behind the norm, the activation and the residual sum of the last block.

    Raises:
        SiteError: there is no convolution with spatial axes, or tokens are made of its values.
    """
    sites = _spatial(net)
    table = net.quick_sites()
    modules = dict(net.module.named_modules())
    last = next(
        (s for s in reversed(sites) if isinstance(modules[s.module], nn.modules.conv._ConvNd)), None
    )
    if last is None or _leaves_space(last, sites):
        reason = "no convolution" if last is None else "no convolution where its output is made"
        raise SiteError(
            f"{net.name} has {reason}, so there is no layer for a class activation map by default",
            hint=_would_do(sites),
        )
    same = [s for s in sites if s.order >= last.order and s.shape == last.shape]
    return table[same[-1].address]


def _leaves_space(last: Site, sites: list[Site]) -> bool:
    """What follows is laid out otherwise, as the tokens of a transformer after its patches."""
    own = {a for a in last.axes if a in SPACE}
    return any(s.order > last.order and {a for a in s.axes if a in SPACE} != own for s in sites)


def _asked(net: Net, at: str) -> Tap:
    if at == "input":
        raise SiteError(
            "a class activation map is made at a layer, not at the input",
            hint=_would_do(_spatial(net)),
        )
    taps = net.taps(at)
    if len(taps) != 1:
        raise SiteError(
            f"'{at}' is {len(taps)} sites of {net.name}",
            expected="one",
            hint="one of " + ", ".join(t.label for t in taps[:_SHOWN]),
        )
    tap = taps[0]
    if not _has_space(tap.axes, tap.shape):
        shape = ", ".join(f"{a}={s}" for a, s in zip(tap.axes, tap.shape, strict=True))
        raise SiteError(
            f"'{tap.label}' of {net.name} has no spatial axes, which a class activation map needs",
            got=f"({shape})",
            expected="rows and columns, or positions",
            hint=_would_do(_spatial(net)),
        )
    return tap


def _spatial(net: Net) -> list[Site]:
    """Outputs of modules with spatial axes, in the order of the forward pass."""
    found = [
        s
        for s in net.quick_sites()
        if s.operation == "output" and s.module and _has_space(s.axes, s.shape)
    ]
    return sorted(found, key=lambda s: s.order)


def _has_space(axes: tuple[str, ...], shape: tuple[int | str, ...]) -> bool:
    sizes = [s for a, s in zip(axes, shape, strict=True) if a in SPACE]
    known = math.prod(s for s in sizes if isinstance(s, int))
    return "batch" in axes and bool(sizes) and (known > 1 or any(isinstance(s, str) for s in sizes))


def _would_do(sites: list[Site]) -> str:
    if not sites:
        return "no site of this network has spatial axes: use a gradient or occlusion"
    return "at= one of " + ", ".join(s.address for s in sites[-_SHOWN:])


def _input_space(net: Net, call: Call) -> dict[str, int]:
    """Sizes of the input's spatial axes, by name; of the tokens where there are no numbers."""
    tensors, dims = call.tensors(), net.call_dims(call)
    if not tensors:
        raise InputError(f"the inputs of {net.name} hold no tensor")
    number = next((i for i, x in enumerate(tensors) if x.is_floating_point()), 0)
    x = tensors[number]
    channels = x.ndim > 2 and x.shape[1] <= _FEW_CHANNELS
    names = name_axes(tuple(dims[number]), channels=channels)
    return {a: n for a, n in zip(names, x.shape, strict=True) if a in SPACE}

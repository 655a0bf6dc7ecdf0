"""One score a row as a function of the value at one site, in pieces that suit the machine.

Everything that asks "what if this value were different" and wants numbers or gradients back
works through a `Scorer`: path integrals, perturbed copies, attacks. It runs the live network,
keeps the rows of a batch apart, counts passes, and chooses how many rows to run at a time.

How many rows that is never changes a result: samples are drawn by the caller, row by row.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchclamp.core.errors import InputError, PatchclampError, SiteError, TargetError
from patchclamp.core.sites import Tap
from patchclamp.engine.axes import name_axes
from patchclamp.engine.targets import FunctionScore, Metric, Target, as_metric, measured
from patchclamp.model.inputs import BATCH, Call, principal
from patchclamp.net import Net

INPUT = "input"
"""The address of a network's first input of real numbers."""

EMBEDDING = "embed"
"""The site of a language model's embedded tokens, which is looked at by default."""

Values = Tensor | Callable[[slice], Tensor]
"""Values at the site, (n, *site), or what makes those of a slice of 0..n."""

_MOST_ROWS = 1024
_MOST_CHANNELS = 4
"""An input whose second axis is this short is taken for an image or a signal."""

_WORTH_TRYING = 8
"""With this many rows to run, another layout of images is tried; it costs one forward pass."""

_LARGE = 1 << 20
"""Elements of a value for which it is asked first whether memory suffices."""

_PASSES = 3
_FASTER = 0.9
"""Twice the rows at a time are kept where a row then takes no more than this share of the time."""


@dataclass
class Passes:
    """Rows that went through the network. A gradient counts in both."""

    forwards: int = 0
    backwards: int = 0


class Slopes(NamedTuple):
    """Of some rows: which ones, their scores (n,) and the gradients of these, (n, *site)."""

    at: slice
    scores: Tensor
    grads: Tensor


@dataclass
class Pace:
    """How many rows to run at a time: twice as many for as long as that makes a row cheaper.

    Each number is judged by the fastest of a few passes: one that was interrupted must not
    settle the pace on few rows at a time.

    Attributes:
        most: rows that memory allows.
        size: rows to run next.
    """

    most: int
    size: int = 1
    _is_settled: bool = False
    _best: float = float("inf")
    _times: list[float] = field(default_factory=list)

    def took(self, num: int, seconds: float) -> None:
        """`num` rows were run at a time, in this many CPU-seconds."""
        if self._is_settled or num < self.size:
            return
        self._times.append(seconds / num)
        if len(self._times) < _PASSES:
            return
        each = min(self._times)
        self._times.clear()
        if each > _FASTER * self._best:
            self._is_settled, self.size = True, max(1, self.size // 2)
        elif 2 * self.size > self.most:
            self._is_settled = True
        else:
            self._best = min(self._best, each)
            self.size *= 2


@dataclass(eq=False)
class Scorer:
    """A network's score as a function of the value at one site; make one with `Scorer.of`.

    Shapes: value (num, *site), scores (n,), gradients (n, *site); `rows` (n,) says which
        example's other inputs and target each of the n values goes with.

    Attributes:
        net: left as found, whatever happens.
        call: the inputs; all of them but the value at the site stay as they are.
        metric: one scalar for each row of the principal output.
        tap: the site; None for the network's own input.
        value: what is there on the inputs.
        axes: of the value.
        plain: the score of the inputs as they are.
        memory: bytes that rows run together may keep for the way back; one row always runs.
        passes: what was run so far, `plain` left out.
    """

    net: Net
    call: Call
    metric: Metric
    tap: Tap | None
    value: Tensor
    axes: tuple[str, ...]
    plain: Tensor
    memory: int
    passes: Passes = field(default_factory=Passes)
    _paces: dict[bool, Pace] = field(default_factory=dict)
    _layout: torch.memory_format | None = None
    """How images lie in memory; None before any other layout was tried."""

    @classmethod
    def of(
        cls,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        memory: int = 64 << 20,
    ) -> Scorer:
        """Look at a network from one site.

        Args:
            target: a class (one, or one for each row), or a function that gives one scalar
                for each row of the principal output; a class of a language model is a token
                at the last position.
            at: "input", or a site; by default the input where it is of real numbers, else
                the embedding of its tokens.

        Raises:
            InputError: the inputs are not those of the network, or hold NaN.
            SiteError: no such site, or a pattern of several.
            TargetError: the target is not one finite scalar per row, or a function that scores
                a row otherwise when it comes alone; or the value at the site is not of real
                numbers.
        """
        call = net.call(inputs)
        if any(m.training for m in net.module.modules()):
            warnings.warn(
                f"{net.name} is in training mode: dropout and batch norm change from run to run "
                "(call net.module.eval())",
                stacklevel=2,
            )
        with torch.no_grad():
            output = principal(net.hooks.run(call)[0])
        metric = as_metric(target, positions=output.ndim == 3)
        plain = measured(metric, output, torch.arange(len(output)))
        if isinstance(metric, FunctionScore):
            _check_each_row(metric, output, plain)
        at = at or (EMBEDDING if _number(call) is None else INPUT)
        tap = None if at == INPUT else _one(net, at)
        value, axes = _input(net, call) if tap is None else _recorded(net, call, tap)
        if not value.is_floating_point() or value.ndim == 0 or len(value) != len(plain):
            raise TargetError(
                f"'{at}' of {net.name} has no real numbers for each row",
                got=f"{value.dtype} of shape {tuple(value.shape)}",
                expected=f"real numbers ({len(plain)}, ...)",
            )
        return cls(net, call, metric, tap, value, axes, plain, memory)

    @property
    def num(self) -> int:
        """How many examples."""
        return len(self.value)

    @property
    def site(self) -> str:
        """The site's name."""
        return INPUT if self.tap is None else self.tap.label

    def outputs(self, x: Tensor, rows: Tensor) -> Tensor:
        """The principal output with these values at the site, all rows in one pass.

        Differentiable in `x` where gradients are on.
        """
        self.passes.forwards += len(x)
        return principal(self._run(x, rows))

    def scored(self, x: Tensor, rows: Tensor) -> Tensor:
        """The scores of `outputs`, differentiable too."""
        return measured(self.metric, self.outputs(x, rows), rows)

    def scores(self, values: Values, rows: Tensor) -> Tensor:
        """Scores, as many rows at a time as is fastest: (n,)."""
        pieces = self._pieces(values, rows, backwards=False)
        with torch.no_grad():
            return torch.cat([self.scored(x, rows[at]) for at, x in pieces])

    def gradients(self, values: Values, rows: Tensor) -> Iterator[Slopes]:
        """Scores with gradients, piece by piece, so that only one piece is in memory.

        Raises:
            TargetError: the target does not depend on the site, or a gradient is not finite.
        """
        for at, x in self._pieces(values, rows, backwards=True):
            leaf = x.detach().clone().requires_grad_()
            grads = None
            with torch.enable_grad():
                scores = self.scored(leaf, rows[at])
                if scores.requires_grad:
                    (grads,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
            if grads is None:
                raise TargetError(
                    f"the target has no gradient with respect to '{self.site}' of {self.net.name}",
                    hint="the path is cut (detached, rounded, an argmax) or does not exist",
                )
            if not bool(torch.isfinite(grads).all()):
                raise TargetError(
                    f"the gradient with respect to '{self.site}' of {self.net.name} is not finite",
                    hint="a root or a logarithm at 0 on the way, or numbers too large for the type",
                )
            self.passes.backwards += len(x)
            yield Slopes(at, scores.detach(), grads.contiguous())

    def gradient(self) -> Tensor:
        """Of each example as it is: (num, *site)."""
        pieces = self.gradients(self.value, torch.arange(self.num))
        return torch.cat([piece.grads for piece in pieces])

    # ---- how it is run ------------------------------------------------------

    def _run(self, x: Tensor, rows: Tensor) -> object:
        dims = self.net.call_dims(self.call)
        call = self.call.rows(rows, dims)
        tap = self.tap
        if tap is None:
            number = _number(call)
            if self._layout is torch.channels_last:
                x = x.contiguous(memory_format=self._layout)
            given = [x if i == number else t for i, t in enumerate(call.tensors())]
            return self.net.hooks.run(call.mapped(given))[0]
        hooks = self.net.hooks
        engine = hooks if tap.site.address in hooks.points else self.net.graph_for(call)
        changes = {tap.site.address: lambda raw: tap.view.write(raw.detach(), x)}
        return engine.run(call, transforms=changes)[0]

    def _try_layout(self) -> None:
        """Images with channels last, where the network takes them so: faster on CPUs.

        Memory order is all that differs: the numbers are the same up to rounding, which is
        checked. A network that views its values in another shape cannot take them.
        """
        self._layout, value = torch.contiguous_format, self.value
        is_image = self.tap is None and value.ndim == 4 and value.shape[1] > 1
        convolves = any(isinstance(m, nn.Conv2d) for m in self.net.module.modules())
        if not (is_image and convolves and value.device.type == "cpu"):
            return
        first = torch.zeros(1, dtype=torch.long)
        self._layout = torch.channels_last
        try:
            with torch.no_grad():
                found = measured(self.metric, principal(self._run(value[:1], first)), first)
            is_same = torch.allclose(found, self.plain[:1], rtol=1e-3, atol=1e-5)
        except RuntimeError:  # "view size is not compatible with ... stride"
            is_same = False
        if not is_same:
            self._layout = torch.contiguous_format

    def _pieces(
        self, values: Values, rows: Tensor, *, backwards: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of 0..n with their values; the time that the caller takes sets the pace."""
        start, n = 0, len(rows)
        if n == 1 and self.value[0].numel() < _LARGE:
            yield slice(0, 1), values if isinstance(values, Tensor) else values(slice(0, 1))
            return
        if self._layout is None and n >= _WORTH_TRYING:
            self._try_layout()
        pace = self._paces.setdefault(backwards, Pace(self._most_rows))
        while start < n:
            at = slice(start, min(n, start + pace.size))
            began = time.process_time()
            yield at, values[at] if isinstance(values, Tensor) else values(at)
            pace.took(at.stop - at.start, time.process_time() - began)
            start = at.stop

    @cached_property
    def _most_rows(self) -> int:
        """How many rows fit into `memory`, by what one of them keeps for the way back."""
        if not any(BATCH in dims for dims in self.net.call_dims(self.call)):
            return 1
        leaf = self.value[:1].clone().requires_grad_()
        kept: dict[int, int] = {}
        available = available_memory()

        def count(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            if sum(kept.values()) > available:
                raise InputError(
                    f"one row of {self.net.name} needs more memory for its way back than there is",
                    got=f"a value of shape {tuple(leaf.shape)} at '{self.site}', "
                    f"{available / 1e9:.1f} GB of memory",
                    hint="a smaller input, tiles of it, or a site further down",
                )
            return x

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            made = self._run(leaf, torch.zeros(1, dtype=torch.long))
        for p in self.net.module.parameters():
            kept.pop(p.untyped_storage().data_ptr(), None)
        del made
        each = max(sum(kept.values()), 4 * leaf.numel() * leaf.element_size())
        return max(1, min(_MOST_ROWS, self.memory // each))


def available_memory() -> int:
    """Bytes that can be had without swapping; all there are, where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_each_row(metric: FunctionScore, output: Tensor, plain: Tensor) -> None:
    """Rows are run in any number and order, so a function must not count on the whole batch."""
    wrong = TargetError(
        f"the target '{metric.name}' does not score a row by itself: it gives another score, or "
        "none, when the row comes alone",
        hint="a class for each example (a tensor), or a metric that is told the rows",
    )
    for row in range(len(plain) if len(plain) > 1 else 0):
        try:
            alone = metric.function(output[row : row + 1])
        except (PatchclampError, RuntimeError, IndexError, ValueError) as e:
            raise wrong from e
        if tuple(alone.shape) != (1,) or not torch.allclose(
            alone, plain[row : row + 1], rtol=1e-3, atol=1e-5
        ):
            raise wrong


def _number(call: Call) -> int | None:
    """Which tensor of a call is the first of real numbers."""
    return next((i for i, x in enumerate(call.tensors()) if x.is_floating_point()), None)


def _input(net: Net, call: Call) -> tuple[Tensor, tuple[str, ...]]:
    number = _number(call)
    if number is None:
        raise TargetError(
            f"the inputs of {net.name} are tokens, which have no gradient",
            hint=f"at='{EMBEDDING}', or another site of real numbers",
        )
    value, dims = call.tensors()[number].detach(), net.call_dims(call)[number]
    names = name_axes(tuple(dims), channels=value.ndim > 2 and value.shape[1] <= _MOST_CHANNELS)
    return value, names


def _recorded(net: Net, call: Call, tap: Tap) -> tuple[Tensor, tuple[str, ...]]:
    return net.record(call, tap.label).tensor(tap.label), tap.axes


def _one(net: Net, at: str) -> Tap:
    taps = net.taps(at)
    if len(taps) != 1:
        raise SiteError(
            f"'{at}' is {len(taps)} sites of {net.name}",
            expected="one",
            hint="one of " + ", ".join(t.label for t in taps[:8]),
        )
    return taps[0]

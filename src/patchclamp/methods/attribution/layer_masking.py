"""Layer masking: part of the input is taken away at every layer, and no colour is put there.

A patch of grey or black is itself something that a network sees: its edge, its shape, its
colour ("missingness bias"). Here a mask goes through the live network beside the values. At
every convolution the values that are masked are replaced by the mean of their known neighbours,
ring by ring, as far as the kernel reaches; pools look at known values only; and the mask is
pooled with the kernel of each convolution, so that an output is known as soon as it saw
anything known. Operators are watched while they run, whether a module, a function or a method
calls them: nothing is put on the network, which need not be of a known kind.

What the paper leaves to the kind of network is decided as follows. Zeros that an operator adds
around the borders stay zeros and inform no neighbour. Where values leave space (flattening),
what is still masked is filled from its neighbours, however far. Operators that mix places and
have no rule here are refused by name.

Source: Balasubramanian and Feizi 2023, arXiv 2211.14646, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from patchclamp.core.errors import EngineError, InputError
from patchclamp.methods.attribution.base import SPACE
from patchclamp.methods.scoring import INPUT, Scorer
from patchclamp.net import Net

MASKED, KNOWN, BORDER = 0, 1, 2
"""States of a place: taken away; there; a border that an operator added, fixed as it is."""

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_REFUSED = ("conv_transpose", "group_norm", "instance_norm", "interpolate", "fold", "softmax")


@dataclass(frozen=True, kw_only=True)
class LayerMasking:
    """Run a network on part of its input, with the rest masked at every layer.

    Shapes: inputs (num, channel, *space), kept (num, *space), true where the input is kept;
        output as the network's.
    Randomness: none.
    Cost: one forward pass an example, and for each convolution a copy of its input and
        what it takes to fill the rings; a row that keeps everything gives the network's own
        output, bit by bit.
    Raises: EngineError where the values go through an operator that mixes places and has no
        rule (transposed convolution, group norm, resizing), by its name.
    Fails when: very little is kept: all that is seen is then spread over the whole input; a
        row that keeps nothing gives what zeros at the first dense layer give.
    Source: Balasubramanian and Feizi 2023, arXiv 2211.14646.
    """

    def run(self, net: Net, inputs: object, kept: Tensor, *, batch_size: int = 16) -> Tensor:
        """The principal output of all examples, each with what is not kept masked."""
        scorer = Scorer.of(net, inputs, lambda output: output.flatten(1).sum(1), at=INPUT)
        shape = tuple(n for a, n in zip(scorer.axes, scorer.value.shape, strict=True) if a in SPACE)
        if tuple(kept.shape) != (scorer.num, *shape) or not shape:
            raise InputError(
                "what is kept does not fit the input's rows and columns (or positions)",
                got=str(tuple(kept.shape)),
                expected=f"({scorer.num}, {', '.join(map(str, shape)) or 'rows, columns'})",
            )
        made = []
        for rows in torch.arange(scorer.num).split(batch_size):
            x = scorer.value[rows]
            with torch.no_grad(), Masks() as masks:
                masks.give(x, kept[rows])
                made.append(scorer.outputs(x, rows))
        return torch.cat(made)


class Masks(TorchFunctionMode):
    """Within, tensors that were given a mask carry it through all that is computed of them.

    Works with gradients. One pass at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._states = WeakTensorKeyDictionary()

    def give(self, x: Tensor, kept: Tensor) -> None:
        """From here on x (n, channel, *space) is masked where kept (n, *space) is false."""
        state = kept.detach().to(device=x.device, dtype=torch.uint8)[:, None]
        if bool((state == MASKED).any()):
            self._states[x] = state

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = dict(kwargs or {})
        seen = [x for x in pytree.tree_leaves((args, options)) if isinstance(x, Tensor)]
        states = [self._states[x] for x in seen if x in self._states]
        if not states:
            return func(*args, **options)
        name = getattr(func, "__name__", str(func))
        x = seen[0]
        rule = None if x not in self._states else _rule(name, x, self._states[x], args, options)
        if rule is not None:
            made, state = rule(func, x, self._states[x], args, options)
            return self._kept(made, state)
        result = func(*args, **options)
        self._follow(name, result, states)
        return result

    def _kept(self, made: Tensor, state: Tensor | None) -> Tensor:
        # Also where nothing is masked any more: in a sum with what is, it makes all known, which
        # a tensor without a state, such as a bias, does not.
        if state is not None:
            self._states[made] = state
        return made

    def _follow(self, name: str, result: object, states: Sequence[Tensor]) -> None:
        """Place by place: a result is known where any of what it was made of is."""
        space = states[0].shape[2:]
        for made in pytree.tree_leaves(result):
            if not isinstance(made, Tensor) or made.ndim < 1 or name.startswith("__get__"):
                continue
            same = made.shape[2:] == space and all(s.shape[2:] == space for s in states)
            if not same or name.startswith(_REFUSED):
                raise EngineError(
                    f"layer masking has no rule for '{name}', which mixes places or moves them",
                    got=f"a result of shape {tuple(made.shape)} of values at {tuple(space)}",
                    hint="mask with a colour, the mean or a blur instead",
                )
            state = states[0]
            for other in states[1:]:
                state = torch.maximum(state, other)
            self._kept(made, state.expand(len(made), *state.shape[1:]))


Rule = Callable[
    [Callable[..., object], Tensor, Tensor, Sequence[object], Mapping[str, object]],
    tuple[Tensor, "Tensor | None"],
]
"""(function, value, its state, arguments, options) -> its result and the state of that."""


def _rule(
    name: str, x: Tensor, state: Tensor, args: Sequence[object], options: Mapping[str, object]
) -> Rule | None:
    """What is done at operators that look at more than one place at a time."""
    if name in ("conv1d", "conv2d", "conv3d"):
        return _convolved
    if "max_pool" in name and "unpool" not in name:
        return _largest
    if "avg_pool" in name:
        return _averaged
    if name == "pad":
        return _padded
    if name == "mean":
        return _mean
    if name in ("flatten", "view", "reshape"):
        return _flattened
    return None


def _call(func: Callable[..., object], x: Tensor, args: Sequence[object],
          options: Mapping[str, object]) -> Tensor:  # fmt: skip
    """The function with its value replaced, which is its first argument, or `input`."""
    made = func(x, *args[1:], **options) if args else func(**{**options, "input": x})
    if isinstance(made, (tuple, list)):  # a pool that also gives indices
        raise EngineError("layer masking has no rule for pools that give indices")
    if not isinstance(made, Tensor):
        raise EngineError(f"layer masking expected a tensor, got {type(made).__name__}")
    return made


def _convolved(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **options}
    weight, dilation = given["weight"], given.get("dilation", 1)
    if not isinstance(weight, Tensor):
        raise EngineError("layer masking expected a convolution's weight to be a tensor")
    size = tuple(weight.shape[2:])
    steps = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(size)
    reach = max(int(d) * (k - 1) for d, k in zip(steps, size, strict=True))
    made = _call(func, neighbour_padded(x, state, reach), args, options)
    with torch.no_grad():
        window = x.new_ones(1, 1, *size)
        how = {k: given[k] for k in ("stride", "padding", "dilation") if k in given}
        known = _CONVOLUTIONS[len(size)]((state == KNOWN).to(x.dtype), window, **how)
    return made, (known > 0.5).to(torch.uint8)


def _largest(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    made = _call(func, x.masked_fill(state == MASKED, -math.inf), args, options)
    with torch.no_grad():
        known = _call(func, (state != MASKED).to(x.dtype), args, options) > 0
    return torch.where(known, made, 0.0), known.to(torch.uint8)


def _averaged(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    there = (state != MASKED).to(x.dtype)
    made = _call(func, x.masked_fill(state == MASKED, 0.0), args, options)
    with torch.no_grad():
        all_, some = (_call(func, m, args, options) for m in (torch.ones_like(there), there))
        known = some > 0
        scale = torch.where(known, all_ / some.where(known, torch.ones_like(some)), 0.0)
    # One place is no space any more: what saw nothing is 0 there.
    state = known.to(torch.uint8)
    return made * scale, state if math.prod(made.shape[2:]) > 1 else None


def _mean(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    dims = args[1] if len(args) > 1 else options.get("dim")
    listed = dims if isinstance(dims, (tuple, list)) else [dims]
    over = {int(d) % x.ndim for d in listed if isinstance(d, int)}
    if over != set(range(2, x.ndim)):
        raise EngineError(
            "layer masking has no rule for a mean over some of the places, or over channels",
            got=f"dim={dims} of shape {tuple(x.shape)}",
        )
    there = (state != MASKED).to(x.dtype)
    made = _call(func, x.masked_fill(state == MASKED, 0.0), args, options)
    share = _call(func, there, args, options)
    return made / share.where(share > 0, torch.ones_like(share)), None


def _padded(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    made = _call(func, x, args, options)
    given = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **options}
    mode = str(given.get("mode", "constant"))
    pad = given["pad"]
    if not isinstance(pad, (tuple, list)) or len(pad) > 2 * (x.ndim - 2):
        raise EngineError("layer masking has no rule for padding of channels", got=f"pad={pad}")
    value = BORDER if mode == "constant" else None
    padded = functional.pad(state.float(), [int(p) for p in pad], mode=mode, value=value)
    return made, padded.to(torch.uint8)


def _flattened(
    func: Callable[..., object],
    x: Tensor,
    state: Tensor,
    args: Sequence[object],
    options: Mapping[str, object],
) -> tuple[Tensor, Tensor | None]:
    filled = neighbour_padded(x, state, max(x.shape[2:]))
    return _call(func, filled.contiguous(), args, options), None


def neighbour_padded(x: Tensor, state: Tensor, num_rings: int) -> Tensor:
    """Masked values as means of known ones next to them (diagonally too), ring after ring.

    Shapes: x (n, channel, *space), state (n, 1, *space); values farther than `num_rings` from
    all that is known become 0.
    """
    if not bool((state == MASKED).any()):
        return x
    space = x.shape[2:]
    border = [1, 1] * len(space)
    filled = functional.pad(x.masked_fill(state == MASKED, 0.0), border)
    size = filled.shape[2:]
    known = functional.pad((state == KNOWN).to(x.dtype), border)
    missing = functional.pad((state == MASKED).to(x.dtype), border).flatten(2)[:, 0] > 0
    strides = [math.prod(size[i + 1 :]) for i in range(len(size))]
    steps = torch.cartesian_prod(*[torch.tensor([-1, 0, 1]) * s for s in strides])
    steps = steps.reshape(-1, len(size)).sum(1).to(x.device)
    filled, known = filled.flatten(2), known.flatten(2)[:, 0]
    for _ in range(num_rings):
        row, place = missing.nonzero(as_tuple=True)
        near = place[:, None] + steps
        there = known[row[:, None], near]
        at = there.any(1)
        if not bool(at.any()):
            break
        row, place, near, there = row[at], place[at], near[at], there[at]
        mean = (filled[row[:, None], :, near] * there[..., None]).sum(1) / there.sum(1)[:, None]
        filled[row, :, place] = mean
        known[row, place], missing[row, place] = 1.0, False
    inside = tuple(slice(1, n - 1) for n in size)
    made: Tensor = filled.unflatten(2, size)[(slice(None), slice(None), *inside)]
    return made

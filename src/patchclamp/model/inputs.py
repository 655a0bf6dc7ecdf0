"""Inputs of a network: what a user hands in, made into one checked call.

A `Call` is the arguments of one forward pass. An `InputSpec` is learned from
the example inputs and refuses what the network cannot take before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils import _pytree as pytree

from patchclamp.core.errors import InputError

BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class Call:
    """Arguments of one forward pass."""

    args: tuple[object, ...] = ()
    kwargs: tuple[tuple[str, object], ...] = ()

    @property
    def keywords(self) -> dict[str, object]:
        """Keyword arguments as a fresh dictionary."""
        return dict(self.kwargs)

    def leaves(self) -> list[object]:
        """Everything in the call, flattened in a fixed order."""
        return list(pytree.tree_leaves((self.args, self.keywords)))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the leaves."""
        return [x for x in self.leaves() if isinstance(x, torch.Tensor)]

    @property
    def structure(self) -> str:
        """A key for calls of one form: which arguments are given and what they are."""
        leaves, spec = pytree.tree_flatten((self.args, self.keywords))
        kinds = [f"{x.dtype}{x.ndim}" if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
        return f"{spec}|{kinds}"

    def mapped(self, change: Sequence[torch.Tensor]) -> Call:
        """The same call with its tensors replaced, in the order of `tensors()`."""
        leaves, spec = pytree.tree_flatten((self.args, self.keywords))
        fresh = iter(change)
        made = [next(fresh) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(made, spec)
        return Call(tuple(args), tuple(kwargs.items()))

    def rows(self, index: torch.Tensor | slice, dims: Sequence[tuple[int | str, ...]]) -> Call:
        """Some examples of the batch; `dims` as in `InputSpec.dims`."""
        picked = []
        for x, names in zip(self.tensors(), dims, strict=True):
            if BATCH not in names:
                picked.append(x)
            elif isinstance(index, slice):
                picked.append(x[(slice(None),) * names.index(BATCH) + (index,)])
            else:
                picked.append(x.index_select(names.index(BATCH), index))
        return self.mapped(picked)


def as_call(inputs: object, fixed: Mapping[str, object]) -> Call:
    """A call from a tensor, an array, a tuple (positional) or a mapping (keywords).

    Args:
        inputs: what the user gave; texts are turned into token ids before this.
        fixed: keyword arguments that go with every call of this network.
    """
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        given = {str(k): _tensor(v) for k, v in inputs.items()}
        return Call((), tuple({**given, **fixed}.items()))
    if isinstance(inputs, tuple):
        return Call(tuple(_tensor(x) for x in inputs), tuple(fixed.items()))
    return Call((_tensor(inputs),), tuple(fixed.items()))


def _tensor(x: object) -> object:
    if isinstance(x, np.ndarray):
        if x.dtype == object:
            raise InputError("inputs hold Python objects", expected="numbers")
        return torch.from_numpy(np.ascontiguousarray(x))
    if hasattr(x, "dims") and hasattr(x, "values"):
        return torch.from_numpy(np.ascontiguousarray(x.values))
    if isinstance(x, list):
        try:
            return torch.tensor(x)
        except (TypeError, ValueError, RuntimeError) as e:
            raise InputError(f"a list of inputs is not a regular array of numbers: {e}") from None
    if isinstance(x, (torch.Tensor, int, float, bool)) or x is None:
        return x
    raise InputError(
        "inputs are tensors, arrays, or texts for a network with a tokenizer",
        got=type(x).__name__,
    )


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What one form of call must look like.

    Attributes:
        structure: see `Call.structure`.
        dims: for every tensor, its axes: an integer is a fixed size, "batch" and
            "length" may vary, other names stand for axes that may vary freely.
        ceiling: for every tensor, the number of token ids there are (None: not token ids).
    """

    structure: str
    dims: tuple[tuple[int | str, ...], ...]
    ceiling: tuple[int | None, ...]

    def with_ceiling(self, ceiling: int | None) -> InputSpec:
        """The same spec with a bound on integer inputs."""
        return replace(self, ceiling=tuple(ceiling for _ in self.dims))

    def check(self, call: Call, network: str) -> None:
        """Raise InputError for wrong rank or size, an empty batch, NaN, or ids out of range."""
        sizes: dict[str, int] = {}
        tensors = call.tensors()
        for number, (x, dims) in enumerate(zip(tensors, self.dims, strict=True)):
            _check_shape(x, dims, sizes, number, network)
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                where = (~torch.isfinite(x)).nonzero()[0].tolist()
                raise InputError(
                    f"input {number} of {network} holds NaN or infinity, first at index {where}",
                    hint="clean the data, or drop those rows",
                )
        for number, (x, ceiling) in enumerate(zip(tensors, self.ceiling, strict=True)):
            whole = not (x.is_floating_point() or x.dtype is torch.bool)
            if ceiling is not None and whole and number == 0:
                low, high = int(x.min()), int(x.max())
                if low < 0 or high >= ceiling:
                    raise InputError(
                        f"token ids of input {number} are outside the vocabulary of {network}",
                        got=f"{low} to {high}",
                        expected=f"0 to {ceiling - 1}",
                        hint="make the ids with the network's own tokenizer, or give texts",
                    )


def _check_shape(
    x: torch.Tensor,
    dims: tuple[int | str, ...],
    sizes: dict[str, int],
    number: int,
    network: str,
) -> None:
    expected = "(" + ", ".join(str(d) for d in dims) + ")"
    wrong = InputError(
        f"input {number} of {network} has the wrong shape",
        got=str(tuple(x.shape)),
        expected=expected,
        hint="give inputs with the axes of the example inputs",
    )
    if x.ndim != len(dims):
        raise wrong
    if x.numel() == 0:
        raise InputError(f"input {number} of {network} is empty", got=str(tuple(x.shape)))
    for size, dim in zip(x.shape, dims, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise wrong
        elif sizes.setdefault(dim, size) != size:
            raise wrong


def guess_dims(call: Call) -> tuple[tuple[int | str, ...], ...]:
    """Axes that probably vary: axis 0 is the batch; axis 1 of 2-D integers is the length.

    Floating inputs (batch, length, feature) get a length only where the network is
    later seen to accept another one.
    """
    tensors = call.tensors()
    batch = tensors[0].shape[0] if tensors and tensors[0].ndim else None
    tokens = next((x for x in tensors if not x.is_floating_point() and x.ndim == 2), None)
    length = tokens.shape[1] if tokens is not None else None
    if length is None and tensors and tensors[0].ndim == 3:
        length = tensors[0].shape[1]
    dims = []
    for x in tensors:
        names: list[int | str] = list(x.shape)
        if x.ndim and x.shape[0] == batch:
            names[0] = BATCH
            if x.ndim > 1 and x.shape[1] == length and (tokens is None or x.ndim == 2):
                names[1] = LENGTH
        dims.append(tuple(names))
    return tuple(dims)


def grown(call: Call, dims: Sequence[tuple[int | str, ...]], axis: str) -> Call:
    """The call with one more row along a varying axis (the first row again)."""
    made = []
    for x, names in zip(call.tensors(), dims, strict=True):
        if axis in names:
            at = names.index(axis)
            x = torch.cat([x, x.narrow(at, 0, 1)], at)
        made.append(x)
    return call.mapped(made)


def principal(output: object) -> torch.Tensor:
    """The tensor that an output is about: itself, its `logits`, its last hidden state, its first.

    Raises:
        InputError: the output holds no tensor.
    """
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            return leaf
    raise InputError("the network's output holds no tensor", got=type(output).__name__)

"""Two runs and a metric: what a circuit is about.

A `Contrast` holds clean and corrupt inputs that differ in what matters and in nothing
else, row by row, and the metric that tells them apart. Everything about circuits is
measured on contrasts: *noising* runs the clean input and puts corrupt values in,
*denoising* runs the corrupt input and puts clean values in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.engine.targets import Metric
from patchclamp.model.identity import data_hash
from patchclamp.model.inputs import Call
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some rows of a contrast. `rows` are their numbers, for the metric."""

    clean: Call
    corrupt: Call
    metric: Metric
    rows: Tensor

    @property
    def num_rows(self) -> int:
        """Examples in the batch."""
        return self.rows.numel()

    def turned(self) -> Batch:
        """The same rows with clean and corrupt exchanged."""
        return Batch(clean=self.corrupt, corrupt=self.clean, metric=self.metric, rows=self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Rows of equal form. Make one with `contrast`; see the module docstring."""

    clean: Call
    corrupt: Call
    metric: Metric
    num_rows: int
    dims: tuple[tuple[int | str, ...], ...]
    name: str
    data_hash: str

    def batches(self, size: int) -> Iterator[Batch]:
        """Pieces of at most `size` rows."""
        if size < 1:
            raise OptionError("batch_size must be at least 1", got=str(size))
        for start in range(0, self.num_rows, size):
            yield self.batch(range(start, min(start + size, self.num_rows)))

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers; a number may come several times."""
        index = torch.tensor(list(rows))
        return Batch(
            clean=self.clean.rows(index, self.dims),
            corrupt=self.corrupt.rows(index, self.dims),
            metric=self.metric,
            rows=index,
        )


def contrast(
    net: Net, clean: object, corrupt: object, metric: Metric, *, name: str = "pairs"
) -> Contrast:
    """Clean and corrupt inputs as checked calls.

    Raises:
        InputError: they differ in length, shape, type or number of rows, or are equal.
    """
    first, second = net.call(clean), net.call(corrupt)
    for number, (x, y) in enumerate(zip(first.tensors(), second.tensors(), strict=False)):
        if x.shape != y.shape or x.dtype != y.dtype:
            lengths = x.ndim == 2 and not x.is_floating_point() and x.shape[0] == y.shape[0]
            raise InputError(
                "clean and corrupt inputs must have the same length, because values are put at "
                "the same positions"
                if lengths
                else f"clean and corrupt inputs differ in form (input {number})",
                got=f"{x.shape[1]} and {y.shape[1]} tokens"
                if lengths
                else f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}",
                hint="replace words by words with the same number of tokens" if lengths else None,
            )
    if first.structure != second.structure:
        raise InputError(
            "clean and corrupt inputs have different arguments",
            got=f"{len(first.tensors())} and {len(second.tensors())} tensors",
            hint="texts of one length need no padding, and then no mask",
        )
    if all(torch.equal(x, y) for x, y in zip(first.tensors(), second.tensors(), strict=True)):
        raise InputError("clean and corrupt inputs are the same, so there is nothing to explain")
    dims = net.call_dims(first)
    axes = [d.index("batch") for d in dims if "batch" in d]
    if not axes:
        raise InputError(f"the batch of {net.name} is fixed", hint="open it with two examples")
    sized = next(x for x, d in zip(first.tensors(), dims, strict=True) if "batch" in d)
    return Contrast(
        clean=first,
        corrupt=second,
        metric=metric,
        num_rows=int(sized.shape[axes[0]]),
        dims=dims,
        name=name,
        data_hash=data_hash([*first.tensors(), *second.tensors()]),
    )

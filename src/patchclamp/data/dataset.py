"""A dataset in memory: inputs, labels and what a report needs to cite it.

The constructor refuses rows that no method could use, such as NaN or labels
without a class, so that whoever holds a `Dataset` need not check again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.core.errors import DataError
from patchclamp.data.catalogue import Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Rows of one kind, with or without labels.

    Attributes:
        inputs: images float32 (n, channel, row, column), in [0, 1] if bundled;
            token ids int64 (n, length); arrays float32 (n, ...); and for the kind
            `text`, which no tokenizer has seen yet, int64 (n, 0).
        labels: class of each row, int64 (n), or None.
        class_names: name of class i at index i.
        texts: the text of each row where rows are texts: always for `text`, and for
            `tokens` where a tokenizer other than bytes could encode them anew.
        split: which part of the data this is.
    """

    name: str
    inputs: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    split: str
    licence: str
    description: str
    kind: Kind
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_inputs()
        if self.labels is not None:
            self._check_labels(self.labels)
        if self.texts and len(self.texts) != len(self):
            raise DataError(
                f"dataset '{self.name}' has texts for other rows than its own",
                got=f"{len(self.texts)} texts",
                expected=str(len(self)),
            )

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the contents: inputs, labels, class names and texts, not the name."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.labels):
            if tensor is None:
                digest.update(b"none")
                continue
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps([self.class_names, self.texts]).encode())
        return digest.hexdigest()

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """`n` rows drawn without replacement, in their old order; all rows if n is not smaller.

        With labels, each class keeps its share of the rows to within one.
        """
        if n < 1:
            raise DataError(f"a subset of '{self.name}' needs rows", got=str(n), expected="n >= 1")
        if n >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        if self.labels is not None:
            order = order[_spread(self.labels[order])]
        rows = order[:n].sort().values
        return dataclasses.replace(
            self,
            inputs=self.inputs[rows],
            labels=None if self.labels is None else self.labels[rows],
            texts=tuple(self.texts[row] for row in rows.tolist()) if self.texts else (),
        )

    def _check_inputs(self) -> None:
        inputs = self.inputs
        if inputs.dim() < 2 or len(self) == 0:
            raise DataError(
                f"dataset '{self.name}' is empty",
                got=f"inputs of shape {tuple(inputs.shape)}",
                expected="at least one row",
            )
        tokens = self.kind in (Kind.TOKENS, Kind.TEXT)
        dtype, num_axes = (torch.int64, 2) if tokens else (torch.float32, inputs.dim())
        if self.kind is Kind.IMAGES:
            num_axes = 4
        if inputs.dtype != dtype or inputs.dim() != num_axes:
            raise DataError(
                f"inputs of '{self.name}' are not {self.kind}",
                got=f"{inputs.dtype} with {inputs.dim()} axes",
                expected=f"{dtype} with {num_axes} axes",
            )
        if self.kind is not Kind.TEXT and inputs[0].numel() == 0:
            raise DataError(f"rows of '{self.name}' are empty", got=f"shape {tuple(inputs.shape)}")
        if tokens and bool((inputs < 0).any()):
            raise DataError(
                f"dataset '{self.name}' has negative token ids",
                got=str(int(inputs.min())),
                expected="ids from 0 up",
                hint="drop padding, or pad with a token of the vocabulary",
            )
        if not tokens:
            rows = (~torch.isfinite(inputs)).flatten(1).any(dim=1).nonzero().flatten()
            if rows.numel():
                raise DataError(
                    f"dataset '{self.name}' has values that are not finite (NaN or infinity)",
                    got=f"{rows.numel()} such rows, the first at index {int(rows[0])}",
                    hint="remove or repair these rows",
                )

    def _check_labels(self, labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.shape != (len(self),):
            raise DataError(
                f"labels of '{self.name}' do not fit its rows",
                got=f"{labels.dtype} of shape {tuple(labels.shape)}",
                expected=f"torch.int64 of shape ({len(self)},)",
                hint="give one whole number for each row",
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"labels of '{self.name}' have no class name",
                got=f"labels from {low} to {high} and {len(self.class_names)} class names",
                expected=f"labels in 0..{len(self.class_names) - 1}",
                hint="number the classes from 0 without gaps",
            )


def _spread(labels: Tensor) -> Tensor:
    """An order of the rows in which every beginning has each class in proportion.

    Row j of a class with m rows takes the place (j + 1/2) / m.
    Shapes: labels (row); returns indices (row).
    """
    place = torch.empty(labels.shape[0], dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().flatten()
        place[rows] = (torch.arange(rows.numel(), dtype=torch.float64) + 0.5) / rows.numel()
    return place.argsort(stable=True)

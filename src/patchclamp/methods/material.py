"""What methods work on: a network's inputs with their labels, and the score they are judged by.

A `Score` gives one number a row, higher is worse (a loss), so that the effect of
an edit is always `edited - plain` and a positive effect is harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.core.edits import Edit
from patchclamp.core.errors import DataError
from patchclamp.core.findings import Json, Record
from patchclamp.model.inputs import BATCH, Call, principal
from patchclamp.net import Net


class RowKind(StrEnum):
    """What one row of the material is."""

    IMAGE = "image"
    TEXT = "text"
    ARRAY = "array"


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Rows of inputs, checked against a network.

    Attributes:
        call: all rows, as one call.
        num: how many rows.
        kind: what a row is.
        labels: class of each row, or None.
        class_names: names of the classes.
        name, hash: of the dataset, for records.
    """

    call: Call
    num: int
    kind: RowKind
    labels: Int[Tensor, "row"] | None
    class_names: tuple[str, ...]
    name: str
    hash: str

    def rows(self, net: Net, index: Tensor) -> Material:
        """Some of the rows."""
        call = self.call.rows(index, net.call_dims(self.call))
        labels = None if self.labels is None else self.labels[index]
        return replace(self, call=call, num=int(index.numel()), labels=labels)

    @property
    def tokens(self) -> Int[Tensor, "row position"] | None:
        """Token ids, where rows are texts."""
        if self.kind is not RowKind.TEXT:
            return None
        return next(x for x in self.call.tensors() if not x.is_floating_point() and x.ndim == 2)

    @property
    def mask(self) -> Tensor | None:
        """(row, position) true where a token counts; None where all do."""
        given = self.call.keywords.get("attention_mask")
        return given.bool() if isinstance(given, Tensor) else None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number a row; higher is worse.

    Attributes:
        name: "cross-entropy of the label", ...
        unit: "nats", ...
        rows: (output, rows of the material) -> (row,).
    """

    name: str
    unit: str
    rows: Callable[[Tensor, slice], Float[Tensor, "row"]]


def score_for(net: Net, material: Material) -> Score:
    """The natural score: label loss, next-token loss, or change of the output.

    Raises:
        DataError: labels with a class that the network lacks.
    """
    output = plain_output(net, material, batch_size=1, limit=1)
    tokens = material.tokens
    if material.labels is not None and output.ndim == 2:
        labels = material.labels
        if int(labels.max()) >= output.shape[1]:
            raise DataError(
                f"the data has a class that {net.name} lacks",
                got=f"label {int(labels.max())}",
                expected=f"labels 0 to {output.shape[1] - 1}",
                hint="drop those rows, or audit a network with that class",
            )
        return Score(
            name="cross-entropy of the label",
            unit="nats",
            rows=lambda out, at: torch.nn.functional.cross_entropy(
                out.float(), labels[at], reduction="none"
            ),
        )
    if tokens is not None and output.ndim == 3 and output.shape[-1] > int(tokens.max()):
        return Score(
            name="next-token cross-entropy",
            unit="nats per token",
            rows=lambda out, at: next_token_loss(out, tokens[at], _part(material.mask, at)),
        )
    plain = plain_output(net, material, batch_size=32)
    return Score(
        name="relative change of the output",
        unit="share of its norm",
        rows=lambda out, at: _change(out, plain[at]),
    )


def next_token_loss(
    logits: Float[Tensor, "row position vocabulary"],
    tokens: Int[Tensor, "row position"],
    mask: Tensor | None,
) -> Float[Tensor, "row"]:
    """Mean cross-entropy of each next token, a row at a time, in nats per token."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    if mask is None:
        return loss.mean(1)
    counted = mask[:, 1:].to(loss)
    return (loss * counted).sum(1) / counted.sum(1).clamp(min=1)


def _part(mask: Tensor | None, at: slice) -> Tensor | None:
    return None if mask is None else mask[at]


def _change(output: Tensor, plain: Tensor) -> Float[Tensor, "row"]:
    moved = (output - plain).flatten(1).norm(dim=1)
    change: Tensor = moved / plain.flatten(1).norm(dim=1).clamp(min=1e-12)
    return change


def plain_output(
    net: Net, material: Material, *, batch_size: int, limit: int | None = None
) -> Tensor:
    """The network's principal output on all rows (or the first `limit`)."""
    parts, seen = [], 0
    with torch.no_grad():
        for batch in net.batches(material.call, batch_size):
            raw, _ = net.hooks.run(batch)
            parts.append(principal(raw).detach())
            seen += parts[-1].shape[0]
            if limit is not None and seen >= limit:
                break
    return torch.cat(parts)


def scores(
    net: Net,
    material: Material,
    score: Score,
    *,
    edits: Sequence[Edit] = (),
    batch_size: int = 64,
) -> Float[Tensor, "row"]:
    """The score of every row, with edits."""
    made, start = [], 0
    for batch in net.batches(material.call, batch_size):
        output = net.run(batch, edits=list(edits)).output
        at = slice(start, start + output.shape[0])
        made.append(score.rows(output, at))
        start = at.stop
    return torch.cat(made)


def record(
    net: Net,
    material: Material,
    *,
    method: str,
    metric: str,
    seed: int | None = None,
    options: dict[str, Json] | None = None,
    edits: Sequence[dict[str, Json]] = (),
    engine: str = "hooks",
) -> Record:
    """What is needed to measure a finding again; the audit adds versions and the command."""
    return Record(
        method=method,
        options={} if options is None else options,
        model=net.name,
        data=f"{material.name}, {material.num} rows",
        data_hash=material.hash,
        metric=metric,
        edits=tuple(edits),
        engine=engine,
        seed=seed,
    )


def num_rows(net: Net, call: Call) -> int:
    """Size of the batch axis."""
    for x, dims in zip(call.tensors(), net.call_dims(call), strict=True):
        if BATCH in dims:
            return x.shape[dims.index(BATCH)]
    return 1

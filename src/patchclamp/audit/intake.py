"""From a dataset to the rows that a network can take."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from patchclamp.core.errors import DataError
from patchclamp.data import Kind, load_data
from patchclamp.data.dataset import Dataset
from patchclamp.methods.material import Material, RowKind
from patchclamp.model.inputs import BATCH, Call
from patchclamp.model.preprocessing import prepared
from patchclamp.model.sources import Task
from patchclamp.model.tokens import ByteTokenizer
from patchclamp.net import Net

_MAX_ROWS = 2000


def intake(net: Net, data: str | os.PathLike[str] | Dataset | None, *, length: int) -> Material:
    """Rows for this network.

    Args:
        data: a dataset, its name or a file; None takes a bundled one that fits.
        length: tokens in a row, where texts are cut into rows.

    Raises:
        DataError: nothing fits, with what would.
    """
    dataset = data if isinstance(data, Dataset) else load_data(data or default_data(net))
    if len(dataset) > _MAX_ROWS:
        dataset = dataset.subset(_MAX_ROWS)
    text = dataset.kind in (Kind.TEXT, Kind.TOKENS)
    return _mixed(net, _texts(net, dataset, length) if text else _arrays(net, dataset))


def _mixed(net: Net, material: Material) -> Material:
    """Labelled rows in a random order: methods that read the first so many see every class."""
    varying = any(BATCH in dims for dims in net.call_dims(material.call))
    if material.labels is None or not varying:
        return material
    return material.rows(
        net, torch.randperm(material.num, generator=torch.Generator().manual_seed(0))
    )


def default_data(net: Net) -> str:
    """Name of the bundled dataset that fits a network.

    Raises:
        DataError: none does.
    """
    if net.tokenizer is not None or net.task in (Task.LANGUAGE, Task.ENCODE_TEXT):
        return "prose"
    if len(net.input_dims) == 1 and net.input_dims[0][1:] == (1, 8, 8):
        return "digits"
    raise DataError(
        f"no bundled dataset fits {net.name}, which takes inputs {_shown(net)}",
        hint="give --data FILE.npz with arrays x and y; `patchclamp data` lists the forms",
    )


def _shown(net: Net) -> str:
    return " and ".join("(" + ", ".join(map(str, dims)) + ")" for dims in net.input_dims)


def _arrays(net: Net, dataset: Dataset) -> Material:
    inputs = dataset.inputs
    if dataset.kind is Kind.IMAGES and net.loaded.preprocessing is not None:
        inputs = prepared(inputs, net.loaded.preprocessing)
    dims = net.input_dims[0]
    same = len(dims) == inputs.ndim and all(
        not isinstance(d, int) or d == n for d, n in zip(dims, inputs.shape, strict=True)
    )
    if not same or len(net.input_dims) != 1:
        raise DataError(
            f"the data '{dataset.name}' does not fit {net.name}",
            got=f"rows of shape {tuple(inputs.shape[1:])}",
            expected=f"inputs {_shown(net)}",
            hint="`patchclamp data` lists the forms that data may have",
        )
    names = dataset.class_names or net.loaded.class_names
    return Material(
        call=net.call(inputs),
        num=len(dataset),
        kind=RowKind.IMAGE if dataset.kind is Kind.IMAGES else RowKind.ARRAY,
        labels=dataset.labels,
        class_names=tuple(names),
        name=_title(dataset),
        hash=dataset.hash,
    )


def _title(dataset: Dataset) -> str:
    return f"{dataset.name} ({dataset.split})"


def _texts(net: Net, dataset: Dataset, length: int) -> Material:
    tokenizer = net.tokenizer
    if not any(len(dims) == 2 for dims in net.input_dims):
        raise DataError(
            f"'{dataset.name}' holds texts, which do not fit {net.name}",
            got=str(dataset.kind),
            expected=f"inputs {_shown(net)}",
            hint="`patchclamp data` lists the forms that data may have",
        )
    as_they_are = dataset.kind is Kind.TOKENS and (
        tokenizer is None or isinstance(tokenizer, ByteTokenizer) or not dataset.texts
    )
    if as_they_are:
        ids, labels = dataset.inputs[:, :length], dataset.labels
        call = net.call(ids)
    elif tokenizer is None or not dataset.texts:
        raise DataError(
            f"the texts of '{dataset.name}' need a tokenizer, and {net.name} has none",
            hint="give token ids: --data FILE.npz with x of whole numbers (row, position)",
        )
    elif dataset.labels is not None:
        encoded = tokenizer.encode(list(dataset.texts), max_length=length)
        whole = bool(encoded["attention_mask"].all())
        call = net.call({"input_ids": encoded["input_ids"]} if whole else encoded)
        labels = dataset.labels
    else:
        call, labels = net.call({"input_ids": _windows(net, dataset, length)}), None
    return Material(
        call=call,
        num=_rows(call),
        kind=RowKind.TEXT,
        labels=labels,
        class_names=dataset.class_names,
        name=_title(dataset),
        hash=dataset.hash,
    )


def _rows(call: Call) -> int:
    return call.tensors()[0].shape[0]


def _windows(net: Net, dataset: Dataset, length: int) -> Tensor:
    """All texts as one stream of tokens, cut into rows of the same length, without padding."""
    tokenizer = net.tokenizer
    if tokenizer is None:
        raise DataError(f"{net.name} has no tokenizer")
    encoded = tokenizer.encode(["\n".join(dataset.texts)], max_length=None)
    stream = encoded["input_ids"][0][encoded["attention_mask"][0].bool()]
    num = stream.numel() // length
    if num < 2:
        raise DataError(
            f"the data '{dataset.name}' is too short for {net.name}",
            got=f"{stream.numel()} tokens",
            expected=f"at least two rows of {length}",
        )
    return stream[: num * length].reshape(num, length)

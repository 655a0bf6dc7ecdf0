"""The user's own files: arrays, tensors and texts, each refused with a way out if malformed.

Nothing is ever unpickled, because a pickle runs code when it is read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from patchclamp.core.errors import DataError, nearest
from patchclamp.data.catalogue import Kind
from patchclamp.data.dataset import Dataset

NOT_STATED = "not stated"
MAX_CLASSES = 1_000_000
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".npy", ".joblib")


def load(name: str, split: str, *, known_names: tuple[str, ...]) -> Dataset:
    """The whole file `name` as a dataset. `known_names` are for the nearest match."""
    path = Path(name)
    if not path.exists():
        raise DataError(
            f"no bundled dataset and no file '{name}'",
            expected=f"one of {', '.join(known_names)}, or a file {_endings()}",
            nearest=nearest(name, known_names),
            hint="patchclamp data lists the bundled datasets",
        )
    if split != "test":
        raise DataError(
            f"file '{name}' holds one split, which is used as the test split",
            got=f"split '{split}'",
            hint="give each split a file of its own",
        )
    if path.suffix in PICKLES:
        raise DataError(
            f"'{name}' may be a pickle, which could run code when read",
            expected=f"a file {_endings()}",
            hint="save it with numpy.savez(path, x=..., y=...) or safetensors",
        )
    if path.suffix not in READERS or not path.is_file():
        raise DataError(
            f"'{name}' is not a dataset file",
            got="a folder" if path.is_dir() else f"the ending '{path.suffix}'",
            expected=f"a file {_endings()}",
        )
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise DataError(f"cannot read '{name}'", got=str(error)) from error


def _endings() -> str:
    return "ending in " + ", ".join(READERS)


def _npz(path: Path) -> Dataset:
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"'{path}' is not an npz archive",
            hint="save it with numpy.savez(path, x=..., y=...)",
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key in ("x", "y")}
            names = list(archive.files)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        pickled = "pickle" in str(error).lower()
        raise DataError(
            f"'{path}' holds pickled objects, which could run code when read"
            if pickled
            else f"'{path}' is damaged",
            got=None if pickled else str(error),
            hint="save plain number arrays: numpy.savez(path, x=..., y=...)",
        ) from error
    _need_key(path, "x", names)
    inputs = _tensor(path, "x", arrays["x"])
    labels = _tensor(path, "y", arrays["y"]) if "y" in arrays else None
    return _from_tensors(path, inputs, labels, ())


def _safetensors(path: Path) -> Dataset:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in keys if key in ("inputs", "labels")}
    except safetensors.SafetensorError as error:
        raise DataError(
            f"'{path}' is not a whole safetensors file",
            got=str(error),
            hint="save it with safetensors.torch.save_file({'inputs': ..., 'labels': ...}, path)",
        ) from error
    _need_key(path, "inputs", keys)
    return _from_tensors(
        path, tensors["inputs"], tensors.get("labels"), _class_names(path, metadata)
    )


def _class_names(path: Path, metadata: dict[str, str]) -> tuple[str, ...]:
    """The metadata's JSON list, or nothing where there is none."""
    if "class_names" not in metadata:
        return ()
    try:
        names = json.loads(metadata["class_names"])
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"class names of '{path}' cannot be read",
            got=metadata["class_names"][:80],
            expected="a JSON list of strings under the metadata key class_names",
        )
    return tuple(names)


def _need_key(path: Path, key: str, keys: list[str]) -> None:
    if key not in keys:
        raise DataError(
            f"'{path}' has no array '{key}'",
            got=", ".join(keys) or "no arrays",
            nearest=nearest(key, keys),
            hint="name the rows x and the labels y in .npz, inputs and labels in .safetensors",
        )


def _tensor(path: Path, key: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"array '{key}' of '{path}' does not hold numbers",
            got=f"dtype {array.dtype}",
            hint="number the classes from 0" if key == "y" else None,
        )
    native = array.astype(array.dtype.newbyteorder("="))
    if native.dtype.kind == "u" and native.dtype.itemsize > 1:
        native = native.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(native))


def _from_tensors(
    path: Path, inputs: Tensor, labels: Tensor | None, class_names: tuple[str, ...]
) -> Dataset:
    if inputs.dim() < 2 or inputs.numel() == 0:
        raise DataError(
            f"'{path}' is empty or has no rows",
            got=f"inputs of shape {tuple(inputs.shape)}",
            expected="(n, ...) with n >= 1",
        )
    if inputs.dtype == torch.bool or inputs.is_complex():
        raise DataError(f"inputs of '{path}' are not numbers", got=str(inputs.dtype))
    if inputs.dim() in (3, 4) and (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        kind = Kind.IMAGES
        inputs = inputs.float() / (255 if inputs.dtype == torch.uint8 else 1)
        inputs = inputs.unsqueeze(1) if inputs.dim() == 3 else inputs
    elif inputs.is_floating_point():
        kind, inputs = Kind.ARRAYS, inputs.float()
    elif inputs.dim() == 2:
        kind, inputs = Kind.TOKENS, inputs.long()
    else:
        raise DataError(
            f"inputs of '{path}' are neither images nor token ids",
            got=f"{inputs.dtype} of shape {tuple(inputs.shape)}",
            expected="floats, uint8 images, or token ids (n, length)",
        )
    if labels is not None:
        labels, class_names = _numbered(path, labels, class_names, inputs.shape[0])
    return Dataset(
        name=path.stem,
        inputs=inputs.contiguous(),
        labels=labels,
        class_names=class_names,
        split="test",
        licence=NOT_STATED,
        description=f"{inputs.shape[0]} rows from {path.name}",
        kind=kind,
    )


def _numbered(
    path: Path, labels: Tensor, class_names: tuple[str, ...], num_rows: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as int64, and the class names, which are the numbers where none are given."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise DataError(
            f"labels of '{path}' are not whole numbers",
            got=str(labels.dtype),
            hint="number the classes from 0 and save them as integers",
        )
    if labels.shape != (num_rows,):
        raise DataError(
            f"labels of '{path}' do not fit its rows",
            got=f"labels of shape {tuple(labels.shape)}",
            expected=f"({num_rows},)",
            hint="give one label for each row",
        )
    labels = labels.long()
    if class_names:
        return labels, class_names
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"class ids of '{path}' are out of range",
            got=f"{low} to {high}",
            expected=f"0 to at most {MAX_CLASSES - 1}",
            hint="number the classes from 0, as the network does",
        )
    return labels, tuple(str(c) for c in range(high + 1))


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text", got=str(error)) from error
    # Not splitlines: a JSON string may hold U+2028, at which that would cut.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"'{path}' is empty", expected="at least one line of text")
    return lines


def _txt(path: Path) -> Dataset:
    return _from_texts(path, [line.strip() for _, line in _lines(path)], [])


def _jsonl(path: Path) -> Dataset:
    texts: list[str] = []
    labels: list[object] = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of '{path}' is not JSON",
                got=str(error),
                expected='{"text": "...", "label": ...}',
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"]:
            raise DataError(
                f"line {number} of '{path}' has no text",
                got=line[:60],
                expected='{"text": "...", "label": ...}, the label optional',
            )
        texts.append(row["text"])
        if "label" in row:
            labels.append(row["label"])
    if labels and len(labels) != len(texts):
        raise DataError(
            f"some rows of '{path}' have no label",
            got=f"{len(labels)} labels for {len(texts)} texts",
            hint="label all rows or none",
        )
    return _from_texts(path, texts, labels)


def _from_texts(path: Path, texts: list[str], labels: list[object]) -> Dataset:
    numbers: Tensor | None = None
    class_names: tuple[str, ...] = ()
    if labels:
        if all(isinstance(label, str) for label in labels):
            class_names = tuple(sorted({str(label) for label in labels}))
            numbers = torch.tensor([class_names.index(str(label)) for label in labels])
        elif all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
            numbers, class_names = _numbered(path, torch.tensor(labels), (), len(texts))
        else:
            raise DataError(
                f"labels of '{path}' are of several kinds",
                got=", ".join(sorted({type(label).__name__ for label in labels})),
                expected="all strings or all whole numbers",
            )
    return Dataset(
        name=path.stem,
        inputs=torch.zeros(len(texts), 0, dtype=torch.int64),
        labels=numbers,
        class_names=class_names,
        split="test",
        licence=NOT_STATED,
        description=f"{len(texts)} texts from {path.name}",
        kind=Kind.TEXT,
        texts=tuple(texts),
    )


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".txt": _txt,
    ".jsonl": _jsonl,
}

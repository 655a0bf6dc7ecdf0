"""The datasets that come with the package. Their files are made by `scripts/make_data.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from patchclamp.core.errors import DataError, nearest
from patchclamp.data.catalogue import ENTRIES, SPLITS, Kind
from patchclamp.data.dataset import Dataset
from patchclamp.data.induction import HELD_OUT_PERIODS, TRAINING_PERIODS, repeats

FOLDER = Path(__file__).parent / "files"

GREY_LEVELS = 16.0
"""The brightest pixel in the file of digits."""

WINDOW = 128
"""Bytes in a row of `prose`."""

VALIDATION_SHARE = TEST_SHARE = 0.1
"""The last two tenths of the prose, in the order of the book."""


def load(name: str, split: str) -> Dataset:
    """The bundled dataset `name`. Raises: DataError for an unknown split."""
    if split not in SPLITS:
        raise DataError(
            f"dataset '{name}' has no split '{split}'",
            expected="one of " + ", ".join(SPLITS),
            nearest=nearest(split, SPLITS),
        )
    return LOADERS[name](split)


def _digits(split: str) -> Dataset:
    arrays = safetensors.torch.load_file(FOLDER / "digits.safetensors")
    rows = arrays["split"] == SPLITS.index(split)
    return Dataset(
        name="digits",
        inputs=arrays["images"][rows].unsqueeze(1).float() / GREY_LEVELS,
        labels=arrays["labels"][rows].long(),
        class_names=tuple("0123456789"),
        split=split,
        licence=ENTRIES["digits"].licence,
        description=ENTRIES["digits"].description,
        kind=Kind.IMAGES,
    )


def _prose(split: str) -> Dataset:
    book = (FOLDER / "prose.txt").read_bytes()
    num_rows = len(book) // WINDOW
    num_validation, num_test = int(num_rows * VALIDATION_SHARE), int(num_rows * TEST_SHARE)
    num_train = num_rows - num_validation - num_test
    first, last = {
        "train": (0, num_train),
        "validation": (num_train, num_train + num_validation),
        "test": (num_train + num_validation, num_rows),
    }[split]
    rows = torch.frombuffer(bytearray(book[: num_rows * WINDOW]), dtype=torch.uint8)
    inputs = rows.view(num_rows, WINDOW)[first:last].long()
    return Dataset(
        name="prose",
        inputs=inputs,
        split=split,
        licence=ENTRIES["prose"].licence,
        description=ENTRIES["prose"].description,
        kind=Kind.TOKENS,
        texts=tuple(bytes(row).decode("ascii") for row in inputs.tolist()),
    )


def _induction(split: str) -> Dataset:
    entry = ENTRIES["induction"]
    index = SPLITS.index(split)
    rows = repeats(
        entry.size[index],
        length=entry.shape[0],
        periods=HELD_OUT_PERIODS if split == "test" else TRAINING_PERIODS,
        seed=1000 + index,
    )
    return Dataset(
        name="induction",
        inputs=rows.input_ids,
        split=split,
        licence=entry.licence,
        description=entry.description,
        kind=Kind.TOKENS,
        texts=tuple(bytes(row).decode("ascii") for row in rows.input_ids.tolist()),
    )


LOADERS: dict[str, Callable[[str], Dataset]] = {
    "digits": _digits,
    "prose": _prose,
    "induction": _induction,
}

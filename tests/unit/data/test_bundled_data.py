"""The bundled datasets: splits, ranges, and what the catalogue says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchclamp.data
from patchclamp.core.errors import DataError
from patchclamp.data import Kind, catalogue, load_data

FILES = Path(patchclamp.data.__file__).parent / "files"
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_catalogue_is_right_about_every_dataset(entry: patchclamp.data.Entry) -> None:
    parts = [load_data(entry.name, split=split) for split in SPLITS]
    assert tuple(map(len, parts)) == entry.size
    for part in parts:
        assert part.inputs.shape[1:] == entry.shape
        assert (part.kind, part.licence) == (entry.kind, entry.licence)


def test_default_split_is_test() -> None:
    assert load_data("digits").split == "test"


@pytest.mark.parametrize("name", ["digits", "prose", "induction"])
def test_splits_share_no_row(name: str) -> None:
    rows = [
        {bytes(row.numpy().tobytes()) for row in load_data(name, split=split).inputs}
        for split in SPLITS
    ]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_digits_splits_are_stratified() -> None:
    labels = {s: load_data("digits", split=s).labels for s in SPLITS}
    counts = {s: y.bincount(minlength=10) for s, y in labels.items() if y is not None}
    everything = torch.stack(list(counts.values())).sum(0)
    assert everything.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    for split, share in (("train", 1257 / 1797), ("validation", 180 / 1797), ("test", 360 / 1797)):
        assert (counts[split] - everything * share).abs().max() <= 1.5


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn makes the file")
    digits = datasets.load_digits()
    wanted = sorted(
        (label, tuple(image.ravel() / 16))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    found = []
    for split in SPLITS:
        data = load_data("digits", split=split)
        assert data.labels is not None
        rows = zip(data.labels.tolist(), data.inputs.flatten(1).tolist(), strict=True)
        found += [(label, tuple(image)) for label, image in rows]
    assert sorted(found) == wanted


def test_digits_lie_between_zero_and_one() -> None:
    inputs = load_data("digits", split="train").inputs
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_prose_is_the_book_in_order() -> None:
    book = (FILES / "prose.txt").read_text("ascii")
    texts = [text for split in SPLITS for text in load_data("prose", split=split).texts]
    assert "".join(texts) == book[: len(texts) * 128]
    assert book.startswith("Loomings.\nCall me Ishmael.")
    data = load_data("prose")
    assert bytes(data.inputs[5].tolist()).decode("ascii") == data.texts[5]


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 600_000


def test_loading_twice_gives_the_same_hash() -> None:
    assert load_data("induction").hash == load_data("induction").hash
    assert load_data("digits").kind is Kind.IMAGES


def test_unknown_split_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no split 'tests'.*nearest 'test'"):
        load_data("digits", split="tests")


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no file 'digit'.*nearest 'digits'.*hint"):
        load_data("digit")

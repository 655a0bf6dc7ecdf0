"""The dataset container: what it refuses, its subsets and its hash."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import patchclamp.data
from patchclamp.core.errors import DataError
from patchclamp.data import Dataset, Kind


def dataset(**changes: object) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, object] = {
        "name": "made",
        "inputs": torch.rand(30, 1, 4, 4, generator=generator),
        "labels": torch.arange(30) % 3,
        "class_names": ("a", "b", "c"),
        "split": "test",
        "licence": "none",
        "description": "made for a test",
        "kind": Kind.IMAGES,
    }
    return Dataset(**(values | changes))


def test_length_is_the_number_of_rows() -> None:
    assert len(dataset()) == 30


def test_fields_cannot_be_assigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset().name = "other"


def test_importing_the_package_and_listing_loads_no_torch() -> None:
    code = (
        "import sys, patchclamp.data as d; names = [e.name for e in d.catalogue()];"
        "sys.exit(0 if 'torch' not in sys.modules and 'digits' in names else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_typo_in_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Datset"):
        _ = patchclamp.data.Datset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.zeros(0, 1, 4, 4), "labels": None}, "is empty"),
        ({"inputs": torch.zeros(30, 1, 0, 4)}, "rows of 'made' are empty"),
        ({"inputs": torch.zeros(30, 1, 4, 4).double()}, "are not images"),
        ({"inputs": torch.zeros(30, 4, 4)}, "are not images"),
        ({"inputs": torch.full((30, 1, 4, 4), float("inf"))}, "not finite"),
        ({"labels": torch.zeros(29, dtype=torch.int64)}, "do not fit its rows"),
        ({"labels": torch.zeros(30)}, "do not fit its rows"),
        ({"labels": torch.full((30,), 3)}, "no class name"),
        ({"labels": torch.full((30,), -1)}, "no class name"),
        ({"inputs": torch.full((30, 5), -1), "kind": Kind.TOKENS}, "negative token ids"),
        ({"inputs": torch.rand(30, 5), "kind": Kind.TOKENS}, "are not tokens"),
        ({"texts": ("one",)}, "texts for other rows"),
    ],
)
def test_rows_that_no_method_could_use_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataset(**changes)


def test_nan_names_the_row() -> None:
    inputs = torch.zeros(30, 1, 4, 4)
    inputs[17, 0, 1, 2] = torch.nan
    with pytest.raises(DataError, match="1 such rows, the first at index 17"):
        dataset(inputs=inputs)


def test_subset_is_seeded_ordered_and_keeps_rows_with_their_labels() -> None:
    data = dataset(
        inputs=torch.arange(30.0).view(30, 1, 1, 1).expand(30, 1, 4, 4).contiguous(),
        texts=tuple(map(str, range(30))),
    )
    part = data.subset(9, seed=1)
    rows = part.inputs[:, 0, 0, 0].long()
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert part.labels is not None
    assert torch.equal(part.labels, rows % 3)
    assert part.texts == tuple(map(str, rows.tolist()))
    assert part.hash == data.subset(9, seed=1).hash
    assert part.hash != data.subset(9, seed=2).hash


@pytest.mark.parametrize("n", [3, 9, 14, 29])
def test_subset_keeps_the_share_of_each_class(n: int) -> None:
    part = dataset().subset(n)
    assert len(part) == n
    assert part.labels is not None
    counts = part.labels.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_subset_of_unbalanced_classes_keeps_the_rare_one() -> None:
    data = dataset(labels=torch.tensor([0] * 24 + [1] * 6))
    part = data.subset(10)
    assert part.labels is not None
    assert part.labels.bincount().tolist() == [8, 2]


def test_subset_without_labels() -> None:
    assert len(dataset(labels=None, class_names=()).subset(7)) == 7


def test_a_large_subset_is_everything_and_an_empty_one_is_refused() -> None:
    data = dataset()
    assert data.subset(31) is data
    with pytest.raises(DataError, match="needs rows"):
        data.subset(0)


def test_hash_covers_contents_and_not_the_name() -> None:
    data = dataset()
    assert data.labels is not None
    assert dataclasses.replace(data, name="other").hash == data.hash
    moved = data.inputs.clone()
    moved[3, 0, 2, 1] += 1e-3
    relabelled = data.labels.clone()
    relabelled[0] = 2
    others = [
        dataclasses.replace(data, inputs=moved).hash,
        dataclasses.replace(data, labels=relabelled).hash,
        dataclasses.replace(data, labels=None).hash,
        dataclasses.replace(data, class_names=("a", "b", "d")).hash,
        dataclasses.replace(data, inputs=data.inputs.view(30, 1, 2, 8)).hash,
    ]
    assert len({data.hash, *others}) == 6

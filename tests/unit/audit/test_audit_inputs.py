"""What an audit is given: data that does not fit, few rows, and anatomies without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.audit import audit
from patchclamp.audit.intake import intake
from patchclamp.core.document import Document, Examples, Table
from patchclamp.core.errors import DataError, InputError, PatchclampError
from patchclamp.data import Dataset, Kind, load_data
from patchclamp.report.json_form import plain_document
from tests.networks import fresh
from tests.unit.audit.test_audit import SECTIONS, made, sections


def npz(folder: Path, **given: np.ndarray) -> str:
    path = folder / "given.npz"
    np.savez(path, **given)
    return str(path)


def text(folder: Path, content: str) -> str:
    path = folder / "given.txt"
    path.write_text(content, "utf-8")
    return str(path)


IMAGES = np.random.default_rng(0).random((12, 8, 8)).astype("float32")
BAD: dict[str, tuple[str, Callable[[Path], str]]] = {
    "a class too many": ("digits-cnn", lambda f: npz(f, x=IMAGES, y=np.arange(12))),
    "NaN": ("digits-cnn", lambda f: npz(f, x=np.full((3, 8, 8), np.nan, "float32"))),
    "no rows": ("digits-cnn", lambda f: npz(f, x=np.zeros((0, 8, 8), "float32"))),
    "no bytes": ("tiny-lm", lambda f: text(f, "")),
    "three channels": ("digits-cnn", lambda f: npz(f, x=np.zeros((3, 3, 8, 8), "float32"))),
    "flat rows": ("digits-cnn", lambda f: npz(f, x=np.zeros((3, 64), "float32"))),
    "texts for images": ("digits-cnn", lambda f: text(f, "call me Ishmael\n")),
    "tokens for images": ("digits-cnn", lambda f: "prose"),
    "images for texts": ("tiny-lm", lambda f: npz(f, x=IMAGES)),
    "real numbers for texts": ("tiny-lm", lambda f: npz(f, x=np.zeros((5, 9), "float32"))),
    "labels of another length": ("digits-cnn", lambda f: npz(f, x=IMAGES, y=np.arange(3))),
    "a missing file": ("digits-cnn", lambda f: str(f / "absent.npz")),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_does_not_fit_is_refused_with_a_way_out(case: str, tmp_path: Path) -> None:
    model, data = BAD[case]
    with pytest.raises((DataError, InputError)) as caught:
        audit(model, data(tmp_path), budget_seconds=6)
    error = caught.value
    assert error.hint or error.expected, str(error)
    assert error.exit_code == 2
    assert "\n" not in str(error)


def test_a_text_too_short_for_two_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too short"):
        audit("tiny-lm", text(tmp_path, "hi\n"), budget_seconds=6)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="vocabulary"):
        audit("tiny-lm", made(Kind.TOKENS, torch.full((4, 8), 300)), budget_seconds=6)


def test_data_without_labels_leaves_out_what_needs_them(tmp_path: Path) -> None:
    found = audit("digits-mlp", npz(tmp_path, x=IMAGES), budget_seconds=6)
    assert sections(found) == SECTIONS[1:]
    said = [part.what for part in found.left_out]
    assert "accuracy, loss and calibration" in said
    assert "selectivity to classes" in said
    plain_document(found)


@pytest.mark.parametrize("num", [1, 3, 12])
def test_few_rows_leave_out_what_needs_more(num: int) -> None:
    data = made(Kind.IMAGES, torch.rand(num, 1, 8, 8), torch.arange(num) % 3)
    found = audit("digits-mlp", data, budget_seconds=6)
    assert sections(found) == SECTIONS
    said = " ".join(part.what for part in found.left_out)
    assert ("calibration" in said) == (num < 10)
    assert "selectivity of 2 sites" in said
    plain_document(found)


def test_a_single_class_leaves_selectivity_out() -> None:
    data = made(Kind.IMAGES, torch.rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.long))
    found = audit("digits-mlp", data, budget_seconds=6)
    assert any("selectivity" in part.what for part in found.left_out)
    assert not any(f.id.startswith("units/selective") for f in found.findings)


# ---- texts with labels ---------------------------------------------------------


class PerToken(nn.Module):
    """Classifies texts: rectified units at every token, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.embed(ids)).mean(1))
        return logits


class Pooled(nn.Module):
    """Classifies texts: the mean of the tokens first, then rectified units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 12)
        self.act = nn.ReLU()
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.lin(self.embed(ids).mean(1))))
        return logits


def texts(*, labelled: bool = True) -> Dataset:
    """120 texts of 24 tokens, sorted by class; class c likes the tokens from 6 c on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) // 40
    ids = torch.randint(0, 20, (120, 24), generator=generator)
    own = 6 * labels[:, None] + torch.randint(0, 6, (120, 24), generator=generator)
    ids = torch.where(torch.rand(120, 24, generator=generator) < 0.7, own, ids)
    return made(Kind.TOKENS, ids, labels if labelled else None)


def selective(document: Document) -> list[float]:
    """p of every unit in the table of units."""
    units = next(s for s in document.sections if s.id == "units")
    table = next(b for b in units.blocks if isinstance(b, Table) and b.title == "Units")
    return [float(row[-1]) for row in table.rows if row[-1] is not None]


@pytest.mark.parametrize("make", [PerToken, Pooled])
def test_texts_sorted_by_class_show_their_selective_units(make: type[nn.Module]) -> None:
    data = texts()
    found = audit(make().eval(), data, example_inputs=data.inputs[:3], budget_seconds=20)
    p = selective(found)
    assert min(p) <= 0.01, "labels are shuffled over texts, and every class is among the first rows"
    plain_document(found)


def test_texts_without_labels_ask_for_the_commonest_tokens() -> None:
    data = texts(labelled=False)
    found = audit(PerToken().eval(), data, example_inputs=data.inputs[:3], budget_seconds=20)
    claims = [f.claim for f in found.findings if f.id.startswith("units/selective/")]
    assert claims
    assert all("class token '" in c for c in claims)


def test_units_of_a_whole_text_are_not_selective_to_its_first_token() -> None:
    data = texts(labelled=False)
    found = audit(Pooled().eval(), data, example_inputs=data.inputs[:3], budget_seconds=20)
    assert not any(f.id.startswith("units/selective") for f in found.findings)
    assert any("selectivity of 1 sites" in part.what for part in found.left_out)
    plain_document(found)


def test_token_ids_serve_a_network_with_a_tokenizer_of_its_own() -> None:
    class Words:
        vocab_size = 256

        def pieces(self, ids: list[int]) -> list[str]:
            return [f"word {i}" for i in ids]

    net = patchclamp.open("tiny-lm")
    net.loaded = dataclasses.replace(net.loaded, tokenizer=Words())
    rows = intake(net, made(Kind.TOKENS, torch.randint(0, 256, (5, 40))), length=16)
    assert rows.tokens is not None
    assert tuple(rows.tokens.shape) == (5, 16)
    with pytest.raises(PatchclampError):
        intake(patchclamp.open("digits-mlp"), load_data("prose"), length=16)


# ---- anatomies without an adapter --------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "spiking", "lstm"])
def test_specimens_are_audited_whole(name: str) -> None:
    module, example = fresh(name)
    generator = torch.Generator().manual_seed(0)
    if name == "lstm":
        data = made(Kind.TOKENS, torch.randint(0, 12, (16, 10), generator=generator))
    else:
        images = torch.rand(24, 1, 8, 8, generator=generator)
        data = made(Kind.IMAGES, images, torch.arange(24) % 2)
    found = audit(module, data, example_inputs=example, budget_seconds=20)
    assert sections(found) == SECTIONS
    assert any(f.id.startswith("ablation/") for f in found.findings)
    engines = {f.id: f for f in found.findings if f.id.startswith("engine/")}
    assert all(f.verdict.value != "does not hold" for f in engines.values())
    plain_document(found)


def test_examples_show_the_rows_that_drive_a_unit_most() -> None:
    data = load_data("digits").subset(60)
    net = patchclamp.open("digits-mlp")
    found = audit(net, data, budget_seconds=6)
    units = next(s for s in found.sections if s.id == "units")
    block = next(b for b in units.blocks if isinstance(b, Examples))
    site, number = block.units[0].unit.split(" unit ")
    strongest = net.record(data.inputs, site).tensor(site)[:, int(number)].topk(8).values
    shown = [p.value for p in block.units[0].pictures]
    assert shown == pytest.approx(strongest.tolist(), abs=1e-5)


@pytest.mark.slow
def test_efficientnet_is_audited_on_a_row_of_each_class() -> None:
    """One row a class is too few for selectivity: it is left out, and the rest is done."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs `make test`'s weights")
    images = torch.rand(20, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) * 40
    data = Dataset(
        name="noise",
        inputs=images,
        labels=labels,
        class_names=tuple(map(str, range(1000))),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=Kind.IMAGES,
    )
    found = audit("efficientnet-lite0", data, budget_seconds=120)
    assert sections(found) == SECTIONS
    assert any("selectivity" in part.what for part in found.left_out)
    plain_document(found)


def test_the_data_shows_what_a_network_without_examples_takes(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    generator = np.random.default_rng(0)
    np.savez(path, x=generator.normal(size=(40, 6)).astype("float32"), y=np.arange(40) % 3)
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    document = audit(network.eval(), path, budget_seconds=20)
    assert "40 rows of data" in document.subtitle


def test_a_network_without_examples_and_data_is_refused() -> None:
    with pytest.raises(InputError, match=r"example inputs.*--data"):
        audit(torch.nn.Linear(3, 2).eval(), budget_seconds=20)

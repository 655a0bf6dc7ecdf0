"""The user's files: each form read right, each fault refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patchclamp.core.errors import DataError
from patchclamp.data import Kind, load_data

IMAGES = np.linspace(0, 1, 6 * 64, dtype=np.float32).reshape(6, 1, 8, 8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "mine.npz"
    np.savez(path, **arrays)
    return path


def lines(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return path


def test_npz_of_images(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path, x=IMAGES, y=LABELS))
    assert (data.name, data.kind, data.split) == ("mine", Kind.IMAGES, "test")
    assert torch.equal(data.inputs, torch.from_numpy(IMAGES))
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names == ("0", "1", "2")


def test_bytes_are_divided_by_255_and_grey_images_get_a_channel(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path, x=np.full((2, 8, 8), 51, dtype=np.uint8)))
    assert data.inputs.shape == (2, 1, 8, 8)
    assert data.inputs.unique().tolist() == pytest.approx([0.2])
    assert data.labels is None


@pytest.mark.parametrize("dtype", [">f4", "float64", "float16"])
def test_other_float_types_become_float32(tmp_path: Path, dtype: str) -> None:
    data = load_data(npz(tmp_path, x=IMAGES.astype(dtype)))
    torch.testing.assert_close(data.inputs, torch.from_numpy(IMAGES), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["int32", "uint16", "uint8"])
def test_whole_numbers_of_two_axes_are_tokens(tmp_path: Path, dtype: str) -> None:
    data = load_data(npz(tmp_path, x=np.arange(12).reshape(3, 4).astype(dtype)))
    assert data.kind is Kind.TOKENS
    assert data.inputs.tolist() == np.arange(12).reshape(3, 4).tolist()


def test_floats_of_two_axes_are_arrays(tmp_path: Path) -> None:
    assert load_data(npz(tmp_path, x=IMAGES.reshape(6, 64))).kind is Kind.ARRAYS


def test_safetensors_with_class_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    tensors = {"inputs": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)}
    names = ["cat", "dog", "owl", "bee"]
    save_file(tensors, path, metadata={"class_names": json.dumps(names)})
    data = load_data(path)
    assert data.class_names == tuple(names)
    assert torch.equal(data.inputs, tensors["inputs"])


def test_txt_is_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one\n\n  \n\u4e8c \U0001f40b </script>\r\n", "utf-8")
    data = load_data(path)
    assert data.kind is Kind.TEXT
    assert data.texts == ("one", "\u4e8c \U0001f40b </script>")
    assert data.inputs.shape == (2, 0)


def test_jsonl_with_names_as_labels(tmp_path: Path) -> None:
    rows = [{"text": "b\u2028x", "label": "no"}, {"text": "a", "label": "yes"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    data = load_data(path)
    assert data.texts == ("b\u2028x", "a")
    assert data.class_names == ("no", "yes")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]


def test_jsonl_with_numbers_and_without_labels(tmp_path: Path) -> None:
    numbered = load_data(lines(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": 0}))
    assert numbered.labels is not None
    assert numbered.labels.tolist() == [1, 0]
    assert load_data(lines(tmp_path, {"text": "a"})).labels is None


def test_text_subset_keeps_texts(tmp_path: Path) -> None:
    data = load_data(lines(tmp_path, *({"text": str(i)} for i in range(9))))
    part = data.subset(4)
    assert len(part) == len(part.texts) == 4
    assert set(part.texts) < set(data.texts)


def test_data_may_show_only_some_of_a_networks_classes(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path, x=IMAGES, y=LABELS * 2 + 1))
    assert data.labels is not None
    assert data.labels.tolist() == (LABELS * 2 + 1).tolist()
    assert data.class_names == tuple(str(c) for c in range(int(LABELS.max()) * 2 + 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": IMAGES, "y": LABELS}, "no array 'x'"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "empty"),
        ({"x": np.full((2, 1, 8, 8), np.nan)}, r"not finite \(NaN"),
        ({"x": IMAGES, "y": LABELS[:5]}, "do not fit its rows"),
        ({"x": IMAGES, "y": LABELS[:, None]}, "do not fit its rows"),
        ({"x": IMAGES, "y": LABELS - 1}, "out of range"),
        ({"x": IMAGES, "y": LABELS + 10**6}, "out of range"),
        ({"x": IMAGES, "y": LABELS + 0.5}, "not whole numbers"),
        ({"x": IMAGES, "y": np.array(list("abcabc"))}, "does not hold numbers"),
        ({"x": IMAGES.astype(complex)}, "does not hold numbers"),
        ({"x": IMAGES > 0.5}, "not numbers"),
        ({"x": np.full((2, 3), -1)}, "negative token ids"),
        ({"x": np.zeros((2, 3, 4), dtype=np.int64)}, "neither images nor token ids"),
        ({"x": np.arange(5.0)}, "no rows"),
    ],
)
def test_faulty_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path, **arrays))


def test_pickled_npz_is_refused_without_running_it(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    objects = np.empty(1, dtype=object)
    objects[0] = Bomb()
    path = npz(tmp_path, x=objects)
    with pytest.raises(DataError, match=r"pickled objects.*hint: save plain number arrays"):
        load_data(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".pt", ".pkl", ".npy"])
def test_pickles_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"mine{ending}"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match=r"may be a pickle.*hint"):
        load_data(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.npz", b"not a zip", "not an npz archive"),
        ("mine.npz", b"", "not an npz archive"),
        ("mine.safetensors", b"\xff" * 40, "not a whole safetensors file"),
        ("mine.txt", b"\n \n", "is empty"),
        ("mine.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("mine.jsonl", b"", "is empty"),
        ("mine.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of"),
        ("mine.jsonl", b'{"txt": "a"}', "line 1 of .* has no text"),
        ("mine.jsonl", b'["a"]', "line 1 of .* has no text"),
        ("mine.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}', "some rows .* have no label"),
        ("mine.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": "x"}', "several kinds"),
        ("mine.jsonl", b'{"text": "a", "label": -3}', "out of range"),
        ("mine.csv", b"1,2", "not a dataset file"),
    ],
)
def test_faulty_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(path)


def test_truncated_npz_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=IMAGES, y=LABELS)
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"is damaged"):
        load_data(path)


def test_safetensors_with_wrong_keys_or_class_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({"images": torch.zeros(2, 1, 8, 8)}, path)
    with pytest.raises(DataError, match=r"no array 'inputs'.*got images"):
        load_data(path)
    save_file({"inputs": torch.zeros(2, 1, 8, 8)}, path, metadata={"class_names": "cat"})
    with pytest.raises(DataError, match="class names of"):
        load_data(path)


def test_a_folder_and_another_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a dataset file; got a folder"):
        load_data(tmp_path)
    with pytest.raises(DataError, match="holds one split"):
        load_data(npz(tmp_path, x=IMAGES), split="train")

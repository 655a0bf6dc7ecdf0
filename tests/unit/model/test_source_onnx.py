"""ONNX: old opsets, open axes, hostile files, and no torchvision."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from patchclamp.core.errors import MissingExtraError, SourceError, UnsafeFileError
from patchclamp.model.sources import load
from patchclamp.model.sources.torchvision_stand_in import import_onnx2torch

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="the reference for ONNX files")
if importlib.util.find_spec("onnx2torch") is None:
    pytest.skip("needs onnx2torch", allow_module_level=True)

import numpy as np  # noqa: E402  (after the skips)
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT
WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def model(opset: int = 13, shape: tuple[object, ...] = ("n", 3), ops: str = "Flatten") -> object:
    """x, one operator, a matrix product, Relu."""
    nodes = [
        helper.make_node(ops, ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    weight = numpy_helper.from_array(WEIGHT, "w")
    inputs = [helper.make_tensor_value_info("x", FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [None, 4])]
    if opset < 9:  # IR version 3 lists initialisers among the inputs
        inputs.append(helper.make_tensor_value_info("w", FLOAT, [3, 4]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if opset < 9 else 8
    )


def save(path: Path, proto: object) -> Path:
    raw = proto.SerializeToString()  # type: ignore[attr-defined]
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize(
    ("opset", "origin"),
    [(13, "ONNX opset 13"), (8, "ONNX opset 8 (converted to 13)")],
)
@pytest.mark.parametrize("name", ["net.onnx", "net.onnx.gz"])
def test_networks_equal_the_reference_runtime(
    tmp_path: Path, opset: int, origin: str, name: str
) -> None:
    import onnxruntime

    proto = model(opset)
    loaded = load(save(tmp_path / name, proto))
    assert (loaded.name, loaded.origin, loaded.notes) == ("net", origin, ())
    assert not loaded.module.training
    assert isinstance(loaded.example_inputs, tuple)
    (x,) = loaded.example_inputs
    assert x.shape == (2, 3)
    session = onnxruntime.InferenceSession(proto.SerializeToString())  # type: ignore[attr-defined]
    (expected,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(loaded.module(x), torch.from_numpy(expected))


def test_an_axis_of_size_zero_counts_as_open_and_fixed_ones_are_kept(tmp_path: Path) -> None:
    assert examples(load(save(tmp_path / "a.onnx", model(shape=(0, 3)))))[0].shape == (2, 3)
    assert examples(load(save(tmp_path / "b.onnx", model(shape=(1, 3)))))[0].shape == (1, 3)


def examples(loaded: object) -> tuple[torch.Tensor, ...]:
    made = loaded.example_inputs  # type: ignore[attr-defined]
    assert isinstance(made, tuple)
    return made


def test_token_inputs_are_zeros_and_masks_ones(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=FLOAT),
        helper.make_node("ReduceSum", ["e"], ["s"], keepdims=0),
        helper.make_node("Mul", ["m", "s"], ["y"]),
    ]
    ints = TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, ints, ["n", "t"]) for n in ("ids", "attention_mask")],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    loaded = load(save(tmp_path / "t.onnx", proto))
    ids, mask = examples(loaded)
    assert ids.dtype == torch.int64
    assert ids.shape == (2, 8)
    assert ids.eq(0).all()
    assert mask.eq(1).all()


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no converter for the operators Det in"):
        load(save(tmp_path / "d.onnx", model(ops="Det", opset=11)))


def test_an_operator_of_another_domain_is_named(tmp_path: Path) -> None:
    proto = model(ops="Flatten")
    proto.graph.node[0].domain = "my.ops"  # type: ignore[attr-defined]
    proto.opset_import.append(helper.make_opsetid("my.ops", 1))  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match=r"my\.ops\.Flatten"):
        load(save(tmp_path / "d.onnx", proto))


@pytest.mark.parametrize("kind", ["garbage", "text", "short", "tiny"])
@pytest.mark.parametrize("suffix", [".onnx", ".onnx.gz"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    whole = model().SerializeToString()  # type: ignore[attr-defined]
    raw = {
        "garbage": b"\xff\x00" * 50,
        "text": b"hello",
        "short": whole[: len(whole) // 2],
        "tiny": b"\x08\x08",
    }[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == ".onnx.gz" else raw)
    with pytest.raises(SourceError, match="is not an ONNX"):
        load(path)


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx.gz", model())
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(SourceError, match="gzip"):
        load(path)
    path.write_bytes(b"plain")
    with pytest.raises(SourceError, match="gzip"):
        load(path)


def outside(folder: Path, location: str, *, length: int = 48) -> Path:
    """A model whose weight lies in another file."""
    proto = model()
    weight = proto.graph.initializer[0]  # type: ignore[attr-defined]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return save(folder / "net.onnx", proto)


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    loaded = load(outside(tmp_path, "w.bin"))
    x = torch.ones(1, 3)
    expected = (x @ torch.from_numpy(WEIGHT)).relu()
    torch.testing.assert_close(loaded.module(x), expected)


@pytest.mark.parametrize("how", ["parent", "absolute", "link", "empty"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(secret)
    location = {
        "parent": "../secret.bin",
        "absolute": str(secret),
        "link": "link.bin",
        "empty": "",
    }[how]
    with pytest.raises(UnsafeFileError, match=r"tensor 'w' refers to a file outside"):
        load(outside(folder, location))


def test_weights_outside_the_folder_are_found_in_attributes_and_subgraphs(tmp_path: Path) -> None:
    hidden = TensorProto(name="hidden", data_type=FLOAT, dims=[1])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="/etc/hostname")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=hidden)], "inner", [], []
    )
    proto = model()
    node = proto.graph.node[2]  # type: ignore[attr-defined]
    node.attribute.append(helper.make_attribute("then_branch", inner))
    with pytest.raises(UnsafeFileError, match="'hidden'"):
        load(save(tmp_path / "a.onnx", proto))


def test_missing_and_short_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'w' are missing"):
        load(outside(tmp_path, "w.bin"))
    (tmp_path / "w.bin").write_bytes(b"x" * 10)
    with pytest.raises(SourceError, match=r"'w'.*cut short"):
        load(outside(tmp_path, "w.bin"))


def test_a_missing_library_gives_the_exact_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.onnx", model())
    monkeypatch.setattr("patchclamp.model.sources.onnx.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as raised:
        load(path)
    assert raised.value.hint == (
        "pip install 'patchclamp[onnx]' && pip install --no-deps onnx2torch==1.5.15"
    )


def test_example_inputs_that_do_not_run_are_left_out_with_the_reason(tmp_path: Path) -> None:
    loaded = load(save(tmp_path / "a.onnx", model(shape=("n", 5))))
    assert loaded.example_inputs is None
    assert "no example inputs" in loaded.notes[0]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="has torchvision")
def test_the_stand_in_for_torchvision_leaves_no_trace_and_refuses_by_name() -> None:
    converters = import_onnx2torch().node_converters
    assert not [name for name in sys.modules if name.startswith("torchvision")]
    assert importlib.util.find_spec("torchvision") is None
    with pytest.raises(MissingExtraError, match="RoiAlign is computed by torchvision"):
        converters.roialign.roi_align(torch.zeros(1))
    with pytest.raises(MissingExtraError, match="NonMaxSuppression"):
        converters.nms.torchvision.ops.nms(None)

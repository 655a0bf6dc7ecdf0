"""The checker's own reader of ONNX against onnxruntime, operator by operator."""

from __future__ import annotations

import gzip
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from patchclamp.core.errors import EngineError, SourceError
from patchclamp.methods.bounds.certificate.network import Affine, Elementwise
from patchclamp.methods.bounds.certificate.reading import read_network, sha256
from tests.unit.methods.bounds.certificate.small_networks import (
    conv_residual,
    f32,
    mlp,
    node,
    packed,
    run,
)

RNG = np.random.default_rng(3)
I64 = np.int64


def agrees(data: bytes, num: int = 4, scale: float = 1.0) -> None:
    network = read_network(data)
    x = (np.random.default_rng(1).normal(size=(num, network.num_inputs)) * scale).astype(np.float32)
    expected = run(data, x)
    found = network.forward(x.astype(np.float64))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("function", ["Relu", "LeakyRelu", "Sigmoid", "Tanh"])
def test_whole_networks(function: str) -> None:
    agrees(mlp([3, 5, 4, 2], function=function)[0])
    agrees(conv_residual(function=function))


IMAGE = (1, 2, 5, 6)
SIGNAL = (1, 4, 9)
K = {"k": f32(RNG, 4, 2, 3, 2), "b": f32(RNG, 4)}
K1 = {"k": f32(RNG, 6, 2, 3), "b": f32(RNG, 6)}
M = {"w": f32(RNG, 6, 3)}


@pytest.mark.parametrize(
    ("kind", "attributes", "weights", "shape"),
    [
        ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 1]}, K, IMAGE),
        ("Conv", {"dilations": [2, 1], "kernel_shape": [3, 2]}, K, IMAGE),
        ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, K, IMAGE),
        ("Conv", {"auto_pad": "SAME_LOWER", "strides": [1, 2]}, K, IMAGE),
        ("Conv", {"auto_pad": "VALID"}, K, IMAGE),
        ("Conv", {"group": 2, "pads": [1, 1]}, K1, SIGNAL),
        ("AveragePool", {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1]}, {}, IMAGE),
        (
            "AveragePool",
            {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
            {},
            IMAGE,
        ),
        ("AveragePool", {"kernel_shape": [3], "strides": [2]}, {}, SIGNAL),
        ("GlobalAveragePool", {}, {}, IMAGE),
        ("ReduceMean", {"axes": [1, -1], "keepdims": 0}, {}, IMAGE),
        ("ReduceMean", {}, {}, IMAGE),
        ("ReduceSum", {}, {"axes": np.array([2], I64)}, IMAGE),
        ("MatMul", {}, M, IMAGE),
        ("MatMul", {}, {"w": f32(RNG, 2, 6, 3)}, IMAGE),
        ("MatMul", {}, {"w": f32(RNG, 6)}, IMAGE),
        ("Gemm", {"alpha": 0.3, "beta": 1.7}, M | {"c": f32(RNG, 3)}, (1, 6)),
        ("Gemm", {"transA": 1}, {"w": f32(RNG, 4, 3), "c": f32(RNG, 1, 3)}, (4, 2)),
        ("BatchNormalization", {"epsilon": 1e-3}, {n: f32(RNG, 2) ** 2 for n in "abcd"}, IMAGE),
        ("Add", {}, {"c": f32(RNG, 5, 1)}, IMAGE),
        ("Sub", {}, {"c": f32(RNG, 3, 2, 1, 1)}, IMAGE),
        ("Mul", {}, {"c": f32(RNG, 2, 1, 6)}, IMAGE),
        ("Div", {}, {"c": f32(RNG, 6)}, IMAGE),
        ("Neg", {}, {}, IMAGE),
        ("Transpose", {"perm": [0, 2, 3, 1]}, {}, IMAGE),
        ("Reshape", {}, {"s": np.array([0, -1, 3], I64)}, IMAGE),
        ("Flatten", {"axis": 2}, {}, IMAGE),
        ("Flatten", {"axis": -1}, {}, IMAGE),
        ("Squeeze", {}, {"a": np.array([0], I64)}, IMAGE),
        ("Unsqueeze", {}, {"a": np.array([0, -1], I64)}, IMAGE),
        ("Expand", {}, {"s": np.array([3, 1, 5, 6], I64)}, IMAGE),
        ("Gather", {"axis": 2}, {"i": np.array([[0, -1], [2, 2]], I64)}, IMAGE),
        (
            "Slice",
            {},
            {"s": np.array([1, -1], I64), "e": np.array([99, -99], I64)}
            | {"a": np.array([2, 3], I64), "q": np.array([2, -2], I64)},
            IMAGE,
        ),
        ("Pad", {}, {"p": np.array([0, 0, 1, 2, 0, 1, 0, -1], I64), "v": np.float32(0.7)}, IMAGE),
        ("Pad", {"mode": "reflect"}, {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], I64)}, IMAGE),
        ("Pad", {"mode": "edge"}, {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], I64)}, IMAGE),
        ("Dropout", {}, {}, IMAGE),
        ("Identity", {}, {}, IMAGE),
        ("Cast", {"to": TensorProto.FLOAT}, {}, IMAGE),
    ],
)
def test_operator(
    kind: str, attributes: dict[str, object], weights: dict[str, np.ndarray], shape: tuple[int, ...]
) -> None:
    """Between two nonlinear steps, so that the order of the elements counts."""
    nodes = [
        node("Tanh", "x", "t"),
        node(kind, " ".join(["t", *weights]), "u", **attributes),
        node("Sigmoid", "u", "y"),
    ]
    agrees(packed(nodes, weights, shape), scale=2.0)


def test_constants_on_the_left() -> None:
    weights = {"w": f32(RNG, 4, 5), "c": f32(RNG, 2, 4, 6)}
    nodes = [
        node("MatMul", "w x", "u"),
        node("Sub", "c u", "v"),
        node("Tanh", "v", "t"),
        node("Mul", "c t", "y"),
    ]
    agrees(packed(nodes, weights, IMAGE))


def test_values_joined_and_split() -> None:
    weights = {"c": f32(RNG, 1, 1, 5, 6)}
    nodes = [
        node("Relu", "x", "a"),
        node("Tanh", "x", "b"),
        node("Concat", "a c b", "j", axis=1),
        node("Sum", "a b x", "s3"),
        node("Concat", "j s3 s3", "k", axis=1),
        node("Split", "k sizes", "p q", axis=1),
        node("ReduceSum", "q one", "r"),
        node("Sub", "p r", "d"),
        node("Relu", "d", "y"),
    ]
    weights |= {"sizes": np.array([3, 6], I64), "one": np.array([1], I64)}
    agrees(packed(nodes, weights, IMAGE))


def test_shapes_computed_in_the_graph() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s i0", "batch", axis=0),
        node("Unsqueeze", "batch zero", "b1"),
        node("Constant", "", "minus", value=numpy_helper.from_array(np.array([-1], I64))),
        node("Concat", "b1 minus", "to", axis=0),
        node("Reshape", "x to", "f"),
        node("MatMul", "f w", "y"),
    ]
    weights = {"i0": np.array(0, I64), "zero": np.array([0], I64), "w": f32(RNG, 60, 3)}
    agrees(packed(nodes, weights, IMAGE))


def test_broadcast_from_an_axis() -> None:
    """Opset 6 aligns the second operand at an axis; onnxruntime no longer runs it."""
    x = np.random.default_rng(1).normal(size=(3, 60))
    shift = f32(RNG, 4)
    results = []
    for opset, c, options in (
        (6, shift, {"broadcast": 1, "axis": 1}),
        (13, shift[:, None, None], {}),
    ):
        nodes = [node("Conv", "x k b", "c"), node("Add", "c s", "d", **options)]
        nodes.append(node("Relu", "d", "y"))
        results.append(read_network(packed(nodes, K | {"s": c}, IMAGE, opset=opset)).forward(x))
    assert np.array_equal(*results)
    assert results[0].any()


def test_attributes_that_became_inputs() -> None:
    nodes = [
        node("Slice", "x", "a", axes=[2], starts=[1], ends=[4]),
        node("Pad", "a", "b", pads=[0, 0, 0, 1, 0, 0, 1, 0], value=0.5),
        node("Squeeze", "b", "c", axes=[0]),
        node("Unsqueeze", "c", "d", axes=[1]),
        node("ReduceSum", "d", "e", axes=[2], keepdims=0),
        node("Tanh", "e", "y"),
    ]
    agrees(packed(nodes, {}, IMAGE, opset=9))


def test_open_batch_axis_and_zipped_file(tmp_path: Path) -> None:
    data = packed([node("MatMul", "x w", "y")], M, ("batch", 6))
    (tmp_path / "a.onnx.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.onnx").write_bytes(data)
    zipped, plain = (read_network(tmp_path / name) for name in ("a.onnx.gz", "a.onnx"))
    assert zipped.num_inputs == 6
    assert zipped.sha256 == plain.sha256 == sha256(data)


def test_weights_are_exact_and_bias_joins_its_matrix() -> None:
    """A MatMul and an Add are one step whose numbers are those of the file."""
    data, layers = mlp([3, 4, 2])
    network = read_network(data)
    assert [type(s).__name__ for s in network.steps] == ["Input", "Affine", "Elementwise", "Affine"]
    for step, (w, b) in zip((network.steps[1], network.steps[3]), layers, strict=True):
        assert isinstance(step, Affine)
        assert np.array_equal(step.terms[0].matrix, w.astype(np.float64))
        assert np.array_equal(step.bias, b.astype(np.float64))
        assert step.terms[0].relative == 0
        assert not step.bias_error.any()


def test_folded_batch_norm_knows_its_error() -> None:
    """The folded weights lie within the stated error of the exact ones (in 40 digits)."""
    from decimal import Decimal, localcontext

    weights = {n: np.abs(f32(RNG, 2)) for n in "gsmv"} | {"k": f32(RNG, 2, 2, 1, 1)}
    nodes = [
        node("Conv", "x k", "c"),
        node("BatchNormalization", "c g s m v", "y", epsilon=1e-3),
    ]
    step = read_network(packed(nodes, weights, (1, 2, 1, 1))).steps[-1]
    assert isinstance(step, Affine)
    term = step.terms[0]
    assert 0 < term.relative < 1e-14
    with localcontext(prec=40):
        epsilon = Decimal(float(np.float32(1e-3)))
        for i in range(2):
            g, s, m, v = (Decimal(float(weights[n][i])) for n in "gsmv")
            scale = g / (v + epsilon).sqrt()
            for j in range(2):
                exact = scale * Decimal(float(weights["k"][i, j, 0, 0]))
                found = Decimal(float(np.asarray(term.rows(np.array([i])))[0, j]))
                assert abs(exact - found) <= Decimal(term.relative) * abs(found)
            shift = s - m * scale
            assert abs(shift - Decimal(float(step.bias[i]))) <= Decimal(float(step.bias_error[i]))


def test_numbers_that_float64_does_not_hold_know_their_error() -> None:
    """1 / 3 of an average or a division, and the sum of two biases, in exact fractions."""
    pool = [node("AveragePool", "x", "y", kernel_shape=[3])]
    divided = [node("Div", "x three", "y")]
    for nodes, weights in ((pool, {}), (divided, {"three": np.float32(3)})):
        step = read_network(packed(nodes, weights, (1, 1, 3))).steps[-1]
        assert isinstance(step, Affine)
        entry = Fraction(float(step.terms[0].rows(np.array([0]))[0, 0]))
        error = abs(entry - Fraction(1, 3))
        assert 0 < error <= Fraction(step.terms[0].relative) * entry < Fraction(1, 10**15)
    # The matrix before a division is rounded twice: in 1 / 3 and in the product.
    w = f32(RNG, 3, 300)
    nodes = [node("MatMul", "x w", "h"), node("Div", "h three", "y")]
    step = read_network(packed(nodes, {"w": w, "three": np.float32(3)}, (1, 3))).steps[-1]
    assert isinstance(step, Affine)
    term = step.terms[0]
    worst = max(
        abs(1 - 3 * Fraction(float(found)) / Fraction(float(exact)))
        for found, exact in zip(term.rows(np.arange(300)).ravel(), w.T.ravel(), strict=True)
    )
    assert Fraction(1, 2**53) * 101 / 100 < worst <= Fraction(term.relative) < Fraction(1, 10**15)
    weights = {"w": np.ones((3, 1), np.float32), "b": np.float32([1]), "c": np.float32([1e-10])}
    nodes = [node("Gemm", "x w b", "h"), node("Add", "h c", "y")]
    step = read_network(packed(nodes, weights, (1, 3))).steps[-1]
    assert isinstance(step, Affine)
    error = abs(1 + Fraction(float(weights["c"][0])) - Fraction(float(step.bias[0])))
    assert 0 < error <= Fraction(float(step.bias_error[0])) < Fraction(1, 10**15)


def test_a_value_that_two_nodes_read_is_kept_once() -> None:
    """Its matrix is not copied into both, which would double at each residual block."""
    nodes = [
        node("MatMul", "x w", "h"),
        node("Relu", "h", "a"),
        node("Add", "h a", "y"),
    ]
    network = read_network(packed(nodes, {"w": f32(RNG, 6, 5)}, (1, 6)))
    last = network.steps[-1]
    assert isinstance(last, Affine)
    assert [term.source for term in last.terms] == [1, 2]


def test_operators_are_numbered_in_the_order_of_the_file() -> None:
    """Those that the output does not need are left out."""
    nodes = [
        node("Tanh", "x", "unused"),
        node("Relu", "x", "a"),
        node("Sigmoid", "x", "b"),
        node("Add", "b a", "y"),
    ]
    network = read_network(packed(nodes, {}, (1, 3)))
    kinds = [str(network.operator(k).function) for k in range(len(network.operators))]
    assert kinds == ["Relu", "Sigmoid"]


def test_transposed_argument_keeps_the_order_of_its_tensor() -> None:
    """Element i of an operator is element i of the tensor in the file, flat."""
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0]),
        node("Relu", "t", "r"),
        node("Transpose", "r", "y", perm=[1, 0]),
    ]
    network = read_network(packed(nodes, {}, (2, 3)))
    step = network.steps[network.operators[0]]
    assert isinstance(step, Elementwise)
    argument = network.steps[step.source]
    assert isinstance(argument, Affine)
    x = np.arange(6.0)[None]
    assert argument.terms[0].after(x).tolist() == [x.reshape(2, 3).T.ravel().tolist()]


REFUSED = [
    ("operator 'Softmax'", [node("Softmax", "x", "y")], {}),
    ("com.example.Relu", [helper.make_node("Relu", ["x"], ["y"], domain="com.example")], {}),
    ("both depend", [node("Mul", "x x", "y")], {}),
    ("depends on the input", [node("Div", "one x", "y")], {"one": np.float32(1)}),
    ("two constants, or two values", [node("MatMul", "x x", "y")], {}),
    ("divides by 0", [node("Div", "x z", "y")], {"z": np.zeros(6, np.float32)}),
    ("unknown attributes", [helper.make_node("Relu", ["x"], ["y"], alpha2=1.0)], {}),
    ("not finite", [node("Add", "x c", "y")], {"c": np.array([np.nan], np.float32)}),
    ("nothing defines", [node("Add", "x c", "y")], {}),
    ("defined twice", [node("Relu", "x", "x"), node("Relu", "x", "y")], {}),
    ("slope outside", [node("LeakyRelu", "x", "y", alpha=-0.5)], {}),
    ("does not fit", [node("MatMul", "x w", "y")], {"w": np.ones((5, 2), np.float32)}),
    ("rounds the network's value", [node("Cast", "x", "y", to=TensorProto.FLOAT16)], {}),
    ("does not depend on its input", [node("Identity", "c", "y")], {"c": np.float32(1)}),
    (
        "float64 rounds",
        [node("Add", "c d", "e"), node("Add", "x e", "y")],
        {"c": np.array([1.0], np.float32), "d": np.array([1e-30], np.float32)},
    ),
]


@pytest.mark.parametrize(("message", "nodes", "weights"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_by_name(message: str, nodes: list, weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(EngineError, match=message):
        read_network(packed(nodes, weights, (1, 6)))


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ([node("BatchNormalization", "x g g g g", "y", training_mode=1)], 14),
        ([node("BatchNormalization", "x g g g g", "y", spatial=0)], 8),
        ([node("BatchNormalization", "x g g g g", "y")], 6),
        ([node("Dropout", "x", "y")], 6),
    ],
)
def test_training_is_refused(nodes: list, opset: int) -> None:
    with pytest.raises(EngineError, match="training"):
        read_network(packed(nodes, {"g": np.ones(6, np.float32)}, (1, 6), opset=opset))


def test_size_rounded_up_is_refused() -> None:
    nodes = [node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)]
    with pytest.raises(EngineError, match="ceil_mode"):
        read_network(packed(nodes, {}, (1, 1, 5, 5)))


def test_bad_files(tmp_path: Path) -> None:
    for data in (b"no network", gzip.compress(b"x" * 100)[:-9]):
        with pytest.raises(SourceError):
            read_network(data)
    with pytest.raises(SourceError, match="cannot be read"):
        read_network(tmp_path / "none.onnx")
    with pytest.raises(EngineError, match="no fixed shape"):
        read_network(packed([node("Relu", "x", "y")], {}, (1, "n")))

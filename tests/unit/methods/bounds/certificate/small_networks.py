"""Small ONNX files for the tests of the certificate checker, made in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]


def packed(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, Array],
    shape: Sequence[int | str],
    *,
    opset: int = 13,
    output: str = "y",
    elem: int = TensorProto.FLOAT,
) -> bytes:
    """The bytes of a network with input "x" of this shape."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", elem, list(shape))],
        [helper.make_tensor_value_info(output, elem, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node; inputs and outputs are names with spaces between, '-' for one left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), **attributes)


def f32(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (rng.normal(size=shape) * scale).astype(np.float32)


def mlp(
    sizes: Sequence[int], seed: int = 0, function: str = "Relu", bias: float = 0.3
) -> tuple[bytes, list[tuple[Array, Array]]]:
    """Gemm and a function in turn, and its weights (out, in) with biases."""
    rng = np.random.default_rng(seed)
    layers = [
        (f32(rng, n, m, scale=m**-0.5 * 1.5), f32(rng, n, scale=bias)) for m, n in pairwise(sizes)
    ]
    nodes, weights, name = [], {}, "x"
    for i, (w, b) in enumerate(layers):
        weights |= {f"w{i}": w, f"b{i}": b}
        last = i == len(layers) - 1
        nodes.append(node("Gemm", f"{name} w{i} b{i}", "y" if last else f"h{i}", transB=1))
        if not last:
            nodes.append(node(function, f"h{i}", f"a{i}"))
            name = f"a{i}"
    return packed(nodes, weights, (1, sizes[0])), layers


def conv_residual(seed: int = 0, function: str = "Relu") -> bytes:
    """A convolution, a residual block with batch norm, pooling and a linear layer."""
    rng = np.random.default_rng(seed)
    weights = {
        "k0": f32(rng, 4, 2, 3, 3, scale=0.3),
        "c0": f32(rng, 4, scale=0.1),
        "k1": f32(rng, 4, 4, 3, 3, scale=0.2),
        "k2": f32(rng, 4, 2, 1, 1, scale=0.3),
        "g": f32(rng, 4) ** 2 + np.float32(0.5),
        "s": f32(rng, 4, scale=0.1),
        "m": f32(rng, 4, scale=0.1),
        "v": f32(rng, 4) ** 2 + np.float32(0.5),
        "w": f32(rng, 16, 3, scale=0.3),
        "b": f32(rng, 3, scale=0.1),
        "mean": f32(rng, 2, 1, 1, scale=0.1),
        "std": (f32(rng, 2, 1, 1) ** 2 + np.float32(0.5)).astype(np.float32),
    }
    nodes = [
        node("Sub", "x mean", "x0"),
        node("Div", "x0 std", "x1"),
        node("Conv", "x1 k0 c0", "h0", pads=[1, 1, 1, 1]),
        node(function, "h0", "a0"),
        node("Conv", "a0 k1", "h1", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "h1 g s m v", "n1"),
        node("Add", "n1 a0", "r"),
        node(function, "r", "a1"),
        node("Conv", "a1 k2", "h2", group=2),
        node("Add", "h2 a1", "r2"),
        node(function, "r2", "a2"),
        node("AveragePool", "a2", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", "p", "f"),
        node("MatMul", "f w", "z"),
        node("Add", "z b", "y"),
    ]
    return packed(nodes, weights, (1, 2, 4, 4))


def run(data: bytes, x: Array) -> Array:
    """onnxruntime on a batch of flat inputs, one by one -> flat outputs."""
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    dtype = np.float64 if "double" in given.type else np.float32
    return np.stack(
        [session.run(None, {given.name: row.reshape(shape).astype(dtype)})[0].ravel() for row in x]
    )

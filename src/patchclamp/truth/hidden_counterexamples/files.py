"""Instances as files that any verifier reads: ONNX networks and vnnlib properties.

A number of the box is written so that it reads back as the float32 that the instance holds, and
as no other float64: the planted point is in the box of the file by exact comparison. The
property asks for a point of the box where another class is at least level with the label.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from patchclamp.core.errors import EngineError, MissingExtraError
from patchclamp.truth.hidden_counterexamples.anatomy import Attention, Beside, Tokens
from patchclamp.truth.hidden_counterexamples.training import Instance

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 13, 7

SIMPLE = {nn.Flatten: "Flatten", nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}


def write_network(instance: Instance, path: Path) -> None:
    """The instance's network as ONNX, for one input at a time.

    Raises: MissingExtraError without onnx; EngineError for a part that is not one of anatomy.py.
    """
    try:
        import onnx
    except ImportError as e:
        raise MissingExtraError("writing ONNX needs onnx", hint="pip install onnx") from e
    writer = _Writer()
    last = writer.part(instance.module, "input")
    made = instance.module(instance.x)
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))
        for name, shape in (("input", instance.x.shape), (last, made.shape))
    ]
    graph = onnx.helper.make_graph(
        writer.nodes, path.stem, values[:1], values[1:], writer.constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_property(instance: Instance, path: Path) -> None:
    """The instance's box and what may not happen in it, as vnnlib 1.0."""
    lower, upper = instance.lower.flatten().tolist(), instance.upper.flatten().tolist()
    num_classes = instance.module(instance.x).shape[1]
    lines = [f"(declare-const X_{n} Real)" for n in range(len(lower))]
    lines += [f"(declare-const Y_{n} Real)" for n in range(num_classes)]
    for n, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (<= X_{n} {_decimal(high)}))", f"(assert (>= X_{n} {_decimal(low)}))"]
    ways = [f"(>= Y_{n} Y_{instance.label})" for n in range(num_classes) if n != instance.label]
    if len(ways) == 1:
        lines.append(f"(assert {ways[0]})")
    else:
        lines += ["(assert (or", *(f"    (and {way})" for way in ways), "))"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _decimal(value: float) -> str:
    """Without an exponent, which not every reader of vnnlib knows; exact."""
    text = f"{Decimal(value):f}"
    return text if "." in text else f"{text}.0"


@dataclass
class _Writer:
    """A graph in the making; every method takes and gives names of values."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def part(self, part: nn.Module, x: str) -> str:
        if isinstance(part, nn.Sequential):
            for inner in part:
                x = self.part(inner, x)
            return x
        if isinstance(part, nn.Linear):
            x = self.node("MatMul", x, self.constant(part.weight.T))
            return self.node("Add", x, self.constant(part.bias))
        if isinstance(part, nn.Conv2d):
            pads = [int(p) for p in (*part.padding, *part.padding)]
            held = [self.constant(p) for p in part.parameters()]  # weight, then bias
            return self.node(
                "Conv",
                x,
                *held,
                kernel_shape=list(part.kernel_size),
                strides=list(part.stride),
                pads=pads,
            )
        if isinstance(part, Tokens):
            return self.node("Transpose", x, perm=[0, 3, 2, 1])
        if isinstance(part, Attention):
            return self.attention(part, x)
        if isinstance(part, Beside):
            return self.node("Add", x, self.part(part.body, x))
        if type(part) not in SIMPLE:
            raise EngineError(f"no ONNX is written for {type(part).__name__}")
        return self.node(SIMPLE[type(part)], x)

    def attention(self, part: Attention, x: str) -> str:
        query, key, value = (self.part(p, x) for p in (part.query, part.key, part.value))
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.node("Mul", scores, self.constant(part.query.weight.new_tensor(part.scale)))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=3), value)
        return self.node("Add", x, mixed)

    def constant(self, value: Tensor) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        array = value.detach().contiguous().numpy()
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: int | list[int]) -> str:
        from onnx import helper

        name = f"v{len(self.nodes)}"
        made = helper.make_node(kind, list(inputs), [name], name)
        made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(made)
        return name

"""Verification instances of many kinds, as files: ONNX networks, vnnlib properties, instances.csv.

    python benchmarks/bound_families.py FOLDER

The networks are the `FAMILIES` of `bound_networks.py`. Every property asks for a point of a box
where a held-out image changes its class, or a controller the sign of its push. Sizes of box are
set by an attack: `FACTORS` times the smallest radius at which it succeeded, so each network has
easy boxes, hard ones and ones with a counterexample. One property per controller asks about two
boxes at once. expected.csv says `sat` where the attack's point holds in float64 and in
onnxruntime, and nothing elsewhere. The form is the competition's: old and newer opsets, dense
layers as Gemm or as MatMul and Add, a strict decimal that reads back as the same float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from bound_networks import FAMILIES, Normalise, Residual, held_out, made
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

FACTORS = (0.3, 0.6, 0.85, 1.15)
NUM_EXAMPLES = 2
TIMEOUT = 60
RESTARTS, STEPS, HALVINGS = 16, 40, 8
WIDEST = 0.5

# Opset, and whether dense layers are MatMul and Add.
FORMS = {"fc_2x256": (9, True), "conv": (11, False), "pooled": (8, False), "tanh_3x60": (9, True)}
NEWER = (13, False)
IR_VERSIONS = {8: 3, 9: 4, 11: 6, 13: 7}


@dataclass
class Writer:
    """An ONNX graph in the making; every method takes and gives names of values."""

    matmul: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: Tensor) -> str:
        """A stored tensor."""
        name = f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        """One operator with one result."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def module(self, part: nn.Module, x: str) -> str:
        """Whatever a module does.

        Raises: TypeError for a module of a kind that is not written here.
        """
        if isinstance(part, nn.Sequential):
            for p in part:
                x = self.module(p, x)
            return x
        if isinstance(part, Residual):
            body, skip = self.module(part.body, x), self.module(part.skip, x)
            return self.node("Relu", self.node("Add", body, skip))
        if isinstance(part, Normalise):
            x = self.node("Sub", x, self.constant(part.mean))
            return self.node("Div", x, self.constant(part.std))
        if isinstance(part, nn.Linear):
            if self.matmul:
                x = self.node("MatMul", x, self.constant(part.weight.T))
                return self.node("Add", x, self.constant(part.bias))
            held = self.constant(part.weight), self.constant(part.bias)
            return self.node("Gemm", x, *held, transB=1)
        if isinstance(part, nn.Conv2d):
            held = self.constant(part.weight), self.constant(part.bias)
            size, pads = part.kernel_size, [*part.padding, *part.padding]
            return self.node("Conv", x, *held, kernel_shape=size, strides=part.stride, pads=pads)
        if isinstance(part, nn.MaxPool2d):
            size = [part.kernel_size] * 2
            return self.node("MaxPool", x, kernel_shape=size, strides=size)
        if isinstance(part, nn.Identity):
            return x
        simple = {nn.Flatten: "Flatten", nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}
        if type(part) not in simple:
            raise TypeError(f"no ONNX is written for {type(part).__name__}")
        return self.node(simple[type(part)], x)


def write_onnx(module: nn.Module, example: Tensor, path: Path, form: tuple[int, bool]) -> None:
    """Write a network whose batch is one example; (opset, dense layers as MatMul and Add)."""
    opset, matmul = form
    writer = Writer(matmul)
    last = writer.module(module, "input")
    shapes = (("input", example.shape), (last, module(example).shape))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in shapes]
    graph = helper.make_graph(writer.nodes, path.stem, values[:1], values[1:], writer.held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = IR_VERSIONS[opset]
    if model.ir_version < 4:  # stored tensors have to be listed among the inputs
        model.graph.input.extend(
            helper.make_tensor_value_info(h.name, h.data_type, list(h.dims)) for h in writer.held
        )
    onnx.checker.check_model(model)
    onnx.save(model, path)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An example to be disturbed: what may not happen is that a margin is >= 0.

    Attributes:
        label: the right class, or for a controller (one output) the sign of its push, -1 or 1.
        low, high: what inputs can be at all.
    """

    module: nn.Sequential
    example: Tensor
    label: int
    low: float
    high: float

    def margins(self, output: Tensor) -> Tensor:
        """(rows, ways to fail)."""
        if output.shape[1] == 1:
            return -self.label * output
        others = [n for n in range(output.shape[1]) if n != self.label]
        return output[:, others] - output[:, [self.label]]

    def failures(self) -> list[str]:
        """The same in vnnlib, a formula for each way to fail."""
        num_outputs = self.module(self.example).shape[1]
        if num_outputs == 1:
            return ["(<= Y_0 0.0)" if self.label > 0 else "(>= Y_0 0.0)"]
        return [f"(>= Y_{n} Y_{self.label})" for n in range(num_outputs) if n != self.label]

    def box(self, eps: float) -> tuple[Tensor, Tensor]:
        """The box of a radius, clipped to what inputs can be; each (1, *input)."""
        return tuple(  # type: ignore[return-value]  # of two
            (self.example + sign * eps).clamp(self.low, self.high) for sign in (-1, 1)
        )

    def attacked(self, eps: float) -> Tensor | None:
        """A point of the box that fails, (1, *input), or None if none was found."""
        low, high = self.box(eps)
        random = torch.Generator().manual_seed(0)
        x = low + (high - low) * torch.rand(RESTARTS, *low.shape[1:], generator=random)
        for _ in range(STEPS):
            with torch.enable_grad():
                x.requires_grad_()
                worst = self.margins(self.module(x)).amax(1)
                (slope,) = torch.autograd.grad(worst.sum(), x)
            x = (x + eps / 8 * slope.sign()).detach()
            x = torch.minimum(torch.maximum(x, low), high)
        worst = self.margins(self.module(x)).amax(1)
        best = int(worst.argmax())
        return x[best : best + 1] if worst[best] > 0 else None

    def radius(self) -> float:
        """The smallest radius at which the attack succeeded, by halving; three digits."""
        low, high = 0.0, WIDEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.attacked(middle) is not None else (middle, high)
        return high


def cases(family: str) -> list[Case]:
    """The first held-out examples that a family's network gets right."""
    module = made(family)
    inputs, targets = held_out(family)
    outputs = module(inputs)
    if targets.is_floating_point():
        right = (outputs * targets > 0.3)[:, 0] & (targets[:, 0] > 0)
        labels, low, high = targets.sign()[:, 0].long(), -1.0, 1.0
    else:
        right, labels, low, high = outputs.argmax(1) == targets, targets, 0.0, 1.0
    rows = right.nonzero()[:NUM_EXAMPLES, 0].tolist()
    return [
        Case(module=module, example=inputs[[n]], label=int(labels[n]), low=low, high=high)
        for n in rows
    ]


def _within(box: tuple[Tensor, Tensor]) -> Iterator[str]:
    for n, (low, high) in enumerate(zip(*(b.flatten().tolist() for b in box), strict=True)):
        yield f"(<= X_{n} {high:.9g})"
        yield f"(>= X_{n} {low:.9g})"


def write_property(parts: list[tuple[Case, float]], path: Path, title: str) -> None:
    """Ask for a failure in the box of a case, or in any of the boxes of several of one label."""
    case = parts[0][0]
    num_outputs = case.module(case.example).shape[1]
    lines = [f"; {title}"]
    lines += [f"(declare-const X_{n} Real)" for n in range(case.example.numel())]
    lines += [f"(declare-const Y_{n} Real)" for n in range(num_outputs)]
    if len(parts) == 1:
        lines += [f"(assert {bound})" for bound in _within(case.box(parts[0][1]))]
    else:
        boxes = [f"    (and {' '.join(_within(c.box(eps)))})" for c, eps in parts]
        lines += ["(assert (or", *boxes, "))"]
    ways = case.failures()
    if len(ways) == 1:
        lines.append(f"(assert {ways[0]})")
    else:
        lines += ["(assert (or", *(f"    (and {way})" for way in ways), "))"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def holds(case: Case, point: Tensor, session: onnxruntime.InferenceSession) -> bool:
    """Whether a point fails in float64 and in onnxruntime."""
    exact = copy.deepcopy(case.module).double()(point.double())
    name = session.get_inputs()[0].name
    there = torch.from_numpy(np.asarray(session.run(None, {name: point.numpy()})[0]))
    return bool((case.margins(exact) > 0).any() and (case.margins(there) > 0).any())


def write_families(folder: Path, names: tuple[str, ...] = tuple(FAMILIES)) -> None:
    """Write onnx/, vnnlib/, instances.csv and expected.csv into a folder."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "vnnlib").mkdir(exist_ok=True)
    instances, expected = [], ["network,property,expected"]

    def add(network: str, parts: list[tuple[Case, float]], title: str, known: bool) -> None:
        prop = f"{title}.vnnlib"
        write_property(parts, folder / "vnnlib" / prop, title)
        instances.append(f"onnx/{network},vnnlib/{prop},{TIMEOUT}")
        expected.append(f"{network},{prop},{'sat' if known else ''}")

    for family in names:
        network = f"{family}.onnx"
        made_cases = cases(family)
        path = folder / "onnx" / network
        write_onnx(made_cases[0].module, made_cases[0].example, path, FORMS.get(family, NEWER))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        radii = [case.radius() for case in made_cases]
        for n, (case, radius) in enumerate(zip(made_cases, radii, strict=True)):
            for factor in FACTORS:
                eps = float(f"{factor * radius:.3g}")
                point = case.attacked(eps)
                known = point is not None and holds(case, point, session)
                add(network, [(case, eps)], f"{family}_{n}_{eps:g}", known)
        if all(case.module(case.example).shape[1] == 1 for case in made_cases):
            parts = [
                (c, float(f"{FACTORS[1] * r:.3g}")) for c, r in zip(made_cases, radii, strict=True)
            ]
            add(network, parts, f"{family}_both", False)
    (folder / "instances.csv").write_text("\n".join(instances) + "\n", encoding="utf-8")
    (folder / "expected.csv").write_text("\n".join(expected) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    write_families(parser.parse_args().folder)


if __name__ == "__main__":
    main()

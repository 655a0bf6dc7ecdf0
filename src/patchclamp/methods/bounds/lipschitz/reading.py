"""Reading a chain out of a network: an `nn.Sequential`, or any opened network that is one.

A captured graph is read from its output backwards. Linear layers, convolutions (unrolled
to a matrix, exactly), reshapes that keep each example's elements in order, elementwise
activations and sums of two branches have a form in a chain; every other operator is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from patchclamp.core.errors import EngineError, InputError
from patchclamp.engine.ir import Kind, Node
from patchclamp.methods.bounds.lipschitz import activations
from patchclamp.methods.bounds.lipschitz.layers import Activation, Chain, Layer, Linear, Residual
from patchclamp.net import Net

Known = Mapping[type[nn.Module], Activation]
_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"})
_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {"conv1d": torch.conv1d, "conv2d": torch.conv2d}
_OPERATORS: dict[str, Callable[[], Activation]] = {
    "relu": activations.relu,
    "tanh": activations.tanh,
    "sigmoid": activations.sigmoid,
    "gelu": activations.gelu,
    "silu": activations.silu,
}
_MODULES: dict[type[nn.Module], Callable[[], Activation]] = {
    nn.ReLU: activations.relu,
    nn.Tanh: activations.tanh,
    nn.Sigmoid: activations.sigmoid,
    nn.SiLU: activations.silu,
}


def read_chain(
    source: Net | nn.Module, *, known: Known | None = None, max_unrolled: int = 4_000_000
) -> Chain:
    """The network as a chain of float64 layers.

    Args:
        source: an opened network with one input and one output, or an `nn.Sequential` of
            linear layers and activations.
        known: activations of modules of one's own, by their class; such a module maps
            (batch, unit) to (batch, unit) and holds nothing else.
        max_unrolled: the most elements that a convolution's matrix may have.

    Raises:
        EngineError: an operator or module that has no form in a chain, named.
        InputError: NaN weights, sizes that do not fit.
        CaptureError: an opened network that cannot be captured.
    """
    known = known or {}
    if isinstance(source, Net):
        return _Reader(net=source, known=known, max_unrolled=max_unrolled).chain()
    layers = _modules(source, known)
    first = next((x for x in layers if isinstance(x, Linear)), None)
    if first is None:
        raise EngineError(f"{type(source).__name__} has no linear layer to read its width from")
    return Chain(tuple(layers), first.weight.shape[1])


def _modules(module: nn.Module, known: Known) -> list[Layer]:
    """The layers of a module that is itself a layer, or an `nn.Sequential`."""
    activation = known.get(type(module))
    if activation is not None:
        return [activation]
    match module:
        case nn.Sequential():
            return [layer for child in module for layer in _modules(child, known)]
        case nn.Linear():
            return [Linear(module.weight, module.bias)]
        case nn.LeakyReLU():
            return [activations.leaky_relu(module.negative_slope)]
        case nn.GELU(approximate="none"):
            return [activations.gelu()]
        case nn.Identity() | nn.Flatten(start_dim=1, end_dim=-1):
            return []
        case nn.Dropout(training=False):
            return []
    made = _MODULES.get(type(module))
    if made is None:
        raise EngineError(
            f"module {type(module).__name__} has no form in a chain",
            expected="an nn.Sequential of Linear layers and activations",
            hint="read_chain(patchclamp.open(module, example_inputs)) reads the captured graph; "
            "known={Class: activation} names an activation of your own",
        )
    return [made()]


@dataclass(kw_only=True)
class _Reader:
    """Reads a captured graph from its output backwards."""

    net: Net
    known: Known
    max_unrolled: int
    _paths: dict[Node, tuple[Layer, ...]] = field(default_factory=dict)

    def chain(self) -> Chain:
        """The whole graph."""
        graph = self.net.graph.capture.graph
        inputs = [n for n in graph.nodes if n.kind is Kind.INPUT]
        outputs = [n for n in graph.outputs if isinstance(n, Node)]
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(
                f"{self.net.name} has {len(inputs)} inputs and {len(outputs)} outputs",
                expected="one of each",
            )
        for node in graph.nodes:  # in order of computation: no deep recursion
            if node.kind not in (Kind.CONST, Kind.INPUT):
                self._paths_of(node)
        return Chain(self._path(outputs[0]), _size(inputs[0]))

    def _paths_of(self, node: Node) -> None:
        sources = [n for n in node.inputs() if n.kind is Kind.INPUT or n in self._paths]
        if sources:  # what depends on no input is a constant, and is looked at where it is used
            self._paths[node] = self._step(node, sources)

    def _path(self, node: Node) -> tuple[Layer, ...]:
        return () if node.kind is Kind.INPUT else self._paths[node]

    def _step(self, node: Node, sources: list[Node]) -> tuple[Layer, ...]:
        before = self._path(sources[0])
        if node.kind is Kind.TAG:
            activation = self._known(node)
            if activation is None:
                return before
            entry = next(
                n
                for n in self._paths
                if (n.module, n.call, n.operation) == (node.module, node.call, "input")
            )
            return (*self._paths[entry], activation)
        if self._inside_known(node):
            return before
        operation = node.operation
        if operation in _RESHAPES and (node.shape or ())[:1] == (sources[0].shape or ())[:1]:
            return before
        if operation == "linear" and len(sources) == 1 and len(_shape(node)) == 2:
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            return (*before, Linear(self._constant(node, weight), self._bias(node, bias)))
        if operation in _CONVOLUTIONS and len(sources) == 1:
            return (*before, self._convolution(node, sources[0]))
        if operation in _OPERATORS and not node.kwargs:
            return (*before, _OPERATORS[operation]())
        if operation == "leaky_relu":
            slope = node.args[1] if len(node.args) > 1 else 0.01
            return (*before, activations.leaky_relu(float(slope)))  # type: ignore[arg-type]  # an aten scalar
        if operation == "matmul" and node.args[0] is sources[0] and len(_shape(node)) == 2:
            return (*before, Linear(self._constant(node, node.args[1]).T))
        if operation in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
            left, right = node.args
            if operation == "add" and len(sources) == 2 and _shape(sources[0]) == _shape(node):
                return _sum(before, self._path(sources[1]))
            if len(sources) == 1 and left is sources[0] and isinstance(right, Node):
                offset = self._constant(node, right)
                return self._shifted(before, node, offset if operation == "add" else -offset)
        raise EngineError(
            f"operator '{operation}' at '{node.address}' has no form in a chain",
            expected="linear, matmul, conv1d, conv2d, reshapes, elementwise activations, sums",
            hint="known={Class: activation} names an activation of your own",
        )

    def _known(self, node: Node) -> Activation | None:
        if node.operation != "output" or not node.module:
            return None
        return self.known.get(type(self.net.module.get_submodule(node.module)))

    def _inside_known(self, node: Node) -> bool:
        parts = node.module.split(".")
        paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(
            type(self.net.module.get_submodule(path)) in self.known for path in paths if path
        )

    def _constant(self, node: Node, weight: object) -> Tensor:
        if not (isinstance(weight, Node) and weight.kind is Kind.CONST):
            raise EngineError(
                f"a weight of '{node.operation}' at {node.address} is computed, not stored"
            )
        return self.net.graph.constant(weight).detach().to("cpu", torch.float64)

    def _bias(self, node: Node, bias: object) -> Tensor | None:
        return None if bias is None else self._constant(node, bias)

    def _shifted(self, before: tuple[Layer, ...], node: Node, offset: Tensor) -> tuple[Layer, ...]:
        """Add a stored tensor, within a linear layer before it that has no bias yet."""
        bias = torch.broadcast_to(offset, (1, *_shape(node)[1:])).flatten()
        if before and isinstance(before[-1], Linear) and before[-1].bias is None:
            return (*before[:-1], Linear(before[-1].weight, bias))
        return (*before, Linear(torch.eye(len(bias), dtype=torch.float64), bias))

    def _convolution(self, node: Node, source: Node) -> Linear:
        """The matrix of a convolution: its values on one-hot inputs, which are exact."""
        num_inputs, num_outputs = _size(source), _size(node)
        if num_inputs * num_outputs > self.max_unrolled:
            raise EngineError(
                f"the convolution at {node.address} unrolls to {num_outputs} x {num_inputs}",
                expected=f"at most {self.max_unrolled} elements",
                hint="pass a larger max_unrolled",
            )
        weight = self._constant(node, node.args[1])
        bias = self._bias(node, node.args[2] if len(node.args) > 2 else None)
        one_hot = torch.eye(num_inputs, dtype=torch.float64).unflatten(1, _shape(source)[1:])
        made = _CONVOLUTIONS[node.operation](one_hot, weight, None, *node.args[3:], **node.kwargs)
        positions = num_outputs // weight.shape[0]
        spread = None if bias is None else bias.repeat_interleave(positions)
        return Linear(made.flatten(1).T, spread)


def _sum(a: tuple[Layer, ...], b: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Two branches that begin alike, as one residual layer."""
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] is b[shared]:
        shared += 1
    left, right = a[shared:], b[shared:]
    body, skip = (right, left) if len(left) <= len(right) else (left, right)
    return (*a[:shared], Residual(body, skip))


def _shape(node: Node) -> tuple[int, ...]:
    """Sizes; only the first may be open, and is returned as 0 then."""
    sizes = node.shape or ()
    if any(isinstance(n, str) for n in sizes[1:]):
        raise EngineError(f"the value at {node.address} has open sizes {sizes}")
    return tuple(0 if isinstance(n, str) else n for n in sizes)


def _size(node: Node) -> int:
    shape = _shape(node)
    if len(shape) < 2:
        raise InputError(f"a value of shape {shape}", expected="a batch axis and others")
    return prod(shape[1:])

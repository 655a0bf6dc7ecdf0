"""Linear and convolutional layers found in a captured graph: unit writes to unit.

Every linear map or convolution with constant weights adds up its input units, each
through its own weights, so that one edge, from one input unit to one output unit,
is one column of one row of the weight (a kernel, in a convolution). `masked_layers`
rewrites the graph so that edges can be cut: the layer then sees a reference value of
the input unit through exactly those weights.

This is the view for networks without a residual stream: perceptrons, convolutional
networks, message passing (its linear maps) and recurrent cells (each step is a call).

Shape suffixes: B batch, I input units, J output units; `...` any other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor

from patchclamp.core.errors import EngineError
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.streams import projection

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_APPLY: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A linear map or convolution.

    Attributes:
        node: the operator.
        data: what it is applied to.
        weight: its weight.
        site: the module that it is the layer of, with the call where there are several.
        num_in, num_out: units.
        spatial: axes that a convolution runs over (0 for a linear map).
        stride, padding, dilation: of a convolution.
        transposed: a linear weight is (out, in).
    """

    node: Node
    data: Node
    weight: Node
    site: str
    num_in: int
    num_out: int
    spatial: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = True

    @property
    def unit_axis(self) -> int:
        """Axis of the units, in data and output alike."""
        return 1 if self.spatial else -1

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as (J, I, ...)."""
        return weight if self.transposed else weight.T

    def apply_each(self, data: Tensor, weight_BJI: Tensor) -> Tensor:
        """The layer without bias, with a weight of its own for every example.

        Shapes: data as the layer takes it; weight (B, J, I, ...); returns the layer's output.
        """
        if not self.spatial:
            y_BNJ = _rows_inside(data) @ weight_BJI.transpose(1, 2)
            flat: Tensor = y_BNJ.reshape(*data.shape[:-1], self.num_out)
            return flat
        made: Tensor = _APPLY[self.spatial](
            data.flatten(0, 1)[None],
            weight_BJI.flatten(0, 1),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=data.shape[0],
        )
        y: Tensor = made[0].unflatten(0, (data.shape[0], self.num_out))
        return y

    def edge_products(self, difference: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
        """Per edge, the change of the input through its weight, times the slope of the output.

        Shapes: difference as the data, slope as the output; returns (B, J, I).
        """
        w_JI = self.oriented(weight)
        if not self.spatial:
            d_BNI, g_BNJ = _rows_inside(difference), _rows_inside(slope)
            return (g_BNJ.transpose(1, 2) @ d_BNI) * w_JI
        # the derivative of sum(slope * layer(difference, w)) by each example's own w
        own = w_JI.expand(difference.shape[0], *w_JI.shape).clone().requires_grad_(True)
        with torch.enable_grad():
            total = (self.apply_each(difference.detach(), own) * slope.detach()).sum()
            (by_weight,) = torch.autograd.grad(total, own)
        product: Tensor = (by_weight * w_JI).flatten(3).sum(3)
        return product


def _rows_inside(x: Tensor) -> Tensor:
    """(B, ..., I) as (B, N, I)."""
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None]


def find_layers(graph: Graph) -> tuple[Layer, ...]:
    """Every linear map and convolution with constant weights, in the order of the forward pass.

    Raises:
        EngineError: there is none, or a convolution is grouped or padded in a way that is not
            followed here.
    """
    called: dict[str, int] = {}
    for node in graph.nodes:
        if _is_layer(node):
            called[node.module] = called.get(node.module, 0) + 1
    seen: dict[str, int] = {}
    layers = []
    for node in graph.nodes:
        if not _is_layer(node):
            continue
        number = seen[node.module] = seen.get(node.module, -1) + 1
        name = node.module or node.address
        site = f"{name}@{number}" if called[node.module] > 1 else name
        layers.append(_convolution(node, site) if _is_convolution(node) else _linear(node, site))
    if not layers:
        raise EngineError("the network has no linear or convolutional layer")
    return tuple(layers)


def _is_convolution(node: Node) -> bool:
    return node.kind is Kind.OP and node.operation in _CONVOLUTIONS


def _is_layer(node: Node) -> bool:
    return _is_convolution(node) or projection(node) is not None


def _linear(node: Node, site: str) -> Layer:
    made = projection(node)
    if made is None or made.weight.shape is None:
        raise EngineError(f"'{site}' is no linear map")
    first, second = (int(s) for s in made.weight.shape)
    num_out, num_in = (first, second) if made.transposed else (second, first)
    return Layer(
        node=node,
        data=made.data,
        weight=made.weight,
        site=site,
        num_in=num_in,
        num_out=num_out,
        transposed=made.transposed,
    )


def _convolution(node: Node, site: str) -> Layer:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    spatial = _CONVOLUTIONS[node.operation]
    data, weight = given["input"], given["weight"]
    if not isinstance(data, Node) or not isinstance(weight, Node) or weight.kind is not Kind.CONST:
        raise EngineError(f"the weight of the convolution '{site}' is not constant")
    if given.get("groups", 1) != 1:
        raise EngineError(
            f"the convolution '{site}' is grouped",
            got=f"groups={given['groups']}",
            expected="groups=1",
            hint="name the sites to work on without it",
        )
    if isinstance(given.get("padding"), str):
        raise EngineError(f"the padding of the convolution '{site}' is given as a word")

    def sizes(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        listed = listed * spatial if len(listed) == 1 else listed
        return tuple(v for v in listed if isinstance(v, int))

    num_out, num_in = (int(s) for s in (weight.shape or ())[:2])
    return Layer(
        node=node,
        data=data,
        weight=weight,
        site=site,
        num_in=num_in,
        num_out=num_out,
        spatial=spatial,
        stride=sizes("stride", 1),
        padding=sizes("padding", 0),
        dilation=sizes("dilation", 1),
    )


@dataclass(frozen=True, kw_only=True)
class MaskedLayers:
    """A graph whose layers take references and masks.

    Attributes:
        graph: the rewritten graph. Its extra inputs are, for every layer, a reference (it
            broadcasts to the layer's data) and a mask (B or 1, J, I): 1 where the output unit
            sees the reference of the input unit.
        data, outputs: what every layer is applied to, and what it gives.
    """

    graph: Graph
    data: tuple[Node, ...]
    outputs: tuple[Node, ...]


def masked_layers(graph: Graph, layers: Sequence[Layer], num_inputs: int) -> MaskedLayers:
    """Rewrite the graph so that every edge of these layers can be cut."""
    place = {layer.node: i for i, layer in enumerate(layers)}
    swap: dict[Node, Node] = {}
    nodes: list[Node] = []

    def add(node: Node) -> Node:
        nodes.append(node)
        return node

    for old in graph.nodes:
        made = Node(**vars(old))
        made.replace_inputs(lambda x: swap[x])
        swap[old] = add(made)
        if old in place:
            i = place[old]
            reference, mask = (
                add(Node(Kind.INPUT, operation="input", number=num_inputs + 2 * i + k))
                for k in (0, 1)
            )
            args = (made, swap[layers[i].data], swap[layers[i].weight], reference, mask)
            target = partial(_mixed, layers[i])
            swap[old] = add(Node(Kind.OP, target=target, args=args, dtype=old.dtype))
    outputs = [swap[x] if isinstance(x, Node) else x for x in graph.outputs]
    return MaskedLayers(
        graph=Graph(nodes, outputs, graph.out_spec),
        data=tuple(swap[layer.data] for layer in layers),
        outputs=tuple(swap[layer.node] for layer in layers),
    )


def _mixed(
    layer: Layer, output: Tensor, data: Tensor, weight: Tensor, reference: Tensor, mask: Tensor
) -> Tensor:
    """The layer's output with the masked edges carrying the reference."""
    if not mask.requires_grad and not bool(mask.any()):
        return output
    w_JI = layer.oriented(weight)
    cut = mask.expand(data.shape[0], -1, -1)
    cut = cut.reshape(*cut.shape, *([1] * layer.spatial))
    return output + layer.apply_each(reference - data, w_JI * cut)

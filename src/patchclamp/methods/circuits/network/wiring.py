"""The wiring of a network: its writers, its readers, and what can be done with an edge.

Methods that find and check circuits work on a `Wiring` and do not know what kind of
network is behind it. There are two kinds: `StreamWiring` (a residual stream) and
`LayerWiring` (stacks of linear and convolutional layers).

Values inside a wiring are kept per *source*: a head block, an MLP, an embedding, the
input of a layer. A source holds one or several writers.

Shape suffixes: B batch, R readers, W writers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.core.circuit import Circuit, Edge, Node, Provenance, Reader
from patchclamp.core.errors import EngineError, OptionError, nearest
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.layers import find_layers
from patchclamp.engine.streams import find_streams
from patchclamp.engine.targets import Metric
from patchclamp.model.inputs import Call
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run.

    Attributes:
        values: of every source.
        output: the principal output, (B, ...).
    """

    values: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """Gradients of a metric in one run.

    Attributes:
        metric: (B,).
        at: the sources' values in this run.
        reads: the gradient at the input of every group of readers.
        values: the gradient at every source's value: the total effect of each writer.
    """

    metric: Tensor
    at: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeVariants:
    """Edges whose cutting is one edit each of one value of the plain network.

    Attributes:
        address: of that value.
        edges: (reader, writer) of each.
        first_row: the first position at which any of them changes anything.
        make: from the value in the base run, (B, ...), and some of the edges, to the value with
            each of those edges cut: (K * B, ...), edge by edge.
    """

    address: str
    edges: tuple[tuple[int, int], ...]
    first_row: int
    make: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring(ABC):
    """See the module docstring.

    Attributes:
        net: the network.
        engine: its captured graph.
        writers, readers: in the order of the forward pass.
        possible: edges that exist.
        feeds: which writers a reader's node is; a reader of the output feeds none.
        roots: sources that no reader feeds (embeddings, the input).
        notes: what a reader of a circuit of this network should know.
    """

    net: Net
    engine: GraphEngine
    writers: tuple[Node, ...]
    readers: tuple[Reader, ...]
    possible: Bool[np.ndarray, "R W"]
    feeds: Bool[np.ndarray, "R W"]
    roots: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def edge(self, reader: int, writer: int) -> Edge:
        """The edge at these indices."""
        read = self.readers[reader]
        return Edge(self.writers[writer], read.node, read.slot)

    @abstractmethod
    def record(self, call: Call) -> Recording:
        """Values of all sources, and the output."""

    @abstractmethod
    def slopes(
        self,
        call: Call,
        metric: Metric,
        rows: Tensor,
        held: Mapping[int, Tensor] | None = None,
    ) -> Slopes:
        """Gradients of the metric at the inputs of all readers, in one forward and one backward.

        Args:
            held: sources that are held at a value in this run.
        """

    @abstractmethod
    def products(self, differences: Sequence[Tensor], slopes: Slopes) -> Float[Tensor, "B R W"]:
        """First-order effect of every edge, where the sources' values change by `differences`."""

    @abstractmethod
    def node_products(self, differences: Sequence[Tensor], slopes: Slopes) -> Float[Tensor, "B W"]:
        """First-order effect of every writer on everything that reads it."""

    @abstractmethod
    def variants(
        self, call: Call, differences: Sequence[Tensor], edges: Sequence[tuple[int, int]]
    ) -> Iterator[EdgeVariants]:
        """Edges, (reader, writer) each, as edits of the plain network, those of one value together.

        Args:
            call: the base run.
            differences: how the sources' values change, from the base to the reference.
        """

    @abstractmethod
    def place_axis(self, source: int) -> int:
        """The axis of a root's value along which its places lie: positions, or units."""

    @abstractmethod
    def position_means(self, source: int, value: Tensor) -> Tensor:
        """A source's value with positions (rows and columns) averaged, as axes of size 1."""

    @abstractmethod
    def run(self, call: Call, references: Sequence[Tensor], cut: Float[Tensor, "B R W"]) -> Tensor:
        """The principal output where readers see references in place of the writers in `cut`.

        Args:
            references: a value for every source, (B, ...) or broadcasting to it.
            cut: 1 where the reference is seen; its batch may be 1.
        """

    @abstractmethod
    def record_cut(
        self, call: Call, references: Sequence[Tensor], cut: Float[Tensor, "B R W"]
    ) -> Recording:
        """As `run`, with what every source writes then."""


def wire(net: Net, kind: str = "auto", example: object = None) -> Wiring:
    """The wiring of a network.

    Args:
        kind: "stream", "layers", or "auto": the residual stream where there is one with an
            attention, else the layers.
        example: inputs of the form that will be used; the example inputs where None.

    Raises:
        EngineError: the network has neither, or it cannot be captured.
    """
    from patchclamp.methods.circuits.network.layer_wiring import LayerWiring
    from patchclamp.methods.circuits.network.stream_wiring import StreamWiring

    if kind not in ("auto", "stream", "layers"):
        raise OptionError(
            f"no wiring '{kind}'",
            expected="auto, stream or layers",
            nearest=nearest(kind, ["auto", "stream", "layers"]),
        )
    engine = net.graph if example is None else net.graph_for(net.call(example))
    if kind == "stream" or (kind == "auto" and engine.attention):
        streams = find_streams(engine.capture.graph, engine.attention, net.sites)
        return StreamWiring.of(net, engine, streams)
    return LayerWiring.of(net, engine, find_layers(engine.capture.graph))


def index_of(wiring: Wiring, edge: Edge) -> tuple[int, int]:
    """(reader, writer) of an edge.

    Raises:
        EngineError: the network has no such edge.
    """
    read = Reader(edge.reader, edge.slot)
    if read not in wiring.readers or edge.writer not in wiring.writers:
        wrong, known = (
            (str(read), [str(r) for r in wiring.readers])
            if read not in wiring.readers
            else (str(edge.writer), [str(w) for w in wiring.writers])
        )
        raise EngineError(f"no '{wrong}' in {wiring.net.name}", nearest=nearest(wrong, known))
    found = wiring.readers.index(read), wiring.writers.index(edge.writer)
    if not wiring.possible[found]:
        raise EngineError(f"{wiring.net.name} has no edge {edge}: its writer comes later")
    return found


def scored(wiring: Wiring, scores: np.ndarray, record: Provenance) -> Circuit:
    """Scores as a circuit that keeps nothing yet."""
    scores = np.where(wiring.possible, scores, 0.0)
    return Circuit(
        writers=wiring.writers,
        readers=wiring.readers,
        possible=wiring.possible,
        kept=np.zeros_like(wiring.possible),
        scores=scores,
        record=record,
    )

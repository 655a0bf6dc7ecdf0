"""Path patching: the effect of a sender along one given way through the network only.

A *path* is a chain of edges, each of which leads to the node that the next one leaves.
It is followed by nested runs of the base input. The first run cuts the first edge, which
then carries the sender's reference. Each later run cuts the next edge and nothing else,
and what that edge carries is what its writer wrote in the run before. So every run is
the base run but for one edge, and no other way takes part. The effect is what the last
run does to the metric: from the last edge on everything follows, so a path that should
end with the output ends with an edge into it.

A step of a path may also be several edges, cut together: from one sender to a set of
receivers, with everything else held, or through all of them on to the next step.

Sources: Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching";
Wang et al. 2022, "Interpretability in the wild" (sender to receivers).

Shape suffixes: K paths, N examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.circuit import Edge, Node, Reader
from patchclamp.core.errors import EngineError, OptionError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import measured
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import Batch, Contrast
from patchclamp.methods.circuits.network.wiring import Recording, Wiring, index_of

Step: TypeAlias = "Edge | Sequence[Edge]"
"""One edge, or several that are cut together."""

_Cut: TypeAlias = "tuple[tuple[int, int], ...]"
"""A step as (reader, writer) of its edges."""


@dataclass(frozen=True, kw_only=True)
class PathEffects:
    """Measured effects of paths.

    Attributes:
        paths: in the order that was asked for, each with the edges of its steps.
        noising: change of the metric when the path carries the corrupt value in the clean run.
        denoising: change when it carries the clean value in the corrupt run.
            Both (path, example); 0 in a direction that was not measured.
        metric_clean, metric_corrupt: (example,).
        num_runs: passes through the network in which a step was cut.
    """

    paths: tuple[tuple[tuple[Edge, ...], ...], ...]
    noising: Float[Tensor, "K N"]
    denoising: Float[Tensor, "K N"]
    metric_clean: Float[Tensor, "N"]
    metric_corrupt: Float[Tensor, "N"]
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class PathPatching:
    """The measured effect along each of some paths; see the module.

    Shapes: contrasts hold (example, ...); effects (path, example).
    Units: those of the metric.
    Randomness: that of the references.
    Cost: one whole pass for every step, batch and direction; steps that several paths begin with
        are run once.
    Raises: EngineError for an edge that the network lacks, or a path that is broken; OptionError
        for a path without edges.
    Fails when: several paths only matter together; their effects do not add up then.
    Source: see the module.

    Attributes:
        direction: see `PathEffects`.
    """

    direction: Direction = Direction.BOTH
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError("batch_size must be at least 1", got=str(self.batch_size))

    def run(
        self,
        wiring: Wiring,
        contrasts: Contrast | Sequence[Contrast],
        paths: Sequence[Sequence[Step]],
        references: References | None = None,
        *,
        progress: Progress = SILENT,
    ) -> PathEffects:
        """Measure these paths."""
        contrasts = [contrasts] if isinstance(contrasts, Contrast) else list(contrasts)
        references = references or References(kind=Ablation.RESAMPLE)
        listed = [_steps(path) for path in paths]
        cuts = [_checked(wiring, steps) for steps in listed]
        found: dict[Direction, list[Tensor]] = {Direction.NOISING: [], Direction.DENOISING: []}
        metrics: dict[Direction, list[Tensor]] = {d: [] for d in found}
        num_runs, num = 0, sum(c.num_rows for c in contrasts) * len(cuts)
        progress.start("path patching", num * (2 if self.direction is Direction.BOTH else 1))
        for contrast in contrasts:
            for batch in contrast.batches(self.batch_size):
                for direction in found:
                    turned = batch if direction is Direction.NOISING else batch.turned()
                    tree = _Tree(wiring, turned, references)
                    base = _metric(turned, tree.base)
                    effects = base.new_zeros(len(cuts), batch.num_rows)
                    if self.direction in (direction, Direction.BOTH):
                        for k in sorted(range(len(cuts)), key=cuts.__getitem__):
                            effects[k] = _metric(turned, tree.follow(cuts[k])) - base
                            progress.advance(batch.num_rows)
                    num_runs += tree.num_runs
                    found[direction].append(effects)
                    metrics[direction].append(base)
        progress.finish()
        return PathEffects(
            paths=tuple(listed),
            noising=torch.cat(found[Direction.NOISING], 1),
            denoising=torch.cat(found[Direction.DENOISING], 1),
            metric_clean=torch.cat(metrics[Direction.NOISING]),
            metric_corrupt=torch.cat(metrics[Direction.DENOISING]),
            num_runs=num_runs,
        )


def to_receivers(wiring: Wiring, sender: Node, receivers: Iterable[Reader]) -> tuple[Edge, ...]:
    """The step from a sender to a set of receivers.

    Raises:
        EngineError: there is no such sender or receiver, or no edge between them.
        OptionError: there are no receivers.
    """
    edges = tuple(Edge(sender, r.node, r.slot) for r in receivers)
    if not edges:
        raise OptionError(f"no receivers for '{sender}'")
    for edge in edges:
        index_of(wiring, edge)
    return edges


class _Tree:
    """Nested runs of one batch. Paths that come in sorted order share the runs that they begin
    with, and only the runs of the present path are held."""

    def __init__(self, wiring: Wiring, batch: Batch, references: References) -> None:
        self.wiring, self.batch = wiring, batch
        self.base = wiring.record(batch.clean)
        self.held = references.of(wiring, batch)
        self.stack: list[tuple[_Cut, Recording]] = []
        self.num_runs = 0

    def follow(self, cuts: Sequence[_Cut]) -> Recording:
        """The last of the nested runs."""
        shared = 0
        while shared < min(len(cuts), len(self.stack)) and self.stack[shared][0] == cuts[shared]:
            shared += 1
        del self.stack[shared:]
        for step in cuts[shared:]:
            written = self.stack[-1][1].values if self.stack else self.held
            self.stack.append((step, self._cut(step, written)))
        return self.stack[-1][1]

    def _cut(self, step: _Cut, written: Sequence[Tensor]) -> Recording:
        self.num_runs += 1
        mask = torch.zeros(1, *self.wiring.possible.shape, dtype=self.base.values[0].dtype)
        for reader, writer in step:
            mask[0, reader, writer] = 1
        return self.wiring.record_cut(self.batch.clean, written, mask)


def _metric(batch: Batch, run: Recording) -> Tensor:
    with torch.no_grad():
        return measured(batch.metric, run.output, batch.rows)


def _steps(path: Sequence[Step]) -> tuple[tuple[Edge, ...], ...]:
    steps = tuple((s,) if isinstance(s, Edge) else tuple(s) for s in path)
    if not steps or not all(steps):
        raise OptionError(
            "a path has at least one step, and every step an edge",
            got=f"{len(steps)} steps" + (", one of them empty" if steps else ""),
        )
    return steps


def _checked(wiring: Wiring, steps: Sequence[Sequence[Edge]]) -> tuple[_Cut, ...]:
    """Steps as indices, if every edge leaves a node that the step before leads to."""
    cuts = [tuple(sorted(index_of(wiring, edge) for edge in step)) for step in steps]
    for before, after in itertools.pairwise(cuts):
        rows = [reader for reader, _ in before]
        known = [str(w) for j, w in enumerate(wiring.writers) if wiring.feeds[rows, j].any()]
        for name in (str(wiring.writers[writer]) for _, writer in after):
            if name not in known:
                raise EngineError(
                    f"the path is broken: an edge leaves '{name}', to which the step before "
                    "does not lead",
                    expected=f"one of {', '.join(known)}" if known else "the end of the path",
                    nearest=nearest(name, known),
                )
    return tuple(cuts)

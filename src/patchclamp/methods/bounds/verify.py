"""Does a network meet a property? `sat` with a counterexample, `unsat` with a certificate.

Attack first; then divide the inputs, where few of them vary, or the network's neurons. The
search runs in float32; what it closes counts only after the certificate checker's own float64
bounds, rounded outwards, close it as well, so that `unsat` comes with a proof that was replayed.
A network with an operator that the checker does not know is searched in float64 with
outward rounding in every rule; it gets an answer over the reals, and no certificate.

Source: Bunel et al. 2018 (branch and bound); Zhang et al. 2018, Xu et al. 2021, Wang et al. 2021
(the bounds); Shi et al. 2024, arXiv 2405.21063 (nonlinearities other than ReLU).
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import patchclamp
from patchclamp.bounding.lowering import Lowered, lower
from patchclamp.bounding.slopes import SlopeSearch
from patchclamp.core.errors import EngineError, InputError, SourceError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Kind, Node
from patchclamp.methods.bounds.certificate.form import CaseProof, Certificate
from patchclamp.methods.bounds.certificate.replay import Replay
from patchclamp.methods.bounds.counterexample import Counterexample, Standing
from patchclamp.methods.bounds.counterexample import Replay as Rerun
from patchclamp.methods.bounds.property import Property
from patchclamp.methods.bounds.search.attack import Attack
from patchclamp.methods.bounds.search.goal import Goal, goals
from patchclamp.methods.bounds.search.input_split import InputSplit
from patchclamp.methods.bounds.search.limits import Limits, OutOfMemoryError, OutOfTimeError
from patchclamp.methods.bounds.search.neuron_proof import (
    MAX_HINTS,
    NeuronProof,
    layer_slopes,
    matches,
    num_hints,
    operators,
)
from patchclamp.methods.bounds.search.neuron_split import (
    Leaf,
    NeuronSplit,
    NothingLeftError,
    Root,
)
from patchclamp.rules.relu import ReLU


class Answer(StrEnum):
    """What the competition calls them."""

    SAT = "sat"
    UNSAT = "unsat"
    UNKNOWN = "unknown"
    TIMEOUT = "timeout"


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """An answer and what it rests on.

    Attributes:
        answer: sat, unsat, unknown or timeout.
        counterexample: with sat.
        certificate: with unsat, where the checker knows the network's operators.
        reason: one line about how it was found, or why it was not.
        holds: what the answer is about: the reals, or float32.
        bound: the smallest lower bound of what was still open, if it was stopped.
        cpu_seconds, boxes: spent; sub-problems bounded.
    """

    answer: Answer
    counterexample: Counterexample | None = None
    certificate: Certificate | None = None
    reason: str = ""
    holds: str = ""
    bound: float | None = None
    cpu_seconds: float = 0.0
    boxes: int = 0


def _always(leaves: list[Leaf]) -> list[bool]:
    """Bounds that are rounded outwards need no replay."""
    return [True] * len(leaves)


class _Found(Exception):  # noqa: N818  # not an error: ends the search
    """A confirmed counterexample."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Options of a verification.

    Shapes: networks with one input and one output, flat in the property's order.
    Randomness: of the attack's starting points, by `seed`.
    Cost: until decided, or `timeout`.
    Raises: SourceError, BoundError (an operator without a rule), InputError (the property is
        about another number of inputs or outputs). None of them comes with an answer.
    Fails when: the relaxations stay loose; the answer is then timeout or unknown.

    Attributes:
        timeout: wall seconds, loading included.
        seed: of the attack.
        max_boxes: how many open sub-problems may be held; beyond, the answer is unknown.
        few_inputs: up to how many varying inputs are divided rather than neurons.
    """

    timeout: float = 300.0
    seed: int = 0
    max_boxes: int = 4_000_000
    few_inputs: int = 16

    def run(
        self,
        network: Path,
        property: Property,
        property_path: Path | None = None,
        progress: Progress = SILENT,
    ) -> Verdict:
        """Decide a property of an ONNX file."""
        began = time.process_time()
        limits = Limits(self.timeout, self.max_boxes, progress)
        work = _Work(self, network, property, property_path, limits)
        try:
            with torch.no_grad():
                verdict = work.decided()
        except OutOfTimeError:
            verdict = Verdict(answer=Answer.TIMEOUT, reason="the time was up", bound=work.bound)
        except OutOfMemoryError:
            verdict = Verdict(
                answer=Answer.UNKNOWN,
                reason=f"more than {self.max_boxes:,} sub-problems were open",
                bound=work.bound,
            )
        except NothingLeftError:
            verdict = Verdict(
                answer=Answer.UNKNOWN,
                reason="a sub-problem stayed open in which nothing can be divided",
                bound=work.bound,
            )
        except _Found:
            found = work.counterexample
            verdict = Verdict(
                answer=Answer.SAT,
                counterexample=found,
                reason="a counterexample was found and run again",
                holds=_where(found),
            )
        return _with_cost(verdict, time.process_time() - began, limits.num_boxes)


def _with_cost(verdict: Verdict, cpu_seconds: float, boxes: int) -> Verdict:
    import dataclasses

    return dataclasses.replace(verdict, cpu_seconds=cpu_seconds, boxes=boxes)


def _where(found: Counterexample | None) -> str:
    exact = found is not None and found.standing is Standing.EXACT
    return "the reals up to float64 rounding" if exact else "float32"


@dataclass(eq=False)
class _Work:
    """One run."""

    options: Verify
    path: Path
    property: Property
    property_path: Path | None
    limits: Limits
    counterexample: Counterexample | None = None
    bound: float | None = None
    reported: int = 0
    exact: Callable[[], Lowered] = field(init=False, repr=False)
    """The network in float64, made when it is needed."""
    _rerun: Rerun | None = field(default=None, repr=False)

    def decided(self) -> Verdict:
        engine, example = _captured(self.path, self.property)
        self.limits.check()
        for case in self.property.cases:
            if not len(case.rows):  # nothing is asked of the output: every input is unsafe
                self._confirm(torch.as_tensor((case.lower + case.upper) / 2))
        searched = goals(self.property.cases)
        fast = lowered(engine, example, torch.float32)
        for goal in searched:
            attack = Attack(seed=self.options.seed)
            point = attack.run(fast, goal, self.limits)
            if point is not None:
                self._confirm(point)
        replay = self._replay(fast)
        self.exact = functools.cache(lambda: lowered(engine, example, torch.float64))
        network = fast if replay is not None else self.exact()
        proofs: dict[int, CaseProof] = {}
        for goal in searched:
            proofs |= self._proved(network, goal, replay)
        certificate = None
        if len(proofs) == len(self.property.cases) and self.property_path is not None:
            certificate = Certificate(
                network=_digest(self.path),
                property=_digest(self.property_path),
                cases=tuple(proofs[i] for i in range(len(self.property.cases))),
            )
        return Verdict(
            answer=Answer.UNSAT,
            certificate=certificate,
            reason="every sub-problem was closed"
            + (" and replayed in float64" if proofs else " in float64 with outward rounding"),
            holds="the reals",
        )

    def _replay(self, network: Lowered) -> Replay | None:
        """The checker's own bounds, where it knows the network."""
        try:
            replay = Replay(self.path)
            return replay if matches(network, replay) else None
        except (SourceError, EngineError):
            return None

    def _proved(self, network: Lowered, goal: Goal, replay: Replay | None) -> dict[int, CaseProof]:
        varying = int((goal.upper > goal.lower).sum())
        if varying > self.options.few_inputs:
            only_relu = all(isinstance(op.rule, ReLU) for op in operators(network))
            if replay is not None and not only_relu:  # it cannot be told how to bound others
                network, replay = self.exact(), None
            return self._proved_by_neuron(network, goal, replay)
        tree = InputSplit().run(
            network,
            goal,
            None if replay is None else replay.margins,
            self._confirm,
            self.limits,
            self._heard,
        )
        if tree is None:
            raise _Found
        order = tree.preorder()
        return {
            number: tree.proof(i, np.flatnonzero(goal.owner.numpy() == i), order)
            for i, number in enumerate(goal.cases)
        }

    def _proved_by_neuron(
        self, network: Lowered, goal: Goal, replay: Replay | None
    ) -> dict[int, CaseProof]:
        """First with layers bounded by rule; what that leaves open with optimised layers."""
        proofs: dict[int, CaseProof] = {}
        waiting = list(range(goal.num_cases))
        for num_steps, split in ((0, False), (20, True)):
            if not waiting:
                break
            hints = replay is not None and num_hints(network) > MAX_HINTS
            search = SlopeSearch(num_steps=0 if hints else num_steps)
            lower, upper = torch.as_tensor(goal.lower), torch.as_tensor(goal.upper)
            root = Root.of(network, lower, upper, search, rounded=replay is None)
            self.limits.check()
            waiting = self._cases(network, goal, root, replay, proofs, waiting, split=split)
        return proofs

    def _cases(
        self,
        network: Lowered,
        goal: Goal,
        root: Root,
        replay: Replay | None,
        proofs: dict[int, CaseProof],
        waiting: list[int],
        *,
        split: bool,
    ) -> list[int]:
        """Prove cases one after the other; those that are still open, where none is divided."""
        shape, dtype = (1, -1, *network.output.shape), network.dtype
        hints = layer_slopes(root) if replay is not None else {}
        layers = None if replay is None else replay.layers(goal.lower, goal.upper, hints)
        open_cases = []
        for case in waiting:
            mine = np.flatnonzero(goal.owner.numpy() == case)
            C, d = goal.matrix(dtype)[:, mine].reshape(shape), goal.shifts(dtype)[:, mine]
            checked: NeuronProof | None = None
            if replay is not None and layers is not None:
                checked = NeuronProof(
                    replay, root, goal.rows[mine], goal.offsets[mine], hints, layers
                )
            believed = _always if checked is None else checked.holds
            leaves = NeuronSplit(only_root=not split).run(
                root, C, d, believed, self.limits, self._heard, self._corners(network, goal)
            )
            if leaves is None:
                open_cases.append(case)
            elif checked is not None:
                proofs[goal.cases[case]] = checked.proof(leaves)
        return open_cases

    def _corners(self, network: Lowered, goal: Goal) -> Callable[[Tensor], None]:
        lower, upper = (
            torch.as_tensor(side).to(network.dtype)[None] for side in (goal.lower, goal.upper)
        )
        attack = Attack(num_steps=8, first_step=0.05)

        def tried(points: Tensor) -> None:
            hit = attack.improve(network, goal, points.flatten(1), lower, upper, self.limits)
            if hit is not None:
                self._confirm(hit)

        return tried

    def _heard(self, bound: float) -> None:
        self.bound = bound
        self.limits.progress.advance(self.limits.num_boxes - self.reported)
        self.reported = self.limits.num_boxes

    def _confirm(self, point: Tensor) -> bool:
        """Run a candidate again. Raises _Found if it is a counterexample."""
        if self._rerun is None:
            self._rerun = Rerun(self.path)
        found = self._rerun.confirm(self.property, point.double().numpy())
        if found.standing in (Standing.EXACT, Standing.FLOAT32_ONLY):
            self.counterexample = found
            raise _Found
        return False


def _captured(path: Path, property: Property) -> tuple[GraphEngine, list[Tensor]]:
    net = patchclamp.open(path)
    engine = net.graph
    example = [
        x[:1] if engine.capture.dims[i][:1] == ("batch",) else x
        for i, x in enumerate(net.example.tensors())
    ]
    if len(example) != 1:
        raise InputError(f"{path.name} has {len(example)} inputs", expected="one")
    if example[0].numel() != property.num_inputs:
        raise InputError(
            "the property is about another number of inputs",
            got=f"{property.num_inputs}",
            expected=f"{example[0].numel()}, as {path.name} has",
        )
    return engine, example


def lowered(engine: GraphEngine, example: list[Tensor], dtype: torch.dtype) -> Lowered:
    """A network with its one input perturbed and its one output bounded.

    In float64 no weights are merged, so that bounds that are rounded outwards are about the
    network as it is; in float32, where they are only searched with, they are.
    """
    graph = engine.capture.graph
    inputs = [n for n in graph.nodes if n.kind is Kind.INPUT]
    outs = [n for n in graph.outputs if isinstance(n, Node)]
    if len(outs) != 1:
        raise InputError(f"the network has {len(outs)} outputs", expected="one")
    given = [x.to(dtype) if x.is_floating_point() else x for x in example]

    def constant(node: Node) -> Tensor:
        x = engine.constant(node).detach()
        return x.to(dtype) if x.is_floating_point() else x

    exact = dtype is torch.float64
    return lower(graph, constant, given, {inputs[0]: "input"}, outs[0], dtype, exact=exact)


def _digest(path: Path) -> str:
    import gzip

    raw = path.read_bytes()
    return hashlib.sha256(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).hexdigest()

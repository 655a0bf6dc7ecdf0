"""What every method about circuits keeps: docstring, options, seeds, the network as found."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import patchclamp
from patchclamp.methods.circuits.checking.evaluation import Evaluation
from patchclamp.methods.circuits.comparing.checkpoints import CheckpointDiff
from patchclamp.methods.circuits.comparing.comparison import CircuitComparison
from patchclamp.methods.circuits.comparing.repair import Repair
from patchclamp.methods.circuits.finding.acdc import ACDC
from patchclamp.methods.circuits.finding.causal_graph import CausalGraphs, GraphStability
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges
from patchclamp.methods.circuits.finding.neuron_path import NeuronPaths
from patchclamp.methods.circuits.finding.path_patching import PathPatching
from patchclamp.methods.circuits.finding.search import CircuitSearch
from patchclamp.methods.circuits.heads.head_spectra import HeadSpectra
from patchclamp.methods.circuits.heads.head_typing import HeadTyping
from patchclamp.methods.circuits.heads.logit_attribution import LogitAttribution
from patchclamp.methods.circuits.network.ablation import OptimalAblation
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.wiring import Wiring, wire
from patchclamp.methods.circuits.training_clamp import TrainingClamp
from tests.networks import fresh
from tests.snapshots import snapshot

METHODS = (
    ACDC,
    CausalGraphs,
    CheckpointDiff,
    CircuitComparison,
    CircuitSearch,
    EdgeAttribution,
    Evaluation,
    ExactEdges,
    GraphStability,
    HeadSpectra,
    HeadTyping,
    LogitAttribution,
    NeuronPaths,
    OptimalAblation,
    PathPatching,
    Repair,
    TrainingClamp,
)
NETWORKS = ("tiny_lm", "digits_cnn", "vit")


class Difference:
    """Two outputs apart, by row."""

    name = "difference of two outputs"

    def __init__(self, position: int | None) -> None:
        self.position = position

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output[:, 1] - output[:, 2]


@cache
def opened(name: str) -> tuple[Wiring, Contrast]:
    module, inputs = fresh(name)
    net = patchclamp.open(module, inputs)
    generator = torch.Generator().manual_seed(0)
    if inputs.is_floating_point():
        clean, corrupt = torch.rand(2, 5, *inputs.shape[1:], generator=generator)
    else:
        clean, corrupt = torch.randint(3, 90, (2, 5, 9), generator=generator)
    metric = Difference(None if inputs.is_floating_point() else -1)
    return wire(net), contrast(net, clean, corrupt, metric)


def attribution(wiring: Wiring, pairs: Contrast, seed: int, batch: int) -> object:
    return EdgeAttribution(steps=1, batch_size=batch).run(wiring, pairs).circuit.scores


def exact(wiring: Wiring, pairs: Contrast, seed: int, batch: int) -> object:
    where = np.argwhere(wiring.possible)[::37]
    edges = [wiring.edge(int(r), int(w)) for r, w in where]
    return ExactEdges(batch_size=batch).run(wiring, pairs, edges).noising.numpy()


def evaluation(wiring: Wiring, pairs: Contrast, seed: int, batch: int) -> object:
    circuit = EdgeAttribution(steps=1).run(wiring, pairs).circuit
    method = Evaluation(fractions=(0.1, 0.5), num_random=2, batch_size=batch, seed=seed)
    points = method.run(wiring, pairs, circuit).points
    return np.array([[p.faithfulness, p.random_mean] for p in points])


RUNS: dict[str, Callable[[Wiring, Contrast, int, int], object]] = {
    "attribution": attribution,
    "exact": exact,
    "evaluation": evaluation,
}


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_a_method_says_what_it_does(cls: type) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(f.kw_only for f in dataclasses.fields(cls))
    doc = cls.__doc__ or ""
    for part in ("Shapes:", "Units:", "Randomness:", "Cost:", "Raises:", "Fails when:", "Source:"):
        assert part in doc, f"the docstring of {cls.__name__} lacks '{part}'"


@pytest.mark.parametrize("cls", [EdgeAttribution, ExactEdges, Evaluation, OptimalAblation])
def test_options_are_data(cls: type) -> None:
    options = json.loads(json.dumps(dataclasses.asdict(cls())))
    made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    assert made == cls()


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("name", NETWORKS)
def test_same_again_in_any_batches_and_nothing_left_behind(name: str, method: str) -> None:
    wiring, pairs = opened(name)
    before = snapshot(wiring.net.module)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    first = np.asarray(RUNS[method](wiring, pairs, 3, 5))
    assert snapshot(wiring.net.module) == before
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.manual_seed(99)
    assert np.array_equal(first, np.asarray(RUNS[method](wiring, pairs, 3, 5)))
    scale = max(1e-3, float(np.abs(first).max()))
    batched = np.asarray(RUNS[method](wiring, pairs, 3, 2))
    assert np.abs(first - batched).max() < 2e-4 * scale

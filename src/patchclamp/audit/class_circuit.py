"""The circuit that tells two classes apart, for networks that take no text.

Clean is an input of one class, corrupt one of another, both classified correctly; the
metric is the difference of the two logits. The steps are those of
`patchclamp.methods.circuits.finding.search`, which takes prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.circuit import Provenance
from patchclamp.core.errors import DataError
from patchclamp.core.progress import Progress
from patchclamp.methods.circuits.checking.behaviour import LEAST_PAIRS, Performance
from patchclamp.methods.circuits.checking.metrics import LogitDifference
from patchclamp.methods.circuits.finding.search import CircuitSearch, Found
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.wiring import Wiring
from patchclamp.methods.material import Material
from patchclamp.methods.statistics import bootstrap_mean, wilson
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassPairs:
    """Inputs of one class beside inputs of another.

    Attributes:
        name: "telling 3 from 8", in the data's own names.
        train, held_out: contrasts of rows that share no input.
        performance: of the network on all rows of the two classes.
    """

    name: str
    train: Contrast
    held_out: Contrast
    performance: Performance


def class_pairs(net: Net, material: Material, logits: Tensor, *, num: int, seed: int) -> ClassPairs:
    """Pairs of the two classes of which most rows are classified correctly.

    Args:
        logits: of all rows of the material, (row, class).
        num: most pairs to find the circuit with, and as many to check it.

    Randomness: which input stands beside which, from `seed`.
    Raises: DataError where there are too few correct rows of two classes.
    """
    labels = material.labels
    if labels is None:
        raise DataError("the data has no labels, and so no classes to tell apart")
    right = logits.argmax(1) == labels
    counts = torch.bincount(labels[right], minlength=logits.shape[1])
    order = counts.argsort(descending=True, stable=True)
    first, second = sorted(order[:2].tolist())
    each = min(2 * num, int(counts[second]), int(counts[first]))
    if each < 2 * LEAST_PAIRS:
        raise DataError(
            "too few rows are classified correctly to pair two classes",
            got=f"{each} of each",
            expected=f"at least {2 * LEAST_PAIRS}",
            hint="--data with more rows of classes that the network knows",
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in (first, second):
        index = ((labels == label) & right).nonzero()[:, 0]
        rows.append(index[torch.randperm(index.numel(), generator=generator)][:each])
    name = f"telling {_name(material, first)} from {_name(material, second)}"
    halves = []
    for half in (slice(0, each // 2), slice(each // 2, each)):
        clean, corrupt = (material.rows(net, index[half]).call for index in rows)
        pairs = rows[0][half].numel()
        metric = LogitDifference(
            correct=torch.full((pairs, 1), first),
            wrong=torch.full((pairs, 1), second),
            position=None,
            name=f"logit of {_name(material, first)} less that of {_name(material, second)}",
        )
        halves.append(contrast(net, clean, corrupt, metric, name=name))
    return ClassPairs(
        name=name,
        train=halves[0],
        held_out=halves[1],
        performance=_performance(net, logits, labels, (first, second), halves[1], rows),
    )


def _name(material: Material, label: int) -> str:
    names = material.class_names
    return names[label] if label < len(names) else f"class {label}"


def _performance(
    net: Net,
    logits: Tensor,
    labels: Tensor,
    classes: tuple[int, int],
    held_out: Contrast,
    rows: Sequence[Tensor],
) -> Performance:
    """Accuracy over all rows of the two classes, right or wrong; metric over the held-out pairs."""
    either = (labels == classes[0]) | (labels == classes[1])
    hits, num = int((logits.argmax(1) == labels)[either].sum()), int(either.sum())
    half = rows[0].numel() // 2
    clean, corrupt = (
        (logits[index[half:], classes[0]] - logits[index[half:], classes[1]]).double()
        for index in rows
    )
    return Performance(
        name=held_out.name,
        model=net.name,
        metric=held_out.metric.name,
        num=num,
        clean=float(clean.mean()),
        clean_interval=bootstrap_mean(clean, seed=0),
        corrupt=float(corrupt.mean()),
        corrupt_interval=bootstrap_mean(corrupt, seed=0),
        contrast=float((clean - corrupt).mean()),
        contrast_interval=bootstrap_mean(clean - corrupt, seed=0),
        accuracy=hits / num,
        accuracy_interval=wilson(hits, num),
        chance=1 / logits.shape[1],
    )


def explain(
    wiring: Wiring, pairs: ClassPairs, search: CircuitSearch, *, progress: Progress
) -> Found:
    """Score, keep, check, on pairs of inputs."""
    drawn = Provenance(
        task=pairs.name,
        seed=search.seed,
        options={"num": pairs.train.num_rows, "num_held_out": pairs.held_out.num_rows},
    )
    return search.on(
        wiring, [pairs.train], [pairs.held_out], pairs.performance, drawn, progress=progress
    )

"""The audit: open a network, measure it within a budget, gather the findings."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import replace

import torch
from torch import nn

from patchclamp.audit.budget import Budget, affordable, fastest_threads
from patchclamp.audit.context import Context, listed, versions
from patchclamp.audit.intake import intake
from patchclamp.audit.sections.ablation import ablation
from patchclamp.audit.sections.anatomy import anatomy
from patchclamp.audit.sections.attribution import attribution
from patchclamp.audit.sections.bounds import bounds
from patchclamp.audit.sections.circuits import circuits
from patchclamp.audit.sections.engines import engines
from patchclamp.audit.sections.instruments import instruments
from patchclamp.audit.sections.performance import performance
from patchclamp.audit.sections.robustness import robustness
from patchclamp.audit.sections.units import units
from patchclamp.core.document import Document, Facts, Section
from patchclamp.core.errors import InputError
from patchclamp.core.findings import Verdict
from patchclamp.core.progress import SILENT, Progress
from patchclamp.data import load_data
from patchclamp.data.dataset import Dataset
from patchclamp.methods.material import Material, score_for
from patchclamp.model.sources import load
from patchclamp.net import Net

_ROW_LENGTH = 32
_PLANNED_PASSES = 12
_EXPECTATIONS = ("engine/", "instrument/", "performance/", "calibration/", "units/dead")


def audit(
    source: str | os.PathLike[str] | nn.Module | Net,
    data: str | os.PathLike[str] | Dataset | None = None,
    *,
    budget_seconds: float = 120.0,
    seed: int = 0,
    example_inputs: object = None,
    allow_pickle: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Document:
    """Audit a network.

    Args:
        source: as for `patchclamp.open`, or a network that is open already.
        data: a dataset, a bundled name or a file; None takes a bundled one that fits.
        budget_seconds: wall time for all of it; what does not fit is listed in the document.
        seed: of every random choice.
        example_inputs: for a network that does not say what it takes; without them, the
            first two rows of the data.

    Returns:
        The document, for `patchclamp.report.write_page` and `write_findings`.

    Raises:
        SourceError, DataError, InputError: what is given cannot be opened or does not fit.
    """
    budget = Budget(budget_seconds)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        net, material = _opened(source, data, example_inputs, allow_pickle, progress)
        with fastest_threads(net, material):
            material = affordable(net, material, budget, passes=_PLANNED_PASSES, share=0.15)
            ctx = Context(
                net=net,
                material=material,
                score=score_for(net, material),
                budget=budget,
                progress=progress,
                seed=seed,
                command=command,
                model_hash=net.hash,
            )
            return _document(ctx, _sections(ctx))
    finally:
        torch.random.set_rng_state(state)


def _sections(ctx: Context) -> tuple[Section, ...]:
    """Cheap ones first, then the circuit, ablation, bounds of what it found. In reading order."""
    made: dict[str, Section] = {}
    makers = (
        performance,
        units,
        engines,
        instruments,
        anatomy,
        circuits,
        ablation,
        attribution,
        robustness,
        bounds,
    )
    for make in makers:
        started = time.process_time()
        section = make(ctx)
        if section is not None:
            spent = time.process_time() - started
            made[section.id] = replace(section, cpu_seconds=round(spent, 3))
    order = (
        "performance",
        "anatomy",
        "circuit",
        "units",
        "ablation",
        "attribution",
        "robustness",
        "bounds",
        "engines",
        "instruments",
    )
    return tuple(made[name] for name in order if name in made)


def _opened(
    source: str | os.PathLike[str] | nn.Module | Net,
    data: str | os.PathLike[str] | Dataset | None,
    example_inputs: object,
    allow_pickle: bool,
    progress: Progress,
) -> tuple[Net, Material]:
    if isinstance(source, nn.Module):
        _require_eval(source, type(source).__name__)  # before it is run for the first time
    if isinstance(source, Net):
        net = source
    else:
        loaded = load(source, allow_pickle=allow_pickle, progress=progress)
        example = loaded.example_inputs if example_inputs is None else example_inputs
        if example is None and data is not None:  # the data shows what the network takes
            data = data if isinstance(data, Dataset) else load_data(data)
            example = data.inputs[:2]
        if example is None:
            raise InputError(
                f"auditing {loaded.name} needs example inputs, or data to take them from",
                hint="--data FILE.npz with inputs of the network as x",
            )
        net = Net(loaded, example, progress=progress)
    _require_eval(net.module, net.name)
    length = net.loaded.context if net.loaded.context is not None else _ROW_LENGTH
    return net, intake(net, data, length=min(length, _ROW_LENGTH))


def _require_eval(module: nn.Module, name: str) -> None:
    """Refuse a network of which any part is in training mode."""
    training = [path or "the network" for path, m in module.named_modules() if m.training]
    if training:
        raise InputError(
            f"{name} is in training mode",
            got=listed(training, 4),
            hint="call module.eval() first: an audit of a changing network means nothing",
        )


def _document(ctx: Context, sections: tuple[Section, ...]) -> Document:
    net, spent = ctx.net, time.monotonic() - ctx.budget.started
    return Document(
        title=f"Audit of {net.name}",
        subtitle=f"{net.task}, {net.num_parameters:,} parameters, on {ctx.over}",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=ctx.command,
        header=Facts(
            title="What was audited",
            items=(
                ("network", net.name),
                ("opened from", net.loaded.origin),
                ("SHA-256 of class and weights", ctx.model_hash),
                ("data", ctx.over),
                ("SHA-256 of the data", ctx.material.hash),
                ("score", f"{ctx.score.name}, {ctx.score.unit}"),
                ("seed", str(ctx.seed)),
                ("time", f"{spent:.0f} s of a budget of {ctx.budget.seconds:.0f} s"),
                ("threads", str(torch.get_num_threads())),
            ),
        ),
        sections=sections,
        left_out=tuple(ctx.budget.left_out),
        versions=versions(),
    )


def problems(document: Document) -> int:
    """How many expectations do not hold: engines that disagree, a task not done, dead units, ...

    Claims that merely describe (selectivity, importance) are no problems either way.
    """
    return sum(
        f.verdict is Verdict.DOES_NOT_HOLD and f.id.startswith(_EXPECTATIONS)
        for f in document.findings
    )

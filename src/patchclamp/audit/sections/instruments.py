"""Whether the methods find what is planted, and nothing where nothing is.

Every audit runs its own methods on a small network whose every unit is known
(`patchclamp.truth.planted_units`), on planted circuits (`patchclamp.audit.planted_edges`) and on
negative controls, so that the page says what its instruments are worth beside what they
showed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from patchclamp.audit import planted_edges
from patchclamp.audit.context import Context
from patchclamp.audit.intake import intake
from patchclamp.audit.planted_edges import Recovered
from patchclamp.core.document import Column, Section, Table
from patchclamp.core.findings import Evidence, Finding, Null, Record, Verdict
from patchclamp.data.dataset import Dataset
from patchclamp.methods.material import Material, score_for
from patchclamp.methods.neurons.ablation import Ablation, Group
from patchclamp.methods.neurons.activity import Activity, SiteActivity
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.methods.neurons.selectivity import Selectivity
from patchclamp.model.identity import model_hash
from patchclamp.model.sources import load
from patchclamp.net import Net
from patchclamp.truth.planted_units import (
    HIDDEN,
    PlantedUnits,
    plan,
    planted_data,
    random_weights,
    shuffled_labels,
)

_ROWS = 480
_SEPARATION = 2.0
_LEVEL = 0.05
_SECONDS_FOR_EDGES = 5.0
_PLAN = plan(_SEPARATION)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one method found: on the planted network, and on the control.

    Attributes:
        planted, found: what is there, and what the method says is there.
        control: what it says is there on the control, where nothing is.
        control_kind: what the control was.
    """

    method: str
    what: str
    planted: Collection[object]
    found: Collection[object]
    control: Collection[object]
    control_kind: str

    @property
    def recovered(self) -> int:
        """How many of the planted were found."""
        return len(set(self.planted) & set(self.found))

    @property
    def false(self) -> int:
        """How many were found that are not there."""
        return len(set(self.found) - set(self.planted))

    @property
    def passed(self) -> bool:
        """All found; at most one false one, which the level of the tests admits; controls clear."""
        allowed = 1 if self.method == "neurons.selectivity" else 0
        whole = self.recovered == len(self.planted)
        return whole and self.false <= allowed and len(self.control) <= allowed


def instruments(ctx: Context) -> Section:
    """The methods on planted truth and on controls."""
    data = planted_data(_ROWS, separation=_SEPARATION, seed=ctx.seed)
    planted = _observed(PlantedUnits(), data)
    trials = [
        *_activity(planted, data),
        _redundancy(planted),
        _selectivity(ctx, data),
        _ablation(data),
    ]
    edges = _edges(ctx)
    return Section(
        id="instruments",
        title="Are the instruments right?",
        summary=f"The methods of this page, run on a network of {_PLAN.num_units} units that was "
        "built by hand, so that it is known which of them are dead, dense, redundant, selective or "
        "needed; and on controls where nothing is."
        + (" The circuit method, on networks whose circuit was planted." if edges else ""),
        blocks=(
            Table(
                title="Planted and found",
                columns=(
                    Column(name="method", title="Method", role="address"),
                    Column(name="what", title="Looks for"),
                    Column(name="planted", title="Planted", role="number"),
                    Column(name="found", title="Found of them", role="number"),
                    Column(name="false", title="Found beside them", role="number"),
                    Column(name="control", title="Found in the control", role="number"),
                    Column(name="kind", title="Control"),
                ),
                rows=tuple(
                    (
                        t.method,
                        t.what,
                        len(t.planted),
                        t.recovered,
                        t.false,
                        len(t.control),
                        t.control_kind,
                    )
                    for t in trials
                ),
            ),
            *([planted_edges.table(edges)] if edges else []),
        ),
        findings=tuple(
            ctx.signed(f)
            for f in (
                *(_finding(t, data) for t in trials),
                *([planted_edges.finding(edges)] if edges else []),
            )
        ),
    )


def _edges(ctx: Context) -> tuple[Recovered, ...]:
    """The circuit method on planted circuits; nothing where no circuit will be looked for."""
    if ctx.budget.left < _SECONDS_FOR_EDGES:
        ctx.budget.skip(
            "edge attribution on planted circuits",
            f"{ctx.budget.left:.0f} s were left",
            "a larger --budget",
        )
        return ()
    kind = planted_edges.kind_of(ctx.net)
    return () if kind is None else planted_edges.recovered(kind)


def _finding(t: Trial, data: Dataset) -> Finding:
    return Finding(
        id=f"instrument/{t.method}/{t.what}",
        claim=f"The method {t.method} finds all planted {t.what}, and none where there are none.",
        subject=t.method,
        effect=t.recovered / len(t.planted),
        unit="share of the planted that was found",
        null=Null(kind=f"finds in the control: {t.control_kind}", mean=float(len(t.control))),
        evidence=Evidence.VALIDATED,
        verdict=Verdict.HOLDS if t.passed else Verdict.DOES_NOT_HOLD,
        over=f"one planted network of {_PLAN.num_units} units, {_ROWS} rows",
        validation=f"{t.recovered} of {len(t.planted)} planted found, {t.false} beside them, "
        f"{len(t.control)} in the control ({t.control_kind})",
        record=Record(
            method=t.method,
            model="patchclamp.truth.planted_units",
            model_hash=model_hash(PlantedUnits()),
            data=f"planted_data({_ROWS}, separation={_SEPARATION:g})",
            data_hash=data.hash,
            metric="share of the planted that was found",
            engine="hooks",
        ),
        caveats=("shown on one small rectified network; other kinds of network may differ",),
    )


def _opened(module: PlantedUnits, data: Dataset) -> tuple[Net, Material]:
    net = Net(load(module.eval()), data.inputs[:3])
    return net, intake(net, data, length=1)


def _observed(module: PlantedUnits, data: Dataset) -> SiteActivity:
    net, material = _opened(module, data)
    return Activity(batch_size=_ROWS).run(net, material, net.taps(HIDDEN))[0]


def _flagged(activity: SiteActivity, column: str) -> list[int]:
    return [i for i, flag in enumerate(activity.table[column].to_list()) if flag]


def _activity(planted: SiteActivity, data: Dataset) -> list[Trial]:
    control = random_weights(0)
    with torch.no_grad():
        control.read.bias.fill_(0.2)  # so that every unit fires, and none always
    plain = _observed(control, data)
    return [
        Trial(
            method="neurons.activity",
            what=f"{column} units",
            planted=getattr(_PLAN, column),
            found=_flagged(planted, column),
            control=_flagged(plain, column),
            control_kind="random weights",
        )
        for column in ("dead", "dense")
    ]


def _redundancy(planted: SiteActivity) -> Trial:
    def pairs(values: torch.Tensor) -> list[tuple[int, int]]:
        return [(a, b) for a, b, _ in Redundancy(shuffles=5).run(values).pairs.iter_rows()]

    order = torch.rand(planted.values.shape, generator=torch.Generator().manual_seed(0)).argsort(0)
    return Trial(
        method="neurons.redundancy",
        what="redundant pairs",
        planted=list(_PLAN.pairs),
        found=pairs(planted.values),
        control=pairs(planted.values.gather(0, order)),
        control_kind="shuffled observations",
    )


def _selectivity(ctx: Context, data: Dataset) -> Trial:
    def selective(rows: Dataset) -> list[int]:
        net, material = _opened(PlantedUnits(), rows)
        seen = Activity(batch_size=_ROWS).run(net, material, net.taps(HIDDEN))[0]
        if material.labels is None:
            raise RuntimeError("planted data has labels")
        method = Selectivity(shuffles=99, seed=ctx.seed)
        result = method.run(seen.values, material.labels[seen.group], seen.group)
        return [int(u) for u in (result.p_family <= _LEVEL).nonzero()[:, 0]]

    return Trial(
        method="neurons.selectivity",
        what="selective units",
        planted=(*_PLAN.deciders, _PLAN.noisy),
        found=selective(data),
        control=selective(shuffled_labels(data, ctx.seed)),
        control_kind="shuffled labels",
    )


def _ablation(data: Dataset) -> Trial:
    net, material = _opened(PlantedUnits(), data)
    pool = {HIDDEN: tuple(range(_PLAN.num_units))}
    groups = {
        "deciders": _PLAN.deciders,
        "decoys": _PLAN.decoys,
        "fillers": _PLAN.fillers[: len(_PLAN.deciders)],
    }
    result = Ablation(num_nulls=39, batch_size=_ROWS).run(
        net,
        material,
        score_for(net, material),
        [
            Group(name=n, kind="unit group", members={HIDDEN: u}, pool=pool)
            for n, u in groups.items()
        ],
    )
    needed = [i.group.name for i in result.done if i.null.p is not None and i.null.p <= _LEVEL]
    return Trial(
        method="neurons.ablation",
        what="groups that are needed",
        planted=["deciders"],
        found=[n for n in needed if n == "deciders"],
        control=[n for n in needed if n != "deciders"],
        control_kind="decoys and fillers of the same size",
    )

"""Sweeps: what every part of a network does to a metric, as one labelled array.

Activation patching takes two runs that differ in one respect, a clean and a corrupt one,
and carries values from one into the other, part by part. With direction "denoising"
(the default) the corrupt run is the baseline and each part gets its clean value back:
what is enough to restore the behaviour. With "noising" the clean run is the baseline
and each part gets its corrupt value: what the behaviour cannot do without. The two
answer differently where parts stand in for each other, so neither alone is the truth.
With `ablation` the clean run is the baseline and each part is edited instead.

Every cell is exact: it equals one forward pass with that one edit, up to rounding. The
graph engine computes them together (engine/wavefront.py); `engine="hooks"` runs one forward
pass per cell.

Sources: Vig et al. 2020 and Meng et al. 2022 (activation patching); Heimersheim and Nanda
2024 (the directions).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from patchclamp.core.edit_kinds import KINDS, Mean, Patch, Resample
from patchclamp.core.edits import Edit
from patchclamp.core.errors import (
    CaptureError,
    EngineError,
    InputError,
    OptionError,
    SiteError,
    nearest,
)
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import Tap
from patchclamp.engine.cells import (
    OVER,
    ROWS,
    Cell,
    Cutter,
    Difference,
    Groups,
    bytes_of,
    copy_rows,
    is_layered,
    layer_of,
)
from patchclamp.engine.changes import transforms
from patchclamp.engine.protocol import EngineName
from patchclamp.engine.sweep_runs import Reading, Runs, normalised
from patchclamp.engine.targets import Metric, Target, as_metric, measured
from patchclamp.engine.wavefront import Wavefront
from patchclamp.model.inputs import BATCH, Call, principal

if TYPE_CHECKING:
    import xarray

    from patchclamp.net import Net

DEFAULT_MEMORY = "2GB"


class Direction(StrEnum):
    """Which run is the baseline: see the module docstring."""

    DENOISING = "denoising"
    NOISING = "noising"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """Options of a sweep; `run` makes it.

    Attributes:
        over: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out" (each layer by
            position), "heads.z", ".q", ".k", ".v", ".pattern" ("heads" is z; each layer by
            head), or sites by address, alias or glob (each by unit or channel).
        by: axes along which a site is cut into cells, such as ("head", "position") or
            ("row", "column"); () edits whole sites; None takes what `over` says above.
        groups: put units along the last axis of `by` together.
        direction: see the module docstring; ignored with `ablation`.
        ablation: edit instead of patching: a kind of edit ("zero", "mean", "resample") or
            an edit whose site does not matter.
        reference: inputs whose values "mean" and "resample" take, in place of the batch's own.
        per_example: keep examples apart, along a last axis "example".
        normalise: put corrupt at 0 and clean at 1.
        skip: do not run cells whose edit changes nothing, bit for bit, and take the first
            position that an edit changes from its value instead of from the cell's name.
        memory: bound on what the variants of one run hold, in bytes or as "500MB"; the
            weights and the baseline's own values come on top.
        engine: "graph", or "hooks" for one forward pass per cell.
    """

    over: str | Iterable[str] = "resid_pre"
    by: Sequence[str] | None = None
    groups: Groups | None = None
    direction: Direction | str = Direction.DENOISING
    ablation: Edit | str | None = None
    reference: object = None
    per_example: bool = False
    normalise: bool = False
    skip: bool = True
    memory: int | str = DEFAULT_MEMORY
    engine: EngineName | str = EngineName.GRAPH

    def run(
        self,
        net: Net,
        clean: object,
        corrupt: object,
        metric: Metric | Target,
        progress: Progress = SILENT,
    ) -> xarray.DataArray:
        """The metric for every cell.

        Args:
            clean, corrupt: inputs of the same number of examples and tokens; `corrupt` may
                be None with `ablation`.
            metric: a `Metric`, a class or one for each example (at the last position of a
                language model), or a function of the principal output. A function needs
                the whole output; the others are cheaper, because only their position
                is computed.

        Returns:
            An array with axes ("layer", *by) for what has layers, else ("site", *by); one
            axis "cell" where sites differ in size. The mean over examples, or with a last
            axis "example". Attributes: metric, clean, corrupt (their metric), direction,
            engine, num_cells, num_skipped, num_runs, max_bytes.

        Raises:
            InputError: clean and corrupt do not fit together. SiteError, OptionError: what
            is swept is unknown or cannot be cut so. TargetError: the metric is not one number
            per row. EngineError, CaptureError: there is no graph engine for this network.
        """
        engine = _engine_name(self.engine)
        bound = bytes_of(self.memory)
        base, other = self._calls(net, clean, corrupt)
        taps = _taps(net, self.over)
        job = _Job(
            net=net,
            base=base,
            other=other,
            taps=taps,
            metric=as_metric(metric, positions=_has_positions(net)),
            cutter=Cutter(self.over, self.by, self.groups),
            edit=self._edits(net, taps),
            skip=self.skip,
            memory=bound,
            progress=progress,
        )
        _check_padding(base, job.metric)
        with torch.no_grad():
            made = job.by_hooks() if engine is EngineName.HOOKS else job.by_wavefront()
            return self._labelled(job, made)

    def _calls(self, net: Net, clean: object, corrupt: object) -> tuple[Call, Call | None]:
        """The baseline's call, and the one that values come from."""
        if self.direction not in set(Direction):
            raise OptionError(
                f"no direction '{self.direction}'",
                expected=f"one of {', '.join(Direction)}",
                nearest=nearest(str(self.direction), Direction),
            )
        right = net.call(clean)
        if corrupt is None:
            if self.ablation is None or self.normalise:
                raise OptionError(
                    "a sweep needs corrupt inputs to patch from and to normalise with",
                    hint='net.sweep(clean, None, metric, ablation="zero")',
                )
            return right, None
        wrong = net.call(corrupt)
        _check_pair(right, wrong)
        swapped = self.ablation is None and self.direction == Direction.DENOISING
        return (wrong, right) if swapped else (right, wrong)

    def _edits(self, net: Net, taps: Sequence[Tap]) -> Callable[[Tap], Edit] | None:
        """What is done at a site, without its `where`; None for patching."""
        if self.ablation is None:
            return None
        edit = self.ablation
        if isinstance(edit, str):
            if edit not in KINDS or edit in ("patch", "callback"):
                raise OptionError(
                    f"no ablation '{edit}'",
                    expected="zero, mean or resample, or an edit",
                    nearest=nearest(edit, KINDS),
                )
            edit = KINDS[edit](site="*")
        template = edit
        if self.reference is None:
            return lambda tap: dataclasses.replace(template, site=tap.label)
        if not isinstance(template, (Mean, Resample)):
            raise OptionError(f"'{template.kind}' takes no reference", expected="mean or resample")
        held = net.record(self.reference, [tap.label for tap in taps])
        return lambda tap: dataclasses.replace(
            template, site=tap.label, values=held.tensor(tap.label)
        )

    def _labelled(self, job: _Job, made: _Made) -> xarray.DataArray:
        import xarray

        right, wrong = (made.other, made.base) if job.edit is None else (made.base, made.other)
        if job.edit is None and self.direction == Direction.NOISING:
            right, wrong = wrong, right
        values = made.values
        if not self.per_example:
            values = values.mean(1, keepdim=True)
            right, wrong = (None if x is None else x.mean(0, keepdim=True) for x in (right, wrong))
        if self.normalise:
            assert right is not None
            assert wrong is not None
            values = normalised(values, right, wrong)
        dims, shape, coords = job.cutter.labels(made.cells, layered=is_layered(self.over))
        grid = values.double().numpy().reshape(*shape, -1)
        if self.per_example:
            dims = (*dims, "example")
        else:
            grid = grid[..., 0]
        attrs: dict[str, object] = {
            "metric": job.metric.name,
            "direction": str(self.direction) if job.edit is None else "ablation",
            "engine": str(self.engine),
            "num_cells": len(made.cells),
            "num_skipped": made.num_skipped,
            "num_runs": made.num_runs,
            "max_bytes": made.max_bytes,
        }
        for name, value in (("clean", right), ("corrupt", wrong)):
            if value is not None:
                attrs[name] = float(value.double().mean())
        if job.edit is not None:
            attrs["ablation"] = job.edit(job.taps[0]).kind
        return xarray.DataArray(grid, dims=dims, coords=coords, name=job.metric.name, attrs=attrs)


@dataclass(frozen=True)
class _Made:
    """What a sweep found: values (cell, example), and the metric of both runs (example)."""

    cells: Sequence[Cell]
    values: torch.Tensor
    base: torch.Tensor
    other: torch.Tensor | None
    num_skipped: int
    num_runs: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A sweep with everything looked up."""

    net: Net
    base: Call
    other: Call | None
    taps: Sequence[Tap]
    metric: Metric
    cutter: Cutter
    edit: Callable[[Tap], Edit] | None
    skip: bool
    memory: int
    progress: Progress
    sources: dict[str, torch.Tensor] = field(default_factory=dict)

    def by_wavefront(self) -> _Made:
        """All cells together on the graph engine."""
        try:
            engine = self.net.graph_for(self.base)
        except CaptureError as e:
            raise EngineError(
                f"{self.net.name} has no graph engine to sweep on: {e.what}",
                hint="engine='hooks' runs one forward pass per cell",
            ) from e
        wave = Wavefront(engine, self.base)
        addresses = wave.order([tap.site.address for tap in self.taps])
        reading = Reading.of(engine, wave, self.metric)
        found = wave.prepare(
            addresses, output=reading.address, position=reading.position, other=self.other
        )
        base, other = reading.whole(wave.base_output(reading.address)), None
        if self.other is not None:
            self.sources.update(found)
            other = reading.whole(found[wave.name(reading.address)])
        cells = self._cells(wave.base)
        firsts = self._firsts(wave, cells)
        values = base.repeat(len(cells), 1)
        place = {address: n for n, address in enumerate(addresses)}
        live = [i for i, first in enumerate(firsts) if first is not None]
        live.sort(key=lambda i: place[cells[i].tap.site.address])
        runs = Runs(wave, addresses, reading, self.variants, self.memory)
        self.progress.start("sweep", total=len(live), unit="cells")
        for part in runs.chunks(live, firsts):
            values[torch.tensor(part)] = runs.run(
                [cells[i] for i in part], [firsts[i] or 0 for i in part]
            )
            self.progress.advance(len(part))
        self.progress.finish()
        skipped = len(cells) - len(live)
        return _Made(cells, values, base, other, skipped, runs.num, runs.max_bytes)

    def by_hooks(self) -> _Made:
        """One forward pass per cell on the live module."""
        from patchclamp.net import Run

        listed = [tap.site.address for tap in self.taps]
        outside = [a for a in listed if a not in self.net.hooks.points]
        if outside:
            raise EngineError(
                f"'{outside[0]}' is not a module's value, which is all that hooks reach",
                hint="engine='graph'",
            )
        raw, held = self.net.hooks.run(self.base, record=listed)
        plain = principal(raw)
        rows = torch.arange(plain.shape[0])
        base = measured(self.metric, plain, rows)
        other = None
        if self.other is not None:
            raw, found = self.net.hooks.run(self.other, record=listed)
            self.sources.update(found)
            other = measured(self.metric, principal(raw), rows)
        cells = self._cells(held.__getitem__)
        values, num = base.repeat(len(cells), 1), 0
        self.progress.start("sweep", total=len(cells), unit="cells")
        for i, cell in enumerate(cells):
            old = held[cell.tap.site.address]
            if not (self.skip and torch.equal(self.edited(cell, old), old)):
                made: Run = self.net.run(self.base, edits=self._edit(cell), engine=EngineName.HOOKS)
                values[i] = measured(self.metric, made.output, rows)
                num += 1
            self.progress.advance()
        self.progress.finish()
        return _Made(cells, values, base, other, len(cells) - num, num, 0)

    def _cells(self, value: Callable[[str], torch.Tensor]) -> list[Cell]:
        cells: list[Cell] = []
        for tap in self.taps:
            shape = tap.view.read(value(tap.site.address)).shape
            cells += self.cutter.cells(tap, tuple(shape))
        return cells

    def _edit(self, cell: Cell) -> Edit:
        if self.edit is not None:
            return dataclasses.replace(self.edit(cell.tap), where=cell.where)
        source = cell.tap.view.read(self.sources[cell.tap.site.address])
        return Patch(site=cell.tap.label, values=source, where=cell.where)

    def edited(self, cell: Cell, raw: torch.Tensor) -> torch.Tensor:
        """A site's raw value with the cell's edit."""
        change = transforms([(self._edit(cell), cell.tap)])
        return change[cell.tap.site.address](raw)

    def _firsts(self, wave: Wavefront, cells: Sequence[Cell]) -> list[int | None]:
        """The first position that each cell's edit may change; None if it changes nothing."""
        differences: dict[str, Difference] = {}
        firsts: list[int | None] = []
        for cell in cells:
            tap, address = cell.tap, cell.tap.site.address
            row = next((a for a in ROWS if a in tap.axes and wave.has_rows(address)), None)
            if not self.skip:
                firsts.append(min(cell.where[row]) if row is not None and row in cell.where else 0)
                continue
            raw = wave.base(address)
            if self.edit is not None:
                edited = tap.view.read(self.edited(cell, raw))
                firsts.append(Difference.of(edited, tap.view.read(raw), tap, (), row).first({}))
                continue
            if tap.label not in differences:
                source = tap.view.read(self.sources[address])
                kept = tuple(cell.where)
                differences[tap.label] = Difference.of(source, tap.view.read(raw), tap, kept, row)
            firsts.append(differences[tap.label].first(cell.where))
        return firsts

    def variants(self, cells: Sequence[Cell], raw: torch.Tensor, axis: int) -> torch.Tensor:
        """A site's raw value with each cell's edit, along its batch axis."""
        if not cells:
            return raw.narrow(axis, 0, 0)
        if self.edit is not None:
            return torch.cat([self.edited(cell, raw) for cell in cells], axis)
        size = raw.shape[axis]
        made = raw.repeat([len(cells) if i == axis else 1 for i in range(raw.ndim)])
        for k, cell in enumerate(cells):
            view, axes = cell.tap.view, cell.tap.axes
            into = view.read(made.narrow(axis, k * size, size))
            source = view.read(self.sources[cell.tap.site.address])
            copy_rows(into, source, [(axes.index(a), rows) for a, rows in cell.where.items()])
        return made


# ---- what is swept ------------------------------------------------------------------


def _taps(net: Net, over: str | Iterable[str]) -> list[Tap]:
    if isinstance(over, str) and over in OVER:
        try:
            found = net.taps(OVER[over])
        except SiteError as e:
            raise SiteError(
                f"{net.name} has no sites for over='{over}': {e.what}",
                hint="sweep sites by address or glob; print(net.sites)",
            ) from e
        return sorted(found, key=layer_of)
    try:
        found = net.taps(over)
    except SiteError as e:
        names = [over] if isinstance(over, str) else list(over)
        raise SiteError(
            f"nothing to sweep over: {e.what}",
            nearest=next((n for name in names if (n := nearest(name, OVER))), e.nearest),
            hint=f"over is a site, a glob, or one of {', '.join(OVER)}",
        ) from e
    if not found:
        raise SiteError("no sites to sweep over", hint=f"one of {', '.join(OVER)}")
    without = [tap.label for tap in found if BATCH not in tap.axes]
    if without:
        raise SiteError(f"'{without[0]}' has no batch axis, so it cannot be edited by example")
    return found


# ---- inputs and numbers ----------------------------------------------------------------


def _engine_name(engine: EngineName | str) -> EngineName:
    if engine not in (EngineName.GRAPH, EngineName.HOOKS):
        raise OptionError(
            f"no engine '{engine}' for sweeps",
            expected="graph, or hooks for one forward pass per cell",
            nearest=nearest(str(engine), (EngineName.GRAPH, EngineName.HOOKS)),
        )
    return EngineName(engine)


def _has_positions(net: Net) -> bool:
    """Whether the network gives something for every position, as language models do."""
    site = net.quick_sites().sites.get(":output") or next(
        (s for a, s in net.quick_sites().sites.items() if a.startswith(":output")), None
    )
    return site is not None and len(site.shape) == 3


def _check_pair(clean: Call, corrupt: Call) -> None:
    """Both calls must have one form, one batch and one length."""
    if clean.structure != corrupt.structure:
        raise InputError(
            "clean and corrupt inputs are not given in the same form",
            got=f"{clean.structure} and {corrupt.structure}",
            hint="texts of different length get a mask: use pairs of one length throughout",
        )
    for x, y in zip(clean.tensors(), corrupt.tensors(), strict=True):
        if x.shape[:1] != y.shape[:1]:
            raise InputError(
                "clean and corrupt inputs have different numbers of examples",
                got=f"{len(x)} and {len(y)}",
            )
        if x.shape != y.shape:
            tokens = x.ndim == 2 and not x.is_floating_point()
            raise InputError(
                "clean and corrupt inputs differ in "
                + ("length, so that positions do not correspond" if tokens else "shape"),
                got=f"{x.shape[1]} and {y.shape[1]} tokens"
                if tokens
                else f"{tuple(x.shape)} and {tuple(y.shape)}",
                hint="choose words that are as many tokens" if tokens else None,
            )
    masks = [dict(call.kwargs).get("attention_mask") for call in (clean, corrupt)]
    if isinstance(masks[0], torch.Tensor) and isinstance(masks[1], torch.Tensor):
        lengths = [m.sum(1).tolist() for m in masks if isinstance(m, torch.Tensor)]
        if lengths[0] != lengths[1]:
            raise InputError(
                "clean and corrupt inputs differ in length, so that positions do not correspond",
                got=f"{lengths[0]} and {lengths[1]} tokens",
            )


def _check_padding(call: Call, metric: Metric) -> None:
    """The position that is measured must not be padding."""
    mask = dict(call.kwargs).get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or metric.position is None:
        return
    seen = mask[:, metric.position].bool()
    if not bool(seen.all()):
        raise InputError(
            f"the metric '{metric.name}' reads position {metric.position}, which is padding in "
            f"example {int((~seen).nonzero()[0])}",
            hint="sweep texts of one length together, or measure with a function of the output",
        )

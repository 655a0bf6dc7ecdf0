"""What has been learned of one network: its trace, anatomy, captures and their checks.

`Net` asks the rig; the rig looks once and remembers. A capture is made for each
form of call (with or without a mask, say) at its first use, and only served
after it passed its checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from patchclamp.core.errors import CaptureError, EngineError, InputError, PatchclampError
from patchclamp.core.progress import Progress
from patchclamp.core.sites import Alias, Site, SiteTable, matches
from patchclamp.engine.attention import Attention
from patchclamp.engine.capture import capture
from patchclamp.engine.checks import CaptureReport, check_capture, preserved, require
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.trace import Trace, trace
from patchclamp.model.anatomy import Anatomy, anatomy
from patchclamp.model.inputs import BATCH, LENGTH, Call, InputSpec, grown, guess_dims

_ROLES = ("q", "k", "v", "scores", "pattern", "z")


@dataclass
class Rig:
    """See the module docstring. Make one with `look`."""

    module: nn.Module
    network: str
    trace: Trace
    anatomy: Anatomy
    ceiling: int | None
    _graphs: dict[str, GraphEngine | CaptureError] = field(default_factory=dict)
    _reports: dict[str, CaptureReport] = field(default_factory=dict)
    _full: SiteTable | None = None

    @classmethod
    def look(
        cls,
        module: nn.Module,
        network: str,
        example: Call,
        axes: Sequence[tuple[int | str, ...]] | None,
        ceiling: int | None,
    ) -> Rig:
        """Trace the module on its example call."""
        if not example.tensors():
            raise InputError(f"the example inputs of {network} hold no tensor")
        InputSpec(
            structure=example.structure,
            dims=tuple(tuple(x.shape) for x in example.tensors()),
            ceiling=tuple(ceiling for _ in example.tensors()),
        ).check(example, network)
        with preserved(module):
            seen = trace(module, example, axes)
        return cls(module, network, seen, anatomy(module, seen.engine.sites()), ceiling)

    # ---- inputs -------------------------------------------------------------

    def dims(self, call: Call) -> tuple[tuple[int | str, ...], ...]:
        """Axes of the call's tensors."""
        if call.structure == self.trace.spec.structure:
            return self.trace.spec.dims
        if len(call.tensors()) == len(self.trace.spec.dims) and all(
            x.ndim == len(d) for x, d in zip(call.tensors(), self.trace.spec.dims, strict=True)
        ):
            return self.trace.spec.dims
        return guess_dims(call)

    def check(self, call: Call) -> None:
        """Raise InputError where the call cannot be run."""
        spec = self.trace.spec
        if call.structure != spec.structure:
            _accepted(self.module, call, self.network)
            _same_kind(call, self.trace.example, self.network)
            spec = replace(spec, structure=call.structure, dims=self.dims(call))
        spec.with_ceiling(self.ceiling).check(call, self.network)

    # ---- graph --------------------------------------------------------------

    def graph(self, call: Call, progress: Progress) -> GraphEngine:
        """The checked graph engine for calls of this form.

        Raises:
            CaptureError: no capture, or it failed its checks. EngineError: sizes it cannot serve.
        """
        key = call.structure
        if key not in self._graphs:
            progress.note(f"capturing {self.network} as a graph and checking it")
            try:
                with preserved(self.module):
                    self._graphs[key] = self._captured(self._example(call))
            except CaptureError as e:
                if self.module.training:
                    raise  # it may be put into evaluation mode later
                self._graphs[key] = e
        found = self._graphs[key]
        if isinstance(found, CaptureError):
            raise found
        problem = found.serves(call)
        if problem is not None:
            raise EngineError(
                f"the graph engine cannot run this call: {problem}", hint="use engine='hooks'"
            )
        return found

    def _example(self, call: Call) -> Call:
        """A call of this form to capture with: open axes of at least two rows."""
        example = self.trace.example if call.structure == self.trace.spec.structure else call
        dims = self.dims(example)
        for axis in (BATCH, LENGTH):
            sizes = [
                x.shape[d.index(axis)]
                for x, d in zip(example.tensors(), dims, strict=True)
                if axis in d
            ]
            if sizes and min(sizes) < 2:
                example = grown(example, dims, axis)
        return example

    def _captured(self, example: Call) -> GraphEngine:
        made = capture(self.module, example, self.dims(example), self.trace.engine.points)
        engine = GraphEngine(self.module, made, example.structure)
        try:
            report = check_capture(engine, self.trace.engine, self.module, example)
        except PatchclampError as e:
            raise CaptureError(f"the capture of {self.network} could not be checked: {e}") from e
        self._reports[example.structure] = report
        require(report, self.network)
        return engine

    def capture_error(self, progress: Progress) -> CaptureError | None:
        """Why there is no graph engine for calls like the example; None where there is one."""
        try:
            self.graph(self.trace.example, progress)
        except CaptureError as e:
            return e
        return None

    def report(self, call: Call) -> CaptureReport | None:
        """What the checks of this form's capture measured; None where none was made."""
        return self._reports.get(call.structure)

    # ---- names --------------------------------------------------------------

    def quick_table(self) -> SiteTable:
        """Module values and their names, without a capture."""
        return SiteTable(
            self.network, self.trace.engine.sites(), self.anatomy.aliases, self.anatomy.missing
        )

    def needs_graph(self, pattern: str) -> bool:
        """Whether a name or glob can only be resolved with a capture."""
        known = self.quick_table()
        if pattern in known:
            return False
        return any(matches(pattern, name) for name in self.anatomy.captured)

    def full_table(self, progress: Progress) -> SiteTable:
        """Sites of all engines, with the standard names of attention found by structure."""
        if self._full is None:
            try:
                graph = self.graph(self.trace.example, progress)
            except CaptureError as e:
                reason = f"it needs the graph engine: {e.what}"
                missing = {**self.anatomy.missing, **dict.fromkeys(self.anatomy.captured, reason)}
                hooks = self.trace.engine.sites()
                self._full = SiteTable(self.network, hooks, self.anatomy.aliases, missing)
            else:
                self._full = self._merged(graph)
        return self._full

    def _merged(self, graph: GraphEngine) -> SiteTable:
        hooks, captured = self.trace.engine.sites(), graph.sites()
        sites: dict[str, Site] = {}
        for address, site in captured.items():
            live = hooks.get(address)
            # the live module's axes: a capture may have fixed a length that the module leaves open
            sites[address] = (
                site
                if live is None
                else replace(live, engines=site.engines | live.engines, order=site.order)
            )
        missing = dict(self.anatomy.missing)
        for address, site in hooks.items():
            if address not in sites:
                sites[address] = site
        aliases = {**self.anatomy.aliases, **self._attention(graph, sites, missing)}
        return SiteTable(self.network, sites, aliases, missing)

    def _attention(
        self, graph: GraphEngine, sites: Mapping[str, Site], missing: dict[str, str]
    ) -> dict[str, Alias]:
        aliases: dict[str, Alias] = {}
        if not self.anatomy.family:
            for n, attention in enumerate(graph.attention):
                for role in _ROLES:
                    alias = _role_alias(f"attn.{n}.{role}", attention, role, sites)
                    if alias is not None:
                        aliases[alias.name] = alias
            return aliases
        for name, module_input in self.anatomy.producers.items():
            address = graph.producer(module_input)
            if address is None:
                missing[name] = f"nothing inside the network makes '{module_input}'"
            else:
                aliases[name] = Alias(name=name, address=address, axes=sites[address].axes)
        for name, (layer, role) in self.anatomy.structural.items():
            inside = [a for a in graph.attention if f"{a.module}.".startswith(f"{layer}.")]
            alias = _role_alias(name, inside[0], role, sites) if inside else None
            if alias is None:
                missing[name] = f"no attention was found inside '{layer}'"
            else:
                aliases[name] = alias
        return aliases

    # ---- generation ---------------------------------------------------------

    @contextmanager
    def windowed(self) -> Iterator[Callable[[], int]]:
        """Follow how many positions came before each call of the live module (KV cache)."""
        seen = {"offset": 0}

        def before(module: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
            cache = kwargs.get("past_key_values")
            length = getattr(cache, "get_seq_length", None)
            seen["offset"] = int(length()) if length is not None else 0

        handle = self.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        try:
            yield lambda: seen["offset"]
        finally:
            handle.remove()


def _role_alias(
    name: str, attention: Attention, role: str, sites: Mapping[str, Site]
) -> Alias | None:
    address = attention.roles.get(role)
    if address is None or address not in sites:
        return None
    axes, view = attention.axes(role), attention.view()
    if len(view.shape(sites[address].shape)) != len(axes):
        return None
    return Alias(name=name, address=address, axes=axes, view=view)


def _accepted(module: nn.Module, call: Call, network: str) -> None:
    """The network's forward must take these arguments."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*call.args, **call.keywords)
    except TypeError as e:
        raise InputError(
            f"{network} does not take these arguments: {e}", expected=f"forward{signature}"
        ) from None


def _same_kind(call: Call, example: Call, network: str) -> None:
    """A call with other arguments than the example's is fine, other types or ranks are not."""
    if call.structure.partition("|")[0] != example.structure.partition("|")[0]:
        return
    for number, (x, y) in enumerate(zip(call.tensors(), example.tensors(), strict=True)):
        if x.ndim != y.ndim:
            raise InputError(
                f"input {number} of {network} has the wrong shape",
                got=str(tuple(x.shape)),
                expected=f"{y.ndim} axes, like the example's {tuple(y.shape)}",
                hint="add the batch axis: x[None]" if x.ndim == y.ndim - 1 else None,
            )
        if x.dtype != y.dtype and not _integers(x, y):
            raise InputError(
                f"input {number} of {network} has the wrong type",
                got=f"{x.dtype}, shape {tuple(x.shape)}",
                expected=f"{y.dtype}",
                hint="convert it: x.to(dtype)",
            )


def _integers(x: torch.Tensor, y: torch.Tensor) -> bool:
    kinds = (torch.int64, torch.int32)
    return x.dtype in kinds and y.dtype in kinds

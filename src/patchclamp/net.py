"""An opened network: its sites, recording, editing, gradients, generation.

`Net` is what users hold. It resolves names to raw values, turns edits into
transforms and picks an engine; the work itself is done in `engine/`. Nothing
here changes the module: hooks are on it only while something runs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import nn

from patchclamp.core.edit_kinds import as_edits
from patchclamp.core.edits import Edit
from patchclamp.core.errors import (
    CaptureError,
    EngineError,
    InputError,
    OptionError,
    SiteError,
    TargetError,
    nearest,
)
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import SiteTable, Tap
from patchclamp.engine.activations import Activations, joined
from patchclamp.engine.changes import transforms
from patchclamp.engine.coverage import Coverage, coverage
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.hooks import HooksEngine
from patchclamp.engine.protocol import Engine, EngineName
from patchclamp.engine.rig import Rig
from patchclamp.engine.targets import Metric, Target, row_scores
from patchclamp.model.identity import model_hash
from patchclamp.model.inputs import BATCH, Call, as_call, principal
from patchclamp.model.sources import Loaded, Task, load
from patchclamp.model.tokens import Tokenizer

if TYPE_CHECKING:
    import xarray

    from patchclamp.bounding.results import Bounds
    from patchclamp.bounding.targets import Limits, Perturbed
    from patchclamp.engine.cells import Groups
    from patchclamp.store import Store

Sites: TypeAlias = "str | Iterable[str]"
Edits: TypeAlias = "Edit | Mapping[str, object] | Sequence[Edit | Mapping[str, object]]"


class Run(NamedTuple):
    """`logits, acts = net.run(...)`: the principal output and what was recorded."""

    output: torch.Tensor
    acts: Activations


class Gradients(NamedTuple):
    """Gradients of a target at sites.

    `target` is (batch,); `grads` and `acts` hold the gradient of its sum and the value,
    under the same names.
    """

    target: torch.Tensor
    grads: Activations
    acts: Activations


def open(
    source: str | os.PathLike[str] | nn.Module,
    example_inputs: object = None,
    *,
    axes: Sequence[tuple[int | str, ...]] | None = None,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Net:
    """Open a network; it is left exactly as found.

    Args:
        source: a module, a Hugging Face folder, a GGUF or ONNX file, or a name that
            `patchclamp models` lists.
        example_inputs: inputs of the usual form (a tensor, a tuple of positional
            arguments, a mapping of keyword arguments, or texts where the network has
            a tokenizer); needed for a module, known for everything else. Two or more
            examples let the batch stay open.
        axes: names for the axes of every input tensor, where the guess would be
            wrong: `[("batch", "length", 40)]`; integers are fixed sizes.
        allow_pickle: load pickled checkpoints, which can run code.

    Raises:
        SourceError: the network cannot be opened. InputError: it fails on its examples.
    """
    loaded = load(source, allow_pickle=allow_pickle, progress=progress)
    if example_inputs is None:
        example_inputs = loaded.example_inputs
    if example_inputs is None:
        raise InputError(
            f"opening {loaded.name} needs example inputs",
            hint="patchclamp.open(module, example_inputs=torch.zeros(2, 3, 224, 224))",
        )
    return Net(loaded, example_inputs, axes=axes, progress=progress)


class Net:
    """An opened network. Make one with `patchclamp.open`.

    Attributes:
        module: the live network.
        name: what it is called in messages and reports.
        loaded: where it came from, its tokenizer, task and classes.
    """

    def __init__(
        self,
        loaded: Loaded,
        example_inputs: object,
        *,
        axes: Sequence[tuple[int | str, ...]] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.loaded, self.module, self.name = loaded, loaded.module, loaded.name
        self._progress = progress
        example = self._call(example_inputs)
        self._rig = Rig.look(loaded.module, loaded.name, example, axes, self._vocabulary())

    def __repr__(self) -> str:
        return f"<{self.name}: {self.loaded.origin}, {self.num_parameters:,} parameters>"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The network's tokenizer, where it has one."""
        return self.loaded.tokenizer

    @property
    def task(self) -> Task:
        """What the network is for."""
        return self.loaded.task

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def hash(self) -> str:
        """SHA-256 over class and weights, as they are now."""
        return model_hash(self.module)

    @property
    def anatomy_family(self) -> str:
        """Name of the adapter that gave the standard names ("" for none)."""
        return self._rig.anatomy.family

    @property
    def num_layers(self) -> int:
        """Layers that the adapter found (0 without an adapter)."""
        return self._rig.anatomy.num_layers

    @property
    def example(self) -> Call:
        """The example call it was opened with."""
        return self._rig.trace.example

    @property
    def input_dims(self) -> tuple[tuple[int | str, ...], ...]:
        """Axes of every input tensor; "batch" and "length" may vary."""
        return self._rig.trace.spec.dims

    @property
    def hooks(self) -> HooksEngine:
        """The hooks engine: ground truth."""
        return self._rig.trace.engine

    @property
    def graph(self) -> GraphEngine:
        """The graph engine for calls like the example; captured and checked at first use.

        Raises:
            CaptureError: the network cannot be captured, or the capture failed its checks.
        """
        return self.graph_for(self.example)

    def graph_for(self, call: Call) -> GraphEngine:
        """The graph engine for calls of this form (with or without a mask, say)."""
        return self._rig.graph(call, self._progress)

    @property
    def sites(self) -> SiteTable:
        """Every site of every engine, with the standard aliases. Captures the network once."""
        return self._rig.full_table(self._progress)

    def quick_sites(self) -> SiteTable:
        """Module values and their names only: no capture is made for it."""
        return self._rig.quick_table()

    def coverage(self) -> Coverage:
        """Which sites each engine offers here, and why others are missing."""
        return coverage(self._rig, self._progress)

    # ---- inputs and names ---------------------------------------------------

    def _vocabulary(self) -> int | None:
        return self.tokenizer.vocab_size if self.tokenizer is not None else None

    def _call(self, inputs: object) -> Call:
        fixed = self.loaded.call_options
        if isinstance(inputs, str):
            inputs = [inputs]
        if isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str):
            return as_call(self._encoded([str(text) for text in inputs]), fixed)
        by_name = self.tokenizer is not None and not isinstance(self.loaded.example_inputs, tuple)
        if isinstance(inputs, torch.Tensor) and by_name:
            return as_call({"input_ids": inputs}, fixed)
        return as_call(inputs, fixed)

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids of texts, with a mask only where there is padding."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer and cannot take texts", hint="give token ids"
            )
        encoded = self.tokenizer.encode(texts, max_length=None)
        mask = encoded["attention_mask"]
        if bool(mask.all()):
            return {"input_ids": encoded["input_ids"]}
        if "attention_mask" not in inspect.signature(self.module.forward).parameters:
            raise InputError(
                f"{self.name} takes no attention mask, so texts must be of one length",
                got=f"lengths {mask.sum(1).tolist()}",
                hint="cut the texts to the same number of tokens",
            )
        return encoded

    def call(self, inputs: object) -> Call:
        """Inputs as a checked call.

        Raises:
            InputError: wrong shape, NaN, ids outside the vocabulary, texts without a tokenizer.
        """
        call = self._call(inputs)
        self._rig.check(call)
        context = self.loaded.context
        tokens = next(
            (x for x in call.tensors() if x.ndim == 2 and not x.is_floating_point()), None
        )
        if context is not None and tokens is not None and tokens.shape[1] > context:
            raise InputError(
                f"the texts are longer than {self.name} can read",
                got=f"{tokens.shape[1]} tokens",
                expected=f"at most {context}",
                hint="cut them into pieces",
            )
        return call

    def call_dims(self, call: Call) -> tuple[tuple[int | str, ...], ...]:
        """Axes of a call's tensors; "batch" and "length" may vary."""
        return self._rig.dims(call)

    def taps(self, names: Sites) -> list[Tap]:
        """Names and globs resolved; captures the network only where a name needs it."""
        table = self._rig.quick_table()
        patterns = [names] if isinstance(names, str) else list(names)
        if any(self._rig.needs_graph(p) for p in patterns):
            return self.sites.resolve(patterns)
        try:
            return table.resolve(patterns)
        except SiteError:
            return self._rig.full_table(self._progress).resolve(patterns)

    def _edits(self, edits: Edits) -> list[tuple[Edit, Tap]]:
        return [(edit, tap) for edit in as_edits(edits) for tap in self.taps(edit.site)]

    def _engine(self, engine: EngineName | str, call: Call, taps: Iterable[Tap]) -> Engine:
        if engine not in set(EngineName):
            raise OptionError(
                f"no engine '{engine}'",
                expected=f"one of {', '.join(EngineName)}",
                nearest=nearest(str(engine), EngineName),
            )
        name = EngineName(engine)
        reachable = all(t.site.address in self.hooks.points for t in taps)
        if name is EngineName.HOOKS or (name is EngineName.AUTO and reachable):
            return self.hooks
        return self._rig.graph(call, self._progress)

    # ---- running ------------------------------------------------------------

    def run(
        self,
        inputs: object,
        *,
        edits: Edits = (),
        record: Sites = (),
        engine: EngineName | str = EngineName.AUTO,
    ) -> Run:
        """One forward pass with edits; `logits, acts = net.run(x, record="resid_post.*")`.

        Args:
            inputs: as for `patchclamp.open`.
            edits: applied in order; see `patchclamp.edits`. Plain dictionaries do.
            record: sites to record, after their edits.
            engine: "auto", "hooks" or "graph".

        Returns:
            The principal output (logits where there are any), and the recorded values.
        """
        call, taps, changes = self.call(inputs), self.taps(record), self._edits(edits)
        runner = self._engine(engine, call, [*taps, *(t for _, t in changes)])
        with torch.no_grad():
            raw, values = runner.run(call, record=_addresses(taps), transforms=transforms(changes))
        return Run(principal(raw), _seen(taps, values))

    def record(
        self,
        inputs: object,
        sites: Sites,
        *,
        edits: Edits = (),
        engine: EngineName | str = EngineName.AUTO,
        batch_size: int | None = None,
    ) -> Activations:
        """Values at sites, as labelled arrays. The run stops once the last of them is there.

        Args:
            batch_size: run this many examples at a time and join the values.
        """
        call, taps, changes = self.call(inputs), self.taps(sites), self._edits(edits)
        if not taps:
            raise SiteError("no sites to record", hint='net.record(inputs, "resid_post.*")')
        runner = self._engine(engine, call, [*taps, *(t for _, t in changes)])
        moves = transforms(changes)
        parts = []
        with torch.no_grad():
            for batch in self.batches(call, batch_size):
                _, values = runner.run(
                    batch, record=_addresses(taps), transforms=moves, output=False
                )
                parts.append(_seen(taps, values))
        return joined(parts, taps)

    def record_to(
        self,
        path: str | os.PathLike[str],
        dataset: object,
        sites: Sites,
        *,
        dtype: str = "float32",
        batch_size: int = 32,
        shard_examples: int = 256,
        engine: EngineName | str = EngineName.AUTO,
        max_length: int | None = None,
        progress: Progress = SILENT,
    ) -> Store:
        """Stream values at sites to a store on disk; see `patchclamp.recording.record_to`."""
        from patchclamp.recording import record_to

        return record_to(
            self,
            path,
            dataset,
            sites,
            dtype=dtype,
            batch_size=batch_size,
            shard_examples=shard_examples,
            engine=engine,
            max_length=max_length,
            progress=progress,
        )

    def batches(self, call: Call, batch_size: int | None) -> Iterator[Call]:
        """The call in pieces of at most `batch_size` examples."""
        if batch_size is None:
            yield call
            return
        if batch_size < 1:
            raise OptionError("batch_size must be at least 1", got=str(batch_size))
        dims = self.call_dims(call)
        sizes = [
            x.shape[d.index(BATCH)] for x, d in zip(call.tensors(), dims, strict=True) if BATCH in d
        ]
        if not sizes:
            raise InputError(f"the batch of {self.name} is fixed", hint="leave batch_size out")
        for start in range(0, sizes[0], batch_size):
            yield call.rows(slice(start, start + batch_size), dims)

    def gradients(
        self,
        inputs: object,
        sites: Sites,
        target: Target,
        *,
        edits: Edits = (),
        engine: EngineName | str = EngineName.AUTO,
    ) -> Gradients:
        """Gradients of a target at sites.

        Args:
            target: a function of the principal output that gives one scalar per row, or a
                class (one for all rows, or one per row); for language models a token
                at the last position.

        Raises:
            TargetError: the target is not one scalar per row, or does not depend on a site.
        """
        call, taps, changes = self.call(inputs), self.taps(sites), self._edits(edits)
        for tap in taps:
            if not tap.site.dtype.startswith(("float", "bfloat", "complex")):
                raise TargetError(
                    f"site '{tap.label}' has no gradient",
                    got=f"values of type {tap.site.dtype}",
                    expected="real numbers",
                )
        runner = self._engine(engine, call, [*taps, *(t for _, t in changes)])
        moves = transforms(changes)
        held: dict[str, torch.Tensor] = {}

        def hold(address: str) -> Callable[[torch.Tensor], torch.Tensor]:
            def keep(raw: torch.Tensor) -> torch.Tensor:
                if address in moves:
                    raw = moves[address](raw)
                raw = raw.clone()
                if not raw.requires_grad and raw.is_floating_point():
                    raw.requires_grad_(True)
                held[address] = raw
                return raw.clone()  # an in-place operation downstream must not touch `raw`

            return keep

        addresses = _addresses(taps)
        tapped = {**moves, **{address: hold(address) for address in addresses}}
        with torch.enable_grad():
            raw, _ = runner.run(call, transforms=tapped)
            scores = row_scores(principal(raw), target)
            values = [held[a] for a in addresses]
            if not scores.requires_grad:
                raise TargetError("the target does not depend on the recorded sites")
            slopes = torch.autograd.grad(scores.sum(), values, allow_unused=True)
        for tap, slope in zip(taps, slopes, strict=True):
            if slope is None:
                raise TargetError(f"the target does not depend on site '{tap.label}'")
        grads = dict(zip(addresses, slopes, strict=True))
        return Gradients(
            scores.detach(),
            _seen(taps, grads),
            _seen(taps, {a: v.detach() for a, v in held.items()}),
        )

    def sweep(
        self,
        clean: object,
        corrupt: object,
        metric: Metric | Target,
        *,
        over: str | Iterable[str] = "resid_pre",
        by: Sequence[str] | None = None,
        groups: Groups | None = None,
        direction: str = "denoising",
        ablation: Edit | str | None = None,
        reference: object = None,
        per_example: bool = False,
        normalise: bool = False,
        skip: bool = True,
        memory: int | str = "2GB",
        engine: EngineName | str = EngineName.GRAPH,
        progress: Progress = SILENT,
    ) -> xarray.DataArray:
        """The metric with every part patched or ablated in turn; see `patchclamp.sweeping.Sweep`.

        `net.sweep(clean, corrupt, metric, over="heads")` gives an array (layer, head).
        """
        from patchclamp.sweeping import Sweep

        options = Sweep(
            over=over,
            by=by,
            groups=groups,
            direction=direction,
            ablation=ablation,
            reference=reference,
            per_example=per_example,
            normalise=normalise,
            skip=skip,
            memory=memory,
            engine=engine,
        )
        return options.run(self, clean, corrupt, metric, progress)

    def bound(
        self,
        inputs: object,
        perturbed: Perturbed,
        *,
        output: str | None = None,
        rows: object = None,
        method: str = "crown",
        edits: Edits = (),
        restrict: Mapping[str, Limits] | None = None,
        dtype: str = "float64",
        num_steps: int = 20,
        linear: bool = False,
    ) -> Bounds:
        """What an output lies between while something is perturbed; see docs/bounds.md.

        Args:
            perturbed: a number (the first input of real numbers moves by at most that much in
                each element), a set from `patchclamp.bounding.sets`, or a mapping from
                "input", sites and paths of parameters to these.
            output: the site that is bounded; the principal output by default.
            rows: linear functions of one example's output, (num, *output), or for each
                example (batch, num, *output); by default every element is bounded.
            method: "interval", "forward", "forward+crown", "crown" or "alpha".
            edits: applied to the network that is bounded.
            restrict: sites -> (lower, upper); only what keeps these values there is bounded.
            dtype: "float64" allows for rounding and holds over the reals; "float32" does not.
            num_steps: of the ascent on slopes, for "alpha".
            linear: keep linear bounds, in what is perturbed.

        Raises:
            BoundError: an operator without a rule, a set that is empty, infinite or of the
                wrong shape, an output that does not depend on what is perturbed.
        """
        from patchclamp.bounding.request import BoundRequest

        request = BoundRequest(
            output=output,
            rows=rows,
            method=method,
            edits=edits,
            restrict=restrict or {},
            dtype=dtype,
            num_steps=num_steps,
            linear=linear,
        )
        return request.run(self, inputs, perturbed)

    # ---- editing the live module -------------------------------------------

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[Net]:
        """Within, the live module itself runs with these edits, also in `generate`.

        Only values of modules can be edited this way. Positions are absolute also when
        a cache makes later calls short; a negative position counts from the end of each
        call. The edits come off when the block ends, however it ends.
        """
        changes = self._edits(edits)
        for _, tap in changes:
            if tap.site.address not in self.hooks.points:
                raise EngineError(
                    f"'{tap.label}' is not a module's value and cannot be edited while generating",
                    hint="edit the nearest module output, such as attn.N.z or attn.N.out",
                )
        with self._rig.windowed() as window, self.hooks.transformed(transforms(changes, window)):
            yield self

    def generate(self, inputs: object, **options: object) -> torch.Tensor:
        """The module's own `generate` (with its KV cache), greedy unless told otherwise.

        Args:
            inputs: texts or token ids (batch, length).
            options: passed to the module's `generate`, e.g. `max_new_tokens=20`.

        Returns:
            Token ids, prompt included: (batch, length + new).
        """
        if not hasattr(self.module, "generate"):
            raise EngineError(f"{self.name} ({type(self.module).__name__}) has no generate()")
        call = self.call(inputs)
        given = {k: v for k, v in call.keywords.items() if isinstance(v, torch.Tensor)}
        if "input_ids" in given:
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        with torch.no_grad():
            made: torch.Tensor = self.module.generate(  # type: ignore[operator]  # checked above
                *call.args, **{"do_sample": False, **given, **options}
            )
        return made

    def capture_error(self) -> CaptureError | None:
        """Why the graph engine is missing for calls like the example; None where it works."""
        return self._rig.capture_error(self._progress)


def _addresses(taps: Iterable[Tap]) -> list[str]:
    return list(dict.fromkeys(tap.site.address for tap in taps))


def _seen(taps: Sequence[Tap], values: Mapping[str, torch.Tensor]) -> Activations:
    return Activations(taps, {t.label: t.view.read(values[t.site.address]) for t in taps})

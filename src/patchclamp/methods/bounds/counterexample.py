"""Is a point a counterexample? It is run again, by other code than the search's.

The point is first made one that float32 tools can take: every coordinate that has a float32
number within its bounds becomes the nearest of these. Then the network runs in float64
(converted from the ONNX file) and in onnxruntime, which for the usual file means float32 and
is what VNN-COMP's own check of counterexamples does. The two can disagree; the standing says
which of them the claim `sat` rests on.

`exact` is said of the float64 run: the point meets the unsafe set over the reals as far as
float64 arithmetic can tell, which is not a proof. A strict inequality of a property file is
a closed one here, so that a point with margin 0 may lie on the boundary of the file's set.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchclamp.core.errors import (
    InputError,
    MissingExtraError,
    PropertyError,
    SourceError,
)
from patchclamp.methods.bounds.property import Case, Numbers, Property

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

TOLERANCE = 1e-4
"""What VNN-COMP forgives, on bounds of inputs and on inequalities of outputs."""

ONNXRUNTIME = "pip install onnxruntime"

FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}

GZIP = b"\x1f\x8b"


class Standing(StrEnum):
    """Of what a counterexample is one; from the strongest to none."""

    EXACT = "exact"
    FLOAT32_ONLY = "float32-only"
    WITHIN_TOLERANCE = "within-tolerance"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Counterexample:
    """A point, what the network makes of it, and what that proves.

    Attributes:
        x: (num_inputs,) in the order of the network's flat input.
        y: (num_outputs,) in onnxruntime, or in float64 if onnxruntime is not installed.
        standing: what it is a counterexample of.
        margin: how far the float64 run is from one; at most 0 if exact. See Property.margin.
        runtime_margin: the same of onnxruntime, at x in the file's own input type; None if
            it was not checked because onnxruntime is not installed.
    """

    x: Numbers
    y: Numbers
    standing: Standing
    margin: float
    runtime_margin: float | None

    @property
    def holds_in_runtime(self) -> bool | None:
        """Whether onnxruntime agrees without any tolerance; None if it was not asked."""
        return None if self.runtime_margin is None else self.runtime_margin <= 0

    def text(self) -> str:
        """`((X_0 0.5) ... (Y_0 1.25))`, one value a line, in the form of VNN-COMP."""
        values = [("X", i, v) for i, v in enumerate(self.x.tolist())]
        values += [("Y", i, v) for i, v in enumerate(self.y.tolist())]
        return "(" + "\n".join(f"({name}_{i} {value!r})" for name, i, value in values) + ")"


def confirm(network: Path | bytes, property: Property, point: Numbers) -> Counterexample:
    """Run one point again. Raises: as Replay and Replay.confirm; Replay is for many points."""
    return Replay(network).confirm(property, point)


class Replay:
    """One network, ready to run in float64 and in onnxruntime.

    Args:
        network: an ONNX file or its bytes, packed with gzip or not.

    Raises: MissingExtraError without onnx or onnx2torch; SourceError for a file that cannot be
        read, or a network that has not one input and one output of floating point numbers.
    """

    def __init__(self, network: Path | bytes) -> None:
        from patchclamp.model.sources.onnx import load_onnx

        if isinstance(network, bytes):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "network.onnx"
                path.write_bytes(_unpacked(network))
                loaded = load_onnx(path)
        else:
            loaded = load_onnx(network)
        raw = _unpacked(network)
        self._module: nn.Module = loaded.module.double()
        self.shape = _input_shape(raw)
        self._session = _session(network, raw)

    def confirm(self, property: Property, point: Numbers) -> Counterexample:
        """The best counterexample that the point comes to: rounded to float32, or as it is.

        A point outside all boxes is moved into the box of the case that it is nearest to.

        Shapes: point (num_inputs,).  Cost: up to three runs of the network, twice.
        Raises: InputError for a point of another size or with NaN; PropertyError for a
            property of another number of inputs or outputs than the network's.
        """
        point = np.asarray(point, dtype=np.float64).reshape(-1)
        self._require_fit(property, point)
        case = self._nearest_case(property, point)
        inside = np.clip(point, case.lower, case.upper)
        rounded = float32_within(inside, case.lower, case.upper)
        found = self._judged(property, rounded)
        if found.standing is not Standing.EXACT and not np.array_equal(inside, rounded):
            unrounded = self._judged(property, inside)
            order = list(Standing)
            if order.index(unrounded.standing) < order.index(found.standing):
                return unrounded
        return found

    def run_float64(self, x: Numbers) -> Numbers:
        """(num_outputs,) of one flat input, in float64."""
        import torch

        given = torch.from_numpy(np.array(x, dtype=np.float64)).reshape(self.shape)
        try:
            with torch.no_grad():
                out = self._module(given)
        except (RuntimeError, ValueError, TypeError) as e:
            raise SourceError(f"the network cannot run in float64: {e}") from e
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            raise SourceError("the network has not one output of floating point numbers")
        found: Numbers = out.detach().reshape(-1).double().numpy()
        return found

    def run_runtime(self, x: Numbers) -> Numbers:
        """(num_outputs,) of one flat input, rounded to the file's type, in onnxruntime.

        Raises: MissingExtraError if onnxruntime is not installed.
        """
        if self._session is None:
            raise MissingExtraError(
                "counterexamples are checked in onnxruntime, which is not installed",
                hint=ONNXRUNTIME,
            )
        given = self._session.get_inputs()[0]
        value = np.asarray(x).astype(FLOATS[given.type]).reshape(self.shape)
        (out,) = self._session.run(None, {given.name: value})
        return np.asarray(out, dtype=np.float64).reshape(-1)

    def _require_fit(self, property: Property, point: Numbers) -> None:
        if len(point) != property.num_inputs or not np.isfinite(point).all():
            raise InputError(
                "a counterexample has one finite number for every input",
                got=f"{len(point)} numbers, {int((~np.isfinite(point)).sum())} not finite",
                expected=str(property.num_inputs),
            )
        if math.prod(self.shape) != property.num_inputs:
            raise PropertyError(
                "the property is about another network",
                got=f"{property.num_inputs} inputs",
                expected=f"{math.prod(self.shape)}, of shape {list(self.shape)}",
            )

    def _nearest_case(self, property: Property, point: Numbers) -> Case:
        """The case that the point, moved into its box, comes nearest to meeting."""
        if len(property.cases) == 1:
            return property.cases[0]
        y = self._outputs(property, self.run_float64(point))
        alone = [replace(property, cases=(case,)) for case in property.cases]
        return min(alone, key=lambda one: _margin(one, point, y)).cases[0]

    def _outputs(self, property: Property, y: Numbers) -> Numbers:
        if len(y) != property.num_outputs:
            raise PropertyError(
                "the property is about another network",
                got=f"{property.num_outputs} outputs",
                expected=str(len(y)),
            )
        return y

    def _judged(self, property: Property, x: Numbers) -> Counterexample:
        y = self._outputs(property, self.run_float64(x))
        margin, runtime_margin = _margin(property, x, y), None
        if self._session is not None:
            y = self._outputs(property, self.run_runtime(x))
            taken = x.astype(FLOATS[self._session.get_inputs()[0].type]).astype(np.float64)
            runtime_margin = _margin(property, taken, y)
        other = math.inf if runtime_margin is None else runtime_margin
        if margin <= 0:
            standing = Standing.EXACT
        elif other <= 0:
            standing = Standing.FLOAT32_ONLY
        elif min(margin, other) <= TOLERANCE:
            standing = Standing.WITHIN_TOLERANCE
        else:
            standing = Standing.NONE
        return Counterexample(
            x=x, y=y, standing=standing, margin=margin, runtime_margin=runtime_margin
        )


def float32_within(x: Numbers, lower: Numbers, upper: Numbers) -> Numbers:
    """x with every coordinate the nearest float32 number in [lower, upper], where there is one.

    A coordinate whose interval holds no float32 number stays as it is. x lies in the box.
    """
    largest = np.finfo(np.float32).max
    rounded = np.clip(x, -largest, largest).astype(np.float32)
    below, above = (
        np.nextafter(rounded, np.float32(end), dtype=np.float32).astype(np.float64)
        for end in (-np.inf, np.inf)
    )
    found = rounded.astype(np.float64)
    found = np.where(found < lower, above, np.where(found > upper, below, found))
    return np.where((found >= lower) & (found <= upper), found, x)


def _margin(property: Property, x: Numbers, y: Numbers) -> float:
    """Property.margin, and infinity where the output is: such an output proves nothing."""
    return property.margin(x, y) if np.isfinite(y).all() else math.inf


def _unpacked(network: Path | bytes) -> bytes:
    try:
        raw = network if isinstance(network, bytes) else network.read_bytes()
        return gzip.decompress(raw) if raw[:2] == GZIP else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise SourceError(f"the network is not a gzip file, or was cut short: {e}") from e
    except OSError as e:
        raise SourceError(f"ONNX file '{network!s}' cannot be read: {e.strerror or e}") from e


def _input_shape(raw: bytes) -> tuple[int, ...]:
    """The shape of the only input; axes that are left open are 1, as VNN-COMP has them."""
    import onnx

    graph = onnx.load_model_from_string(raw).graph
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise SourceError(
            "properties are about networks with one input and one output",
            got=f"{len(inputs)} inputs, {len(graph.output)} outputs",
        )
    return tuple(axis.dim_value or 1 for axis in inputs[0].type.tensor_type.shape.dim)


def _session(network: Path | bytes, raw: bytes) -> ort.InferenceSession | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it writes its warnings to stderr itself
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers: Sequence[str] = ["CPUExecutionProvider"]
    beside = isinstance(network, Path) and not network.name.lower().endswith(".gz")
    try:
        session = onnxruntime.InferenceSession(
            str(network) if beside else raw, options, providers=providers
        )
    except Exception as e:  # onnxruntime's errors have no common class but this
        raise SourceError(f"onnxruntime cannot open the network: {e}") from e
    kind = session.get_inputs()[0].type
    if kind not in FLOATS:
        raise SourceError("the network's input is not of floating point numbers", got=kind)
    return session

"""An ONNX file read by the checker itself, into the steps of `network`.

Nothing is taken from the package's other reader of ONNX: a mistake there must not hide
itself here. The file is untrusted data; it is parsed as a protobuf and never run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from patchclamp.core.errors import EngineError, MissingExtraError, SourceError, nearest
from patchclamp.methods.bounds.certificate.network import Affine, Elementwise, Network, Step
from patchclamp.methods.bounds.certificate.operators import OPERATORS, Constant, Node, Value
from patchclamp.methods.bounds.certificate.steps import Steps, View
from patchclamp.methods.bounds.certificate.windows import WEIGHTED_SUMS

MOST_BYTES = 2**31 - 1
"""Limit of a protobuf, hence of an unpacked file."""

_HANDLERS = OPERATORS | WEIGHTED_SUMS


def unpacked(source: bytes | str | Path) -> bytes:
    """The bytes of a file (or the bytes given), unpacked where they are gzip."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as e:
        raise SourceError(f"'{source!s}' cannot be read: {e.strerror}") from e
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            result = file.read(MOST_BYTES + 1)
    except (EOFError, OSError, zlib.error) as e:
        raise SourceError(f"a gzip file is damaged: {e}") from e
    if len(result) > MOST_BYTES:
        raise SourceError("a gzip file is too large unpacked", expected=f"{MOST_BYTES} bytes")
    return result


def sha256(source: bytes | str | Path) -> str:
    """SHA-256 of a file's unpacked bytes, in hexadecimal."""
    return hashlib.sha256(unpacked(source)).hexdigest()


def read_network(source: bytes | str | Path) -> Network:
    """The network of an ONNX file (.onnx or .onnx.gz), or of its bytes.

    The weights are taken as the real numbers that they are; float64 holds float32 exactly.
    Elementwise operators are numbered in the order of the file, those that the output does
    not depend on left out.

    Raises: SourceError if it is no ONNX file; EngineError for an operator, or a use of
    one, that the checker does not know; MissingExtraError if onnx is not installed.
    """
    if find_spec("onnx") is None:
        raise MissingExtraError(
            "ONNX files need a package that is not installed: onnx",
            hint="pip install 'patchclamp[onnx]'",
        )
    import onnx
    from google.protobuf.message import (  # type: ignore[import-untyped]  # comes with onnx
        DecodeError,
    )

    data = unpacked(source)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as e:
        raise SourceError("the file is not an ONNX network", got=str(e)[:200]) from e
    return _Reader(model).network(hashlib.sha256(data).hexdigest())


class _Reader:
    """Walks the graph once, from the input to the output."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
        self.opset = int(versions[0]) if versions else 1
        if len(self.graph.output) != 1:
            raise EngineError(
                "the network has several outputs, or none",
                got=str(len(self.graph.output)),
                expected="one",
            )
        self.output = self.graph.output[0].name
        self.needed = self._needed()
        self.uses = Counter(name for node in self.needed for name in node.input)
        self.uses[self.output] += 1
        self.values: dict[str, Value] = {}
        for tensor in self.graph.initializer:
            self._define(tensor.name, _array(tensor))
        self.steps = Steps(self._input_shape())
        self._define(self.input, self.steps.input)

    def network(self, digest: str) -> Network:
        for node in self.needed:
            self._apply(node)
        output = self.values.get(self.output)
        if not isinstance(output, View):
            raise EngineError("the output of the network does not depend on its input")
        output = self.steps.whole(output)
        return Network(steps=_used(self.steps.steps[: output.step + 1]), sha256=digest)

    def _needed(self) -> list[Any]:
        """The nodes that the output depends on, in the order of the file."""
        wanted, kept = {self.output}, []
        for node in reversed(self.graph.node):
            if wanted.intersection(node.output):
                wanted.update(name for name in node.input if name)
                kept.append(node)
        return kept[::-1]

    def _input_shape(self) -> tuple[int, ...]:
        inputs = [i for i in self.graph.input if i.name not in self.values]
        if len(inputs) != 1:
            raise EngineError(
                "the network has several inputs, or none",
                got=", ".join(i.name for i in inputs) or "none",
                expected="one",
            )
        self.input = inputs[0].name
        shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if shape and shape[0] <= 0:
            shape[0] = 1
        if any(size <= 0 for size in shape):
            raise EngineError(f"input '{self.input}' has no fixed shape", got=str(shape))
        return tuple(shape)

    def _define(self, name: str, value: Value) -> None:
        if name in self.values:
            raise EngineError(f"tensor '{name}' is defined twice")
        if not isinstance(value, View) and np.issubdtype(value.dtype, np.floating):
            if not np.isfinite(value).all():
                raise EngineError(f"tensor '{name}' of the network is not finite")
        elif isinstance(value, View) and self.uses[name] > 1:
            value = View(step=value.step, index=value.index, shared=True)
        self.values[name] = value

    def _apply(self, proto: Any) -> None:
        name = proto.name or (proto.output[0] if proto.output else "?")
        kind = (
            proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        )
        if kind not in _HANDLERS:
            raise EngineError(
                f"the certificate checker has no operator '{kind}' (node '{name}')",
                expected=", ".join(sorted(_HANDLERS)),
                nearest=nearest(kind, _HANDLERS),
            )
        handler, known = _HANDLERS[kind]
        attributes = {a.name: _attribute(a) for a in proto.attribute}
        unknown = sorted(set(attributes) - known)
        if unknown:
            raise EngineError(
                f"node '{name}' ({kind}) has unknown attributes", got=", ".join(unknown)
            )
        missing = [i for i in proto.input if i and i not in self.values]
        if missing:
            raise EngineError(f"node '{name}' ({kind}) reads '{missing[0]}', which nothing defines")
        node = Node(
            kind=kind,
            name=name,
            attributes=attributes,
            opset=self.opset,
            inputs=tuple(self.values[i] if i else None for i in proto.input),
            num_outputs=len([o for o in proto.output if o]),
        )
        try:
            results = handler(self.steps, node)
        except (ValueError, IndexError, TypeError) as e:
            raise EngineError(f"node '{name}' ({kind}) does not fit its inputs: {e}") from e
        results = results if isinstance(results, list) else [results]
        for output, value in zip(proto.output, results, strict=False):
            if output:
                self._define(output, value)


def _used(steps: list[Step]) -> tuple[Step, ...]:
    """The steps that the last one needs; affine steps go whose rows others took along."""
    needed = {0, len(steps) - 1}
    for i in range(len(steps) - 1, 0, -1):
        step = steps[i]
        if i in needed and isinstance(step, Affine):
            needed.update(term.source for term in step.terms)
        elif isinstance(step, Elementwise):  # all are kept, so that their numbers stay
            needed.update((i, step.source))
    kept = sorted(needed)
    place = {old: new for new, old in enumerate(kept)}
    result: list[Step] = []
    for i in kept:
        step = steps[i]
        if isinstance(step, Affine):
            terms = tuple(replace(t, source=place[t.source]) for t in step.terms)
            result.append(replace(step, terms=terms))
        elif isinstance(step, Elementwise):
            result.append(replace(step, source=place[step.source]))
        else:
            result.append(step)
    return tuple(result)


def _attribute(proto: Any) -> Any:
    from onnx import TensorProto, helper

    value = helper.get_attribute_value(proto)
    if isinstance(value, TensorProto):
        return _array(value)
    return value.decode() if isinstance(value, bytes) else value


def _array(tensor: Any) -> Constant:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        raise EngineError(f"tensor '{tensor.name}' is kept in another file", expected="one file")
    return np.asarray(numpy_helper.to_array(tensor))

"""ONNX files, made into a `torch.fx` module by onnx2torch.

The converter covers each operator from some opset on, so that old files fail; those are
brought to opset 13 by ONNX's own converter first. Weights outside the file are read only
from its own folder: a location such as `../../secret` in a file from elsewhere would
otherwise pull any file of the user into the network.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from patchclamp.core.errors import (
    MissingExtraError,
    PatchclampError,
    SourceError,
    UnsafeFileError,
)
from patchclamp.model.sources.loaded import Loaded
from patchclamp.model.sources.torchvision_stand_in import import_onnx2torch

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

INSTALL = "pip install 'patchclamp[onnx]' && pip install --no-deps onnx2torch==1.5.15"
OPSET = 13
"""The opset that old files are brought to; onnx2torch covers it best."""

MAX_BYTES = (1 << 31) - 1
"""The limit of a protobuf message, and so of an ONNX file without outside weights."""

FREE_BATCH, FREE_SIZE = 2, 8
"""Example sizes of an axis that the file leaves open: the first axis, and others."""

FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What the converters and the converted modules raise (NotImplementedError included)."""


def load_onnx(path: Path) -> Loaded:
    """Open `.onnx` or `.onnx.gz`.

    Raises:
        SourceError: no ONNX file, damaged, or an operator that onnx2torch lacks.
        UnsafeFileError: it refers to weights outside its folder.
        MissingExtraError: onnx or onnx2torch is not installed.
    """
    missing = [m for m in ("onnx", "onnx2torch") if find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"ONNX files need packages that are not installed: {', '.join(missing)}", hint=INSTALL
        )
    proto = _parse(path)
    _load_outside_weights(proto, path.resolve().parent)
    given = _opset(proto)
    module, used = _convert(proto, path)
    module.eval()
    examples, notes = _examples(module, proto)
    changed = "" if used == given else f" (converted to {used})"
    return Loaded(
        module=module,
        name=path.name.removesuffix(".gz").removesuffix(".onnx"),
        origin=f"ONNX opset {given}{changed}",
        example_inputs=examples,
        notes=notes,
    )


def _parse(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import (  # type: ignore[import-untyped]  # comes with onnx
        DecodeError,
    )

    try:
        zipped = path.name.lower().endswith(".gz")
        with gzip.open(path) if zipped else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise SourceError(f"'{path}' is not a gzip file, or was cut short: {e}") from e
    except OSError as e:
        raise SourceError(f"ONNX file '{path}' cannot be read: {e.strerror or e}") from e
    if len(raw) > MAX_BYTES:
        raise SourceError(f"ONNX file '{path}' is larger than the format allows (2 GiB)")
    try:
        proto = onnx.load_model_from_string(raw)
    except DecodeError as e:
        raise SourceError(f"'{path}' is not an ONNX file, or was cut short") from e
    if not proto.graph.node or not proto.opset_import or not proto.graph.output:
        raise SourceError(
            f"'{path}' is not an ONNX model, or was cut short",
            got=f"{len(proto.graph.node)} operators, {len(proto.graph.output)} outputs, "
            f"{len(proto.opset_import)} opsets",
        )
    return proto


def _opset(proto: ModelProto) -> int:
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _load_outside_weights(proto: ModelProto, folder: Path) -> None:
    """Read external tensors, after every location has been checked to lie in the folder."""
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_model

    outside = [t for t in _tensors(proto) if t.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        location = facts.get("location", "")
        target = (folder / location).resolve()
        if not location or "\\" in location or folder not in target.parents:
            raise UnsafeFileError(
                f"tensor '{tensor.name}' refers to a file outside the folder of the model",
                got=repr(location),
                expected="a file beside the model",
            )
        if not target.is_file():
            raise SourceError(
                f"the weights of tensor '{tensor.name}' are missing: no file '{target}'",
                hint="copy it together with the .onnx file",
            )
        offset, length = facts.get("offset", "0"), facts.get("length", "0")
        if not (offset.isdigit() and length.isdigit()) or (
            int(offset) + int(length) > target.stat().st_size
        ):
            raise SourceError(
                f"the weights of tensor '{tensor.name}' in '{target}' were cut short",
                got=f"{target.stat().st_size} bytes",
                expected=f"{length} bytes from byte {offset}",
            )
    if outside:
        try:
            load_external_data_for_model(proto, str(folder))
        except (*FAILURES, OSError) as e:
            raise SourceError(f"the weights in '{folder}' cannot be read: {e}") from e


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor in the model, those in subgraphs, attributes and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    sparse = [*attribute.sparse_tensors]
    if attribute.HasField("sparse_tensor"):
        sparse.append(attribute.sparse_tensor)
    for pair in sparse:
        yield from (pair.values, pair.indices)
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)


def _convert(proto: ModelProto, path: Path) -> tuple[nn.Module, int]:
    """The module, and the opset that it was converted from."""
    from onnx import version_converter

    onnx2torch = import_onnx2torch()
    given = _opset(proto)
    try:
        return onnx2torch.convert(proto), given
    except FAILURES as direct:
        if given in (0, OPSET):
            raise _not_converted(proto, path, direct) from direct
        first = direct
    try:
        raised = version_converter.convert_version(proto, OPSET)
        return onnx2torch.convert(raised), OPSET
    except FAILURES as e:
        raise _not_converted(proto, path, first) from e


def _not_converted(proto: ModelProto, path: Path, cause: Exception) -> SourceError:
    lacking = _unsupported(proto)
    if lacking:
        return SourceError(
            f"onnx2torch has no converter for the operators {', '.join(lacking)} in '{path}'",
            got=f"opset {_opset(proto)}",
            hint="export it again with other operators or as a PyTorch module",
        )
    return SourceError(f"ONNX file '{path}' cannot be converted: {cause!r}")


def _unsupported(proto: ModelProto) -> list[str]:
    """Operators without a converter, in the order of the graph, each once."""
    from onnx2torch.node_converters import get_converter

    opsets = {o.domain: o.version for o in proto.opset_import}
    lacking: dict[str, None] = {}
    for node in proto.graph.node:
        label = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        try:
            get_converter(
                domain=node.domain,
                operation_type=node.op_type,
                version=min(opsets.get(node.domain, 0), OPSET) or OPSET,
            )
        except NotImplementedError:
            lacking.setdefault(label)
    return list(lacking)


def _examples(
    module: nn.Module, proto: ModelProto
) -> tuple[tuple[torch.Tensor, ...] | None, tuple[str, ...]]:
    """Inputs that the network was seen to take, or None with the reason."""
    reason = ""
    for batch in (FREE_BATCH, 1):
        try:
            made = _made_inputs(proto, batch)
            with torch.no_grad():
                module(*made)
        except PatchclampError:
            raise
        except FAILURES as e:
            reason = reason or f"no example inputs: {e!r}"
        else:
            return made, ()
    return None, (reason,)


def _made_inputs(proto: ModelProto, batch: int) -> tuple[torch.Tensor, ...]:
    initialised = {tensor.name for tensor in proto.graph.initializer}
    generator = torch.Generator().manual_seed(0)
    return tuple(
        _made_input(value, batch, generator)
        for value in proto.graph.input
        if value.name not in initialised
    )


def _made_input(value: ValueInfoProto, batch: int, generator: torch.Generator) -> torch.Tensor:
    from onnx.helper import tensor_dtype_to_np_dtype

    described = value.type.tensor_type
    shape = [
        axis.dim_value or (batch if place == 0 else FREE_SIZE)
        for place, axis in enumerate(described.shape.dim)
    ]
    kind = tensor_dtype_to_np_dtype(described.elem_type)
    dtype = torch.from_numpy(kind.type(0).reshape(1)).dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    # a mask of zeros would hide everything
    return (torch.ones if "mask" in value.name.lower() else torch.zeros)(shape, dtype=dtype)

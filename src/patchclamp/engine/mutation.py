"""In-place operators made functional, so that a recorded value is never changed later.

Most networks only use the likes of `relu_` and `add_` on values that nothing
aliases: those are rewritten in place, which keeps every operator's place in
the module tree. Anything harder (writes through views) is left to export's own
functionalisation, which traces the graph again.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

_FRESH_VIEWS = ("view", "reshape", "transpose", "permute", "slice", "select", "expand", "unsqueeze")


def make_functional(program: ExportedProgram) -> tuple[ExportedProgram, str]:
    """A program without mutation, and how: "" (had none), "rewritten" or "retraced"."""
    mutating = [n for n in program.graph.nodes if _is_mutable(n)]
    if not mutating:
        return program, ""
    if all(_is_simple(n) for n in mutating):
        for node in mutating:
            _rewrite(program.graph, node)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return program, "rewritten"
    return program.run_decompositions({}), "retraced"


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.relu.default` for `aten.relu_.default`, or None."""
    schema = node.target._schema  # type: ignore[union-attr]  # an OpOverload: _is_mutable was checked
    name = schema.name.partition("::")[2]
    if not name.endswith("_") or schema.name.partition("::")[0] != "aten":
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = schema.overload_name or "default"
    return getattr(packet, overload, None) if packet is not None else None


def _is_simple(node: fx.Node) -> bool:
    """The changed value is an operator's own fresh result, and nothing else looks at it after."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or target.op != "call_function":
        return False
    if _functional(node) is None or _is_view(target):
        return False
    return not any(_is_view(user) for user in target.users)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"
    return any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    changed = node.args[0]
    functional = _functional(node)
    with graph.inserting_before(node):
        made = graph.call_function(functional, node.args, node.kwargs)  # type: ignore[arg-type]  # checked by _is_simple
    made.meta = dict(node.meta)
    later = False
    for other in list(graph.nodes):
        if other is node:
            later = True
        elif later:
            other.replace_input_with(changed, made)
    node.replace_all_uses_with(made)
    graph.erase_node(node)

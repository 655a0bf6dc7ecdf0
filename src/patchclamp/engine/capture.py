"""Capture: the one file that knows torch.export.

The network is exported non-strictly on its example inputs, before
decomposition, with a `tag` operator behind every module's input and output.
What comes back is the project's own `Graph`. Nothing captured is trusted: the
caller runs the checks of engine/checks.py first.

What export would get wrong, and what is done here: tensors given twice as
example inputs are merged, so each is cloned; `autograd.Function` loses its
backward, so `apply` becomes one opaque operator; a `no_grad` block becomes a
wrapper operator, which is inlined with its outputs detached; operators that
change their argument are made functional; assertions, casts to the same type
and dropout in evaluation mode are dropped before anything gets a name.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.utils import _pytree as pytree

from patchclamp.core.errors import CaptureError
from patchclamp.engine.hooks import Point
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.mutation import make_functional
from patchclamp.engine.opaque import CALL, TAG, Application, opaque_functions, tag
from patchclamp.model.inputs import Call

_DROPPED = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
_SAME = frozenset({"to", "_to_copy", "contiguous", "clone", "alias", "lift_fresh_copy", "detach_"})
_SHORT = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_to_copy": "to",
    "_unsafe_view": "view",
    "scaled_dot_product_attention": "attention",
}


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A captured network, not yet checked.

    Attributes:
        graph: the network.
        dims: axes of every input tensor; a size that export fixed is an integer.
        functionalised: how in-place operators were removed ("", "rewritten", "retraced").
    """

    graph: Graph
    dims: tuple[tuple[int | str, ...], ...]
    functionalised: str


def capture(
    module: nn.Module,
    call: Call,
    dims: Sequence[tuple[int | str, ...]],
    points: Mapping[str, Point],
) -> Capture:
    """Export the module on `call` and rewrite the result as a `Graph`.

    Args:
        module: in evaluation mode; left as found.
        call: example call; sizes of varying axes should be 2 or more.
        dims: axes of every input tensor; named ones are left open where export allows.
        points: addresses of module values, for the tags.

    Raises:
        CaptureError: with the reason, where torch.export cannot follow the network.
    """
    if module.training:
        raise CaptureError(
            "the network is in training mode, where dropout and batch norm change between runs",
            hint="call module.eval() before opening it, or use engine='hooks'",
        )
    call = call.mapped([x.clone() for x in call.tensors()])
    shapes = ShapesCollection()
    for x, names in zip(call.tensors(), dims, strict=True):
        open_axes = {i: Dim.AUTO for i, d in enumerate(names) if isinstance(d, str)}
        if open_axes:
            shapes[x] = open_axes
    args, kwargs = call.args, call.keywords
    try:
        with _tags(module, points), opaque_functions() as applications, _quiet():
            program = export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            _inline_wrappers(program.graph_module)
            program, functionalised = make_functional(program)
            _inline_wrappers(program.graph_module)
            taken = list(applications)
    except CaptureError:
        raise
    except Exception as e:
        reason = re.sub(r"\s+", " ", str(e)).strip()
        raise CaptureError(
            f"torch.export does not follow {type(module).__name__}: "
            f"{type(e).__name__}: {reason[:300]}"
        ) from e
    return _Rewriter(program, points, taken, dims).capture(functionalised)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _tags(module: nn.Module, points: Mapping[str, Point]) -> Iterator[None]:
    """Hooks that pass every addressed module value through `tag`."""
    addresses = {point: address for address, point in points.items()}
    counts: Counter[str] = Counter()
    handles = []

    def mark(path: str, value: object, *, is_input: bool) -> object:
        leaves, spec = pytree.tree_flatten(value)
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        for leaf, at in enumerate(tensors[:1] if is_input else tensors):
            for called in (None, counts[path]):
                address = addresses.get(Point(path, called, leaf, is_input))
                if address is not None:
                    before, made = leaves[at], tag(leaves[at], address)
                    for i in tensors if is_input and path else (at,):  # see hooks._touch
                        if leaves[i] is before:
                            leaves[i] = made
                    break
        return pytree.tree_unflatten(leaves, spec)

    def install(path: str, child: nn.Module) -> None:
        def before(m: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            return mark(path, (args, kwargs), is_input=True)

        def after(m: nn.Module, args: object, kwargs: object, output: object) -> object:
            made = mark(path, output, is_input=False)
            counts[path] += 1
            return made

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))

    try:
        for path, child in module.named_modules():
            install(path, child)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inline_wrappers(gm: fx.GraphModule) -> None:
    """Replace `no_grad` and disabled-autocast wrappers by their contents."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("wrap_with"):
            continue
        name = str(node.target)
        if "autocast" in name and node.args[2] is not False:
            raise CaptureError("the network switches autocast on inside its forward pass")
        at = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, fx.Node)
            and a.op == "get_attr"
            and isinstance(getattr(gm, str(a.target), None), fx.GraphModule)
        )
        body = getattr(gm, str(node.args[at].target))
        _inline_wrappers(body)
        detach = "grad" in name and node.args[0] is False
        _inline(graph, node, body, node.args[at + 1 :], detach=detach)
    graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or _mutates(n) or _qualified(n) == TAG
    )
    gm.recompile()


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _inline(
    graph: fx.Graph,
    node: fx.Node,
    body: fx.GraphModule,
    args: Sequence[object],
    *,
    detach: bool,
) -> None:
    env: dict[fx.Node, object] = {}
    given = iter(args)
    outs: list[object] = []
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(given)
            elif inner.op == "output":
                outs = [env[x] for x in inner.args[0]]
            else:
                env[inner] = graph.node_copy(inner, lambda x: env[x])
        if detach:
            outs = [_detached(graph, x) for x in outs]
    for user in list(node.users):
        user.replace_all_uses_with(outs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(graph: fx.Graph, x: object) -> object:
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return x
    made = graph.call_function(torch.ops.aten.detach.default, (x,))
    made.meta = dict(x.meta)
    return made


class _Rewriter:
    """From an exported program to a `Graph`; used once."""

    def __init__(
        self,
        program: ExportedProgram,
        points: Mapping[str, Point],
        applications: Sequence[Application],
        dims: Sequence[tuple[int | str, ...]],
    ) -> None:
        self.program, self.points, self.applications = program, points, applications
        self.dims = dims
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.made: dict[fx.Node, Node] = {}
        self.nodes: list[Node] = []
        self.several = {p.module for p in points.values() if p.call is not None}

    def capture(self, functionalised: str) -> Capture:
        signature = self.program.graph_signature
        lifted = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        buffers = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        inputs: list[tuple[int | str, ...]] = []
        outputs: list[object] = []
        fixed = self.program.state_dict
        number = 0
        for n in self.program.graph.nodes:
            if n.op == "placeholder" and n.name in lifted:
                name = lifted[n.name]
                live = name in fixed or n.name in buffers
                constant = None if live and name in fixed else self.program.constants.get(name)
                self._add(
                    n,
                    Node(
                        Kind.CONST,
                        operation="const",
                        path="" if constant is not None else name,
                        constant=constant,
                    ),
                )
            elif n.op == "placeholder":
                value = n.meta.get("val")
                if isinstance(value, torch.Tensor):
                    inputs.append(self._learn(value, self.dims[number]))
                    self._add(n, Node(Kind.INPUT, operation="input", number=number))
                    number += 1
            elif n.op == "get_attr":
                held = getattr(self.program.graph_module, str(n.target))
                if isinstance(held, torch.Tensor):
                    self._add(n, Node(Kind.CONST, operation="const", constant=held))
            elif n.op == "call_function":
                self._operator(n)
            elif n.op == "output":
                outputs = [self._swap(x) for x in n.args[0]]
        self._name()
        self._refuse_state()
        graph = Graph(self.nodes, outputs, self.program.call_spec.out_spec)
        return Capture(graph=graph, dims=tuple(inputs), functionalised=functionalised)

    def _refuse_state(self) -> None:
        """A network that changes its own buffers or its inputs is refused."""
        signature = self.program.graph_signature
        changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        if changed:
            raise CaptureError(
                f"the forward pass changes '{next(iter(changed.values()))}' of the network "
                "or its inputs, so that one run depends on the last",
                hint="use engine='hooks'",
            )

    def _learn(self, value: torch.Tensor, names: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Symbols of an input's open axes; returns its axes with fixed sizes as integers."""
        dims: list[int | str] = []
        for size, name in zip(value.shape, names, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(name, str):
                expr = size.node.expr
                if isinstance(expr, sympy.Symbol):
                    self.symbols[expr] = sympy.Symbol(name, integer=True, positive=True)
                    dims.append(name)
                    continue
            dims.append(int(size))
        return tuple(dims)

    def _size(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, torch.SymInt):
            expr = size.node.expr.xreplace(self.symbols)
            return int(expr) if expr.is_Integer else str(expr).replace(" ", "")
        return int(size)

    def _swap(self, x: object) -> object:
        return self.made[x] if isinstance(x, fx.Node) else x

    def _arguments(self, n: fx.Node) -> tuple[tuple[object, ...], dict[str, object]]:
        args = fx.map_arg(n.args, lambda x: self.made[x])
        kwargs = fx.map_arg(n.kwargs, lambda x: self.made[x])
        plain = pytree.tree_map(_thaw, (args, kwargs))
        return plain[0], plain[1]

    def _add(self, n: fx.Node, node: Node) -> None:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.shape = tuple(self._size(s) for s in value.shape)
            node.dtype = value.dtype
        self.made[n] = node
        self.nodes.append(node)

    def _operator(self, n: fx.Node) -> None:
        name = operation(n)
        if name in _DROPPED:
            return
        if _is_same(n, name):
            self.made[n] = self.made[n.args[0]]
            return
        args, kwargs = self._arguments(n)
        module, call = module_of(n)
        if _qualified(n) == TAG:
            address = str(n.args[1])
            point = self.points[address]
            node = Node(
                Kind.TAG,
                address=address,
                operation="input" if point.is_input else "output",
                module=point.module,
                call=point.call or 0,
                args=args[:1],
            )
        else:
            target: Callable[..., object] = n.target
            if _qualified(n) == CALL:
                application = self.applications[int(n.args[1])]
                target, args = application, args[:1]
                name = application.function.__name__
            node = Node(
                Kind.OP,
                operation=name,
                module=module,
                call=call,
                target=target,
                args=args,
                kwargs=kwargs,
            )
        self._add(n, node)

    def _name(self) -> None:
        """Addresses for every operator's value: module, call, operation, number."""
        tensors = [n for n in self.nodes if n.kind is Kind.OP and n.shape is not None]
        totals = Counter((n.module, n.call, n.operation) for n in tensors)
        seen: Counter[tuple[str, int, str]] = Counter()
        for node in tensors:
            key = (node.module, node.call, node.operation)
            called = f"@{node.call}" if node.module in self.several else ""
            number = f"#{seen[key]}" if totals[key] > 1 else ""
            node.address = f"{node.module}{called}:{node.operation}{number}"
            seen[key] += 1
        taken = {n.address for n in self.nodes if n.kind is Kind.TAG}
        for node in tensors:  # an operator called "input" or "output" does not hide the module's
            if node.address in taken:
                node.address += "#op"


def _thaw(x: object) -> object:
    return list(x) if isinstance(x, fx.immutable_collections.immutable_list) else x


def _qualified(n: fx.Node) -> str:
    schema = getattr(n.target, "_schema", None)
    return schema.name if schema is not None else ""


def operation(n: fx.Node) -> str:
    """Short operator name: `softmax`, `linear`, `getitem`."""
    qualified = _qualified(n)
    raw = qualified.partition("::")[2] or getattr(n.target, "__name__", str(n.target))
    short = _SHORT.get(raw, raw)
    return short if short in _DROPPED else short.strip("_")


def _is_same(n: fx.Node, name: str) -> bool:
    """Whether the operator gives back its argument: a no-op cast, copy or dropout."""
    if not n.args or not isinstance(n.args[0], fx.Node):
        return False
    raw = _qualified(n).partition("::")[2]
    if raw in ("dropout", "feature_dropout", "alpha_dropout") and len(n.args) > 2:
        return n.args[2] is False
    x, y = n.args[0].meta.get("val"), n.meta.get("val")
    return (
        raw in _SAME
        and isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.dtype == y.dtype
        and x.device == y.device
    )


def module_of(n: fx.Node) -> tuple[str, int]:
    """Path of the innermost module an operator belongs to, and which call of it."""
    stack = n.meta.get("nn_module_stack") or {}
    if not stack:
        return "", 0
    key, (path, _) = list(stack.items())[-1]
    path = re.sub(r"^L(\['self'\]|__self__)\.?", "", path)
    called = re.search(r"@(\d+)$", key)
    return re.sub(r"@\d+$", "", path), int(called[1]) if called else 0

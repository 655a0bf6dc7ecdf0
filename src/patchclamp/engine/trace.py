"""One look at the live module: which modules run, how often, with values of which shape.

The forward pass is run on the example inputs, then once more with one more
example and once more with one more position; sizes that moved are symbolic.
A network that refuses another size simply has a fixed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from patchclamp.core.errors import InputError
from patchclamp.core.sites import Site
from patchclamp.engine.axes import channel_first, name_axes
from patchclamp.engine.hooks import HooksEngine, Point
from patchclamp.engine.protocol import EngineName
from patchclamp.model.inputs import BATCH, LENGTH, Call, InputSpec, grown, guess_dims

Shapes = dict[tuple[str, int, int, bool], tuple[tuple[int, ...], torch.dtype]]
"""(module path, call, leaf, is input) -> shape and dtype, in the order of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the look found.

    Attributes:
        engine: hooks on everything that was seen.
        spec: the form of the inputs.
        example: the example call.
        fixed: axes of the inputs that the network refuses to vary, with its own words.
    """

    engine: HooksEngine
    spec: InputSpec
    example: Call
    fixed: dict[str, str]


def trace(module: nn.Module, example: Call, axes: Sequence[tuple[int | str, ...]] | None) -> Trace:
    """Run the module on the example inputs and name what it computes.

    Args:
        module: left as found.
        example: the example call.
        axes: the user's names for the axes of every input tensor, where given.

    Raises:
        InputError: the module fails on its example inputs.
    """
    try:
        base = observe(module, example)
    except Exception as e:
        raise InputError(
            f"{type(module).__name__} fails on its example inputs: {type(e).__name__}: {e}",
            got=", ".join(f"{tuple(x.shape)} {x.dtype}" for x in example.tensors()) or "no tensors",
            hint="give inputs that the module's forward accepts as example_inputs=",
        ) from e
    dims = _given(axes, example) if axes is not None else guess_dims(example)
    moved: dict[str, Shapes] = {}
    fixed: dict[str, str] = {}
    for axis in (BATCH, LENGTH):
        if not any(axis in d for d in dims):
            continue
        try:
            moved[axis] = observe(module, grown(example, dims, axis))
        except Exception as e:
            fixed[axis] = f"{type(e).__name__}: {e}".splitlines()[0]
        if axis in fixed or moved[axis].keys() != base.keys():
            fixed.setdefault(axis, "another size runs other modules")
            moved.pop(axis, None)
            dims = _without(dims, axis, example)
    spec = InputSpec(structure=example.structure, dims=dims, ceiling=tuple(None for _ in dims))
    table, points = _sites(module, base, moved, _sizes(example, dims))
    engine = HooksEngine(module, table, points)
    return Trace(engine=engine, spec=spec, example=example, fixed=fixed)


def _given(
    axes: Sequence[tuple[int | str, ...]], example: Call
) -> tuple[tuple[int | str, ...], ...]:
    """The user's names for the axes, checked against the example inputs."""
    tensors = example.tensors()
    if [len(names) for names in axes] != [x.ndim for x in tensors]:
        raise InputError(
            "axes= must name every axis of every input tensor",
            got=str([tuple(names) for names in axes]),
            expected=f"names for shapes {', '.join(str(tuple(x.shape)) for x in tensors)}",
        )
    return tuple(tuple(names) for names in axes)


def observe(module: nn.Module, call: Call) -> Shapes:
    """Shapes of every module's first tensor input and tensor outputs in one forward pass."""
    seen: Shapes = {}
    counts: dict[str, int] = {}
    handles = []

    def note(path: str, value: object, *, is_input: bool) -> None:
        leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        for leaf, x in enumerate(leaves[:1] if is_input else leaves):
            seen[(path, counts.get(path, 0), leaf, is_input)] = (tuple(x.shape), x.dtype)

    def install(path: str, child: nn.Module) -> None:
        def before(m: nn.Module, args: object, kwargs: object) -> None:
            note(path, (args, kwargs), is_input=True)

        def after(m: nn.Module, args: object, kwargs: object, output: object) -> None:
            note(path, output, is_input=False)
            counts[path] = counts.get(path, 0) + 1

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))

    try:
        for path, child in module.named_modules():
            install(path, child)
        with torch.no_grad():
            module(*call.args, **call.keywords)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _without(
    dims: tuple[tuple[int | str, ...], ...], axis: str, call: Call
) -> tuple[tuple[int | str, ...], ...]:
    return tuple(
        tuple(n if d == axis else d for d, n in zip(names, x.shape, strict=True))
        for names, x in zip(dims, call.tensors(), strict=True)
    )


def _sizes(call: Call, dims: Sequence[tuple[int | str, ...]]) -> dict[str, int]:
    return {
        d: n
        for names, x in zip(dims, call.tensors(), strict=True)
        for d, n in zip(names, x.shape, strict=True)
        if isinstance(d, str)
    }


def _symbolic(
    shape: Sequence[int], grown_shapes: dict[str, Sequence[int]], sizes: dict[str, int]
) -> tuple[int | str, ...]:
    dims: list[int | str] = list(shape)
    for axis, larger in grown_shapes.items():
        if len(larger) != len(shape):
            continue
        for i, (old, new) in enumerate(zip(shape, larger, strict=True)):
            if new == old:
                continue
            step, constant = new - old, old - (new - old) * sizes[axis]
            text = axis if step == 1 else f"{step}*{axis}"
            dims[i] = text if constant == 0 else f"{text}{constant:+d}"
    return tuple(dims)


def _sites(
    module: nn.Module, base: Shapes, moved: dict[str, Shapes], sizes: dict[str, int]
) -> tuple[dict[str, Site], dict[str, Point]]:
    modules = dict(module.named_modules())
    num_calls: dict[str, int] = {}
    num_leaves: dict[tuple[str, int], int] = {}
    for path, call, leaf, is_input in base:
        if is_input:
            num_calls[path] = max(num_calls.get(path, 0), call + 1)
        else:
            num_calls[path] = max(num_calls.get(path, 0), call + 1)
            num_leaves[(path, call)] = max(num_leaves.get((path, call), 0), leaf + 1)
    table: dict[str, Site] = {}
    points: dict[str, Point] = {}
    for order, ((path, call, leaf, is_input), (shape, dtype)) in enumerate(base.items()):
        key = (path, call, leaf, is_input)
        symbolic = _symbolic(shape, {a: s[key][0] for a, s in moved.items()}, sizes)
        several = num_calls[path] > 1
        address = module_address(
            path,
            call=call if several else None,
            leaf=leaf if not is_input and num_leaves[(path, call)] > 1 else None,
            is_input=is_input,
        )
        own = modules[path]
        table[address] = Site(
            address=address,
            module=path,
            operation="input" if is_input else "output",
            axes=name_axes(symbolic, channels=channel_first(own) and len(shape) > 2),
            shape=symbolic,
            dtype=str(dtype).removeprefix("torch."),
            parameters=0 if is_input else sum(p.numel() for p in own.parameters()),
            engines=frozenset({str(EngineName.HOOKS)}),
            order=order,
        )
        points[address] = Point(path, call if several else None, leaf, is_input)
    return table, points


def module_address(path: str, *, call: int | None, leaf: int | None, is_input: bool) -> str:
    """The address of a module's value; see core/sites.py."""
    address = path if call is None else f"{path}@{call}"
    if is_input:
        return f"{address}:input"
    address = address if path else f"{address}:output"
    return address if leaf is None else f"{address}[{leaf}]"

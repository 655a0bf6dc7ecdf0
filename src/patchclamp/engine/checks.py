"""Capture is checked, never assumed: the graph against the live module.

On the example inputs (every shared site and the output), on other values, on
other sizes, and on a second call, which catches Python state that tracing
froze. A network that fails runs on the hooks engine and the report says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn

from patchclamp.core.errors import CaptureError, PatchclampError
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.hooks import HooksEngine
from patchclamp.model.inputs import BATCH, LENGTH, Call, grown, principal

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest value (at least 1)."""


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What the checks of one capture measured.

    Attributes:
        passed: all checks held.
        max_error: largest relative difference over outputs and shared sites.
        worst_site: where it was.
        num_sites: how many shared sites were compared.
        checks: the checks made, in words.
        reason: why it failed ("" where it passed).
    """

    passed: bool
    max_error: float
    worst_site: str
    num_sites: int
    checks: tuple[str, ...]
    reason: str = ""


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude (at least 1); inf for other shapes.

    Values that are equal count as equal also where they are infinite or NaN (masks hold them).
    """
    if got.shape != expected.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    a, b = got.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
    scale = max(1.0, float(torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().max()))
    worst = float(difference.max())
    return worst / scale if worst == worst else float("inf")


def check_capture(
    graph: GraphEngine, hooks: HooksEngine, module: nn.Module, example: Call
) -> CaptureReport:
    """Compare the graph with the live module; see the module docstring."""
    worst, where = 0.0, ""
    checks: list[str] = []
    num_sites = 0

    def failed(reason: str) -> CaptureReport:
        return CaptureReport(
            passed=False,
            max_error=worst,
            worst_site=where,
            num_sites=num_sites,
            checks=tuple(checks),
            reason=reason,
        )

    with torch.no_grad(), preserved(module):
        limit = TOLERANCE.get(_float_type(module), 1e-5)
        first = principal(module(*example.args, **example.keywords)).clone()
        again = principal(module(*example.args, **example.keywords))
        checks.append("second call")
        if relative_error(again, first) > limit:
            return failed(
                "two calls on the same inputs give different outputs: the network is random "
                "or keeps state between calls"
            )
        for name, call in _variants(example, graph.capture.dims, module):
            checks.append(name)
            try:
                got = principal(graph.run(call)[0])
            except (RuntimeError, PatchclampError) as e:
                return failed(f"on {name} the captured graph fails: {str(e).splitlines()[0]}")
            error = relative_error(got, principal(module(*call.args, **call.keywords)))
            if error > worst:
                worst, where = error, f"output on {name}"
            if error > limit:
                return failed(f"on {name} the output differs by {error:.1e} (limit {limit:.0e})")
        shared = [a for a in hooks.sites() if a in graph.sites()]
        num_sites = len(shared)
        checks.append("every shared site")
        _, live = hooks.run(example, record=shared)
        _, captured = graph.run(example, record=shared)
        for address in shared:
            error = relative_error(captured[address], live[address])
            if error > worst:
                worst, where = error, address
            if error > limit:
                return failed(f"site '{address}' differs by {error:.1e} (limit {limit:.0e})")
    return CaptureReport(
        passed=True, max_error=worst, worst_site=where, num_sites=num_sites, checks=tuple(checks)
    )


def _variants(
    example: Call, dims: tuple[tuple[int | str, ...], ...], module: nn.Module
) -> Iterator[tuple[str, Call]]:
    yield "the example inputs", example
    yield "other values", example.mapped([_other(x) for x in example.tensors()])
    for axis in (BATCH, LENGTH):
        if any(axis in d for d in dims):
            call = grown(example, dims, axis)
            try:
                module(*call.args, **call.keywords)
            except (IndexError, RuntimeError):  # the example is as long as the network can read
                call = _shorter(example, dims, axis)
            yield f"another {axis}", call


def _shorter(call: Call, dims: tuple[tuple[int | str, ...], ...], axis: str) -> Call:
    """The call with the last row of this axis left out."""
    return call.mapped(
        [
            x.narrow(d.index(axis), 0, max(1, x.shape[d.index(axis)] - 1)) if axis in d else x
            for x, d in zip(call.tensors(), dims, strict=True)
        ]
    )


def _other(x: torch.Tensor) -> torch.Tensor:
    """Other values of the same kind: moved along every axis; real numbers also changed a little."""
    if x.ndim == 0 or x.dtype is torch.bool:
        return x
    moved = x.flip(list(range(x.ndim)))
    return moved * 0.9 + 0.05 if x.is_floating_point() else moved


def _float_type(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What every module has: parameters, buffers, children and hooks, which are kept in other ways."""


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Leave buffers, modes, Python attributes and random state of the module as found.

    Attributes are kept by object; lists, dictionaries and sets also by what they hold.
    """
    modules = list(module.modules())
    buffers = [dict(m._buffers) for m in modules]
    values = {b: b.detach().clone() for held in buffers for b in held.values() if b is not None}
    attributes = [{k: v for k, v in vars(m).items() if k not in _OWN} for m in modules]
    contents = {
        id(v): (v, copy(v))
        for held in attributes
        for v in held.values()
        if type(v) in (list, dict, set)
    }
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for m, held, kept in zip(modules, buffers, attributes, strict=True):
                m._buffers.clear()
                m._buffers.update(held)
                for name in [k for k in vars(m) if k not in _OWN and k not in kept]:
                    del vars(m)[name]
                vars(m).update(kept)
            for v, inside in contents.values():
                if type(v) is list:
                    v[:] = inside
                else:
                    v.clear()
                    v.update(inside)
            with torch.no_grad():
                for b, value in values.items():
                    if not torch.equal(b, value):
                        b.copy_(value)


def require(report: CaptureReport, network: str) -> None:
    """Raise CaptureError with the report's reason, unless it passed."""
    if not report.passed:
        raise CaptureError(
            f"the captured graph of {network} failed its checks: {report.reason}",
            hint="use engine='hooks'",
        )

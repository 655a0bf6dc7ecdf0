"""Anatomy: the modules as a tree, their parameters, and where the compute goes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchclamp.audit.context import Context
from patchclamp.core.document import Cell, Column, Facts, Section, Table

_COLUMNS = (
    Column(name="depth", title="", role="depth"),
    Column(name="module", title="Module", role="address"),
    Column(name="kind", title="Kind"),
    Column(name="out", title="Output", role="address"),
    Column(name="parameters", title="Parameters", role="number"),
    Column(name="parameter_share", title="of all parameters", role="share"),
    Column(
        name="compute_share",
        title="of all compute",
        role="share",
        help="share of multiply-adds in one forward pass, as counted by operator",
    ),
)


def anatomy(ctx: Context) -> Section:
    """The tree of modules, with shares of parameters and compute."""
    net = ctx.net
    flops = compute_by_module(ctx)
    total = max(flops.get("", 0), 1)
    sites = net.quick_sites()
    rows: list[tuple[Cell, ...]] = []
    for path, module in net.module.named_modules():
        if not path:
            continue
        own = sum(p.numel() for p in module.parameters())
        address = next((a for a in (path, f"{path}[0]", f"{path}@0") if a in sites.sites), None)
        shape = sites[address].shape if address is not None else ()
        rows.append(
            (
                path.count("."),
                path,
                type(module).__name__,
                "×".join(map(str, shape)) if address is not None else "not called",
                own,
                own / max(net.num_parameters, 1),
                min(1.0, flops.get(path, 0) / total),
            )
        )
    rate = 2 * total
    facts = Facts(
        title="At a glance",
        items=(
            ("parameters", f"{net.num_parameters:,}"),
            ("modules", f"{len(rows):,}"),
            (
                "family",
                net.anatomy_family or "no adapter: raw addresses and attention by structure",
            ),
            ("compute of one example", f"{rate / example_rows(ctx) / 1e6:,.2f} MFLOP"),
            ("sites that are values of modules", f"{len(sites):,}"),
            ("standard names", f"{len(sites.aliases):,}"),
        ),
        note="; ".join(ctx.net.loaded.notes),
    )
    table = Table(
        title="Modules",
        columns=_COLUMNS,
        rows=tuple(rows),
        note="Compute counts matrix products, convolutions and attention; a module's share "
        "includes its children.",
    )
    return Section(
        id="anatomy",
        title="Anatomy",
        summary=f"{net.name} has {net.num_parameters:,} parameters in {len(rows)} modules. "
        "Each module is a site: its inputs, outputs and the operators inside can be recorded, "
        "edited and differentiated by these addresses.",
        blocks=(facts, table),
    )


def example_rows(ctx: Context) -> int:
    """Rows in the example call."""
    return max(1, ctx.net.example.tensors()[0].shape[0])


def compute_by_module(ctx: Context) -> dict[str, int]:
    """Multiply-adds of one forward pass on the example inputs by module path; "" is all."""
    net = ctx.net
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call = net.example
        net.module(*call.args, **call.keywords)
    root = type(net.module).__name__
    found: dict[str, int] = {}
    for name, by_operator in counter.get_flop_counts().items():
        path = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        found[path] = max(found.get(path, 0), sum(by_operator.values()) // 2)
    return found

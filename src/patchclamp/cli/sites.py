"""`patchclamp sites`: what can be recorded and edited in a network, and by which engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from patchclamp.cli.options import AllowPickle, AsJson, Switch
from patchclamp.cli.progress import watch
from patchclamp.cli.terminal import data, data_json, shown
from patchclamp.core.errors import SiteError

if TYPE_CHECKING:
    from patchclamp.core.findings import Json
    from patchclamp.core.sites import SiteTable, Tap
    from patchclamp.net import Net


def sites(
    model: str,
    pattern: str | None = None,
    *,
    engine: Literal["any", "hooks", "graph"] = "any",
    coverage: Switch = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Print the addresses that can be recorded and edited.

    Args:
        model: a name that `patchclamp models` lists, a folder or a file.
        pattern: a name or glob, such as 'resid_post.*'; the whole tree without it.
        engine: only sites that this engine reaches.
        coverage: say which sites each engine offers, and why others are missing.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print JSON.
    """
    import patchclamp

    with watch() as progress:
        net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
        table = _of_engine(net.sites, engine)
        taps = _found(table, pattern)
        report = net.coverage() if coverage else None
    if as_json:
        if report is not None:
            data_json(_coverage_json(net))
        else:
            data_json([_tap_json(tap, table) for tap in taps])
    elif report is not None:
        data(shown(str(report)))
    elif pattern is None:
        data(shown(str(table)))
    else:
        data("\n".join(shown(_line(tap)) for tap in taps))


def _of_engine(table: SiteTable, engine: str) -> SiteTable:
    from patchclamp.core.sites import SiteTable

    if engine == "any":
        return table
    kept = {address: site for address, site in table.sites.items() if engine in site.engines}
    aliases = {name: alias for name, alias in table.aliases.items() if alias.address in kept}
    absent = {
        name: f"the {engine} engine does not reach it"
        for name in [*table.sites, *table.aliases]
        if name not in kept and name not in aliases
    }
    if not kept:
        raise SiteError(
            f"the {engine} engine reaches no site of {table.network}",
            hint="patchclamp sites MODEL --coverage says why",
        )
    return SiteTable(table.network, kept, aliases, {**table.missing, **absent})


def _found(table: SiteTable, pattern: str | None) -> list[Tap]:
    """Taps of the pattern; without one, all aliases and then all addresses."""
    if pattern is not None:
        return table.find(pattern)
    return [table[name] for name in [*table.aliases, *table.sites]]


def _line(tap: Tap) -> str:
    dims = ", ".join(a if a == s else f"{a}={s}" for a, s in zip(tap.axes, tap.shape, strict=True))
    raw = "" if tap.label == tap.site.address else f"  = {tap.site.address}"
    return f"{tap.label}  ({dims}) {tap.site.dtype}  [{', '.join(sorted(tap.site.engines))}]{raw}"


def _tap_json(tap: Tap, table: SiteTable) -> dict[str, Json]:
    return {
        "name": tap.label,
        "address": tap.site.address,
        "aliases": list(table.aliases_of(tap.site.address)),
        "module": tap.site.module,
        "operation": tap.site.operation,
        "axes": list(tap.axes),
        "shape": list(tap.shape),
        "dtype": tap.site.dtype,
        "parameters": tap.site.parameters,
        "engines": [*sorted(tap.site.engines)],
    }


def _coverage_json(net: Net) -> dict[str, Json]:
    report = net.coverage()
    check = report.check
    return {
        "network": report.network,
        "hooks_sites": len(report.hooks),
        "graph_sites": len(report.graph),
        "graph_error": None if report.error is None else str(report.error),
        "graph_checks": None if check is None else list(check.checks),
        "graph_max_error": None if check is None else check.max_error,
        "fixed_axes": dict(report.fixed),
        "missing": dict(report.missing),
    }

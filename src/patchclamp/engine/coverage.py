"""The coverage report: which sites each engine offers for a network, and why others are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from patchclamp.core.errors import CaptureError
from patchclamp.core.progress import Progress
from patchclamp.core.sites import Site
from patchclamp.engine.checks import CaptureReport
from patchclamp.engine.protocol import EngineName
from patchclamp.engine.rig import Rig


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What each engine offers. Prints as text.

    Attributes:
        network: its name.
        hooks, graph: sites of each engine.
        error: why there is no graph engine; None where there is one.
        check: what the checks of the capture measured; None where none was made.
        missing: standard names or sites that this network lacks, and why.
        fixed: axes of the inputs that cannot vary, and why.
    """

    network: str
    hooks: tuple[Site, ...]
    graph: tuple[Site, ...]
    error: CaptureError | None
    check: CaptureReport | None
    missing: Mapping[str, str]
    fixed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [self.network, f"  hooks engine: {len(self.hooks)} sites (ground truth)"]
        if self.error is None:
            lines.append(f"  graph engine: {len(self.graph)} sites")
        else:
            lines.append(f"  graph engine: not available: {self.error}")
        if self.check is not None:
            lines.append(
                f"    checked on {', '.join(self.check.checks)}: largest relative difference "
                f"{self.check.max_error:.1e} over {self.check.num_sites} shared sites"
            )
        lines += [f"  {axis} is fixed: {why}" for axis, why in self.fixed.items()]
        lines += [f"  missing {name}: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)


def coverage(rig: Rig, progress: Progress) -> Coverage:
    """The report of a network; captures it if that was not done yet."""
    error = rig.capture_error(progress)
    table = rig.full_table(progress)
    fixed = dict(rig.trace.fixed)
    if error is None:
        captured = rig.graph(rig.trace.example, progress).capture.dims
        for names, sizes in zip(rig.trace.spec.dims, captured, strict=True):
            for name, size in zip(names, sizes, strict=True):
                if isinstance(name, str) and isinstance(size, int):
                    fixed.setdefault(name, f"{size} in the graph engine: export could not vary it")
    return Coverage(
        network=rig.network,
        hooks=tuple(s for s in table if str(EngineName.HOOKS) in s.engines),
        graph=tuple(s for s in table if str(EngineName.GRAPH) in s.engines),
        error=error,
        check=rig.report(rig.trace.example),
        missing=table.missing,
        fixed=fixed,
    )

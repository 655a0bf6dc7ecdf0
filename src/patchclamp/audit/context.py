"""What every section of an audit is given, and how findings get their record."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata

from patchclamp.audit.budget import Budget
from patchclamp.core.document import Section
from patchclamp.core.findings import Finding, Record
from patchclamp.core.progress import Progress
from patchclamp.methods.material import Material, Score
from patchclamp.methods.neurons.ablation import AblationResult
from patchclamp.methods.neurons.activity import SiteActivity
from patchclamp.net import Net


@dataclass
class Context:
    """One audit in progress.

    Attributes:
        net, material, score: what is measured, on what, by what.
        budget: time left and what was left out.
        activities: filled by the activity section, read by later ones.
        ablated: filled by the ablation section, read by the bounds.
    """

    net: Net
    material: Material
    score: Score
    budget: Budget
    progress: Progress
    seed: int
    command: str
    model_hash: str
    activities: list[SiteActivity] = field(default_factory=list)
    ablated: AblationResult | None = None

    @property
    def over(self) -> str:
        """The set that findings range over, in words."""
        return f"{self.material.num} rows of {self.material.name}"

    def signed(self, finding: Finding) -> Finding:
        """The finding with command, model hash and versions in its record."""
        record: Record = replace(
            finding.record,
            command=self.command,
            model_hash=finding.record.model_hash or self.model_hash,
            versions=versions(),
            seed=self.seed if finding.record.seed is None else finding.record.seed,
        )
        return replace(finding, record=record)


SectionMaker = Callable[[Context], Section | None]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("patchclamp", "torch", "numpy")},
    }


def listed(names: Sequence[str], most: int = 6) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

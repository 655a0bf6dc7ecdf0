"""An audit in progress, for tests of its sections."""

from __future__ import annotations

from patchclamp.audit.budget import Budget
from patchclamp.audit.context import Context
from patchclamp.audit.intake import intake
from patchclamp.core.progress import SILENT
from patchclamp.data import Dataset
from patchclamp.methods.material import score_for
from patchclamp.net import Net


def context(net: Net, data: Dataset | None, seconds: float, *, length: int = 8) -> Context:
    """Of a network on data (bundled data that fits, where there is none)."""
    material = intake(net, data, length=length)
    return Context(
        net=net,
        material=material,
        score=score_for(net, material),
        budget=Budget(seconds),
        progress=SILENT,
        seed=0,
        command="made by a test",
        model_hash=net.hash,
    )

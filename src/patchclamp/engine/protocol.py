"""What every engine can do: run a call, hand back some values, change some on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol, TypeAlias

import torch

from patchclamp.core.sites import Site
from patchclamp.model.inputs import Call

Transform: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class EngineName(StrEnum):
    """Which engine runs a request. `AUTO` takes hooks where every site is a module's value."""

    AUTO = "auto"
    HOOKS = "hooks"
    GRAPH = "graph"


class Engine(Protocol):
    """One way to run a network.

    `run` returns the raw output (None unless asked for) and the recorded raw values by
    address. A value that is both transformed and recorded is recorded as transformed.
    Recorded values are never changed by what runs after them. Without `output` the
    run stops as soon as everything recorded is there. Gradients flow if the caller
    has them enabled.
    """

    name: EngineName

    def sites(self) -> Mapping[str, Site]:
        """What this engine can reach, by address, in the order of the forward pass."""
        ...

    def run(
        self,
        call: Call,
        *,
        record: Sequence[str] = (),
        transforms: Mapping[str, Transform] | None = None,
        output: bool = True,
    ) -> tuple[object, dict[str, torch.Tensor]]:
        """One forward pass; see the class."""
        ...

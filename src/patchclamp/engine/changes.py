"""From edits to transforms: one function for each raw value that is changed.

Edits on the same raw value apply in the order they were listed, also when they
name it through different aliases (`attn.3.q` and the projection behind it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from patchclamp.core.edits import Edit, Frame
from patchclamp.core.sites import Tap
from patchclamp.engine.protocol import Transform

Window = Callable[[], int]
"""While generating with a cache: how many positions came before this call."""


def transforms(
    edits: Sequence[tuple[Edit, Tap]], window: Window | None = None
) -> dict[str, Transform]:
    """One transform for each raw address that is edited."""
    grouped: dict[str, list[tuple[Edit, Tap]]] = {}
    for edit, tap in edits:
        grouped.setdefault(tap.site.address, []).append((edit, tap))
    return {address: _transform(listed, window) for address, listed in grouped.items()}


def _transform(listed: Sequence[tuple[Edit, Tap]], window: Window | None) -> Transform:
    def change(raw: torch.Tensor) -> torch.Tensor:
        for edit, tap in listed:
            part = tap.view.read(raw)
            frame = Frame(
                label=tap.label,
                axes=tap.axes,
                offset=window() if window is not None else 0,
                windowed=window is not None,
            )
            raw = tap.view.write(raw, edit.apply(part, frame))
        return raw

    return change

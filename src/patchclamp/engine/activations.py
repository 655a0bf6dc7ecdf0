"""Recorded values with their axes named: a mapping from site to labelled array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from patchclamp.core.errors import SiteError, nearest
from patchclamp.core.sites import Tap

if TYPE_CHECKING:
    import xarray


class Activations(Mapping[str, "xarray.DataArray"]):
    """Values by the name they were asked for: `acts["resid_post.5"]`.

    Indexing gives an `xarray.DataArray` with the site's axes as dimensions, sharing
    memory with the tensor; `tensor(name)` gives the torch tensor, with its gradient
    history where there is one. bfloat16, which numpy lacks, is shown as float32
    (exactly), with the stored type in `attrs["dtype"]`.
    """

    def __init__(self, taps: Sequence[Tap], tensors: Mapping[str, torch.Tensor]) -> None:
        self._taps = {tap.label: tap for tap in taps}
        self._tensors = dict(tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """The torch tensor recorded under this name."""
        if name not in self._tensors:
            raise SiteError(
                f"'{name}' was not recorded",
                expected=f"one of {', '.join(list(self._tensors)[:8])}",
                nearest=nearest(name, self._tensors),
            )
        return self._tensors[name]

    def axes(self, name: str) -> tuple[str, ...]:
        """Axis names of a recorded value."""
        self.tensor(name)
        return self._taps[name].axes

    def __getitem__(self, name: str) -> xarray.DataArray:
        import xarray

        tensor, tap = self.tensor(name).detach().cpu(), self._taps[name]
        stored = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype is torch.bfloat16:
            tensor = tensor.float()
        return xarray.DataArray(
            tensor.numpy(),
            dims=tap.axes,
            name=name,
            attrs={"site": tap.site.address, "dtype": stored},
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        lines = [f"{n}: {dict(zip(self.axes(n), t.shape, strict=True))}" for n, t in self.tensors()]
        return "\n".join([f"{len(self)} recorded sites", *lines])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Pairs of name and torch tensor."""
        return iter(self._tensors.items())


def joined(parts: Sequence[Activations], taps: Sequence[Tap]) -> Activations:
    """Several batches in a row, along each value's batch axis.

    Raises:
        SiteError: a value has no batch axis, so batches cannot be joined.
    """
    if len(parts) == 1:
        return parts[0]
    made = {}
    for tap in taps:
        if "batch" not in tap.axes:
            raise SiteError(
                f"site '{tap.label}' has no batch axis and cannot be recorded in batches",
                hint="record it without batch_size",
            )
        made[tap.label] = torch.cat([p.tensor(tap.label) for p in parts], tap.axes.index("batch"))
    return Activations(taps, made)

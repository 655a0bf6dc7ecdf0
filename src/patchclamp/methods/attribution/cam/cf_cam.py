"""CF-CAM: channels are clustered by what they show, and gradients filtered inside clusters.

Source: He, Pan and Yao 2025, arXiv 2504.00060.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.attribution.cam.grad_cam import GradientActivationMap
from patchclamp.methods.attribution.cam.layers import Seen

NOISE = -1
"""The label of what belongs to no cluster."""


@dataclass(frozen=True, kw_only=True)
class CFCAM(GradientActivationMap):
    """Gradient times value of a layer, after clustering channels and filtering their gradients.

    As the abstract has it: channels are grouped by density (DBSCAN) and those in no group are
    discarded as noise; inside a group gradients go through Gaussian filters; weights are
    hierarchical, to keep what is discriminative. What it leaves open is decided here so:

    - Top of the hierarchy: the `dominant` share of channels, those with the largest
      |sum of gradient times value|, keep their gradient unfiltered and weigh 1, whether or not
      they lie in a group.
    - All other channels are clustered by the cosine distance between their maps, which says
      where they fire and not how strongly; a map that is 0 is noise.
    - Inside a cluster a gradient becomes a mean over the cluster's channels, weighted by a
      Gaussian of the distance between their maps (width `radius`), then a mean over nearby
      places, weighted by a Gaussian of their distance (width `sigma`) and by one of the
      difference between the cluster's mean map there, as a share of its range (width `edge`):
      so it is not smeared across the edges of what the cluster shows.
    - A cluster weighs as much as its channels contribute on average, relative to the dominant
      ones (to the strongest cluster where there are none), at most 1.
    - The map is the sum over channels of weight times filtered gradient times value, place by
      place, since the mean of a gradient would hardly notice a spatial filter.

    Attributes:
        dominant: share of channels that are kept as they are.
        radius: of a neighbourhood, in cosine distance (0 to 2).
        min_channels: in a neighbourhood, itself included, that make it dense.
        sigma: of the filter in space, in places of the layer; 0 for none.
        edge: of the filter in the cluster's map, as a share of its range.

    Shapes: inputs (num, *feature); values (num, *space) at the input's resolution.
    Units: of the target per place, down-weighted.
    Randomness: none.
    Cost: one forward pass an example and a backward pass down to the layer only; channels^2
        numbers of memory an example.
    Raises: SiteError for a layer without spatial axes.
    Fails when: `radius` is too small (all is noise, and only dominant channels are left) or
        too large (one cluster, whose mean blurs what its channels say).
    Source: He, Pan and Yao 2025, arXiv 2504.00060, abstract.
    """

    name: ClassVar[str] = "cf_cam"
    source: ClassVar[str] = "He, Pan and Yao 2025, arXiv 2504.00060"
    dominant: float = 0.1
    radius: float = 0.3
    min_channels: int = 3
    sigma: float = 1.0
    edge: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.dominant <= 1:
            raise OptionError("dominant must be a share of channels", got=str(self.dominant))
        if self.min_channels < 1:
            raise OptionError("min_channels must be at least 1", got=str(self.min_channels))
        if self.radius <= 0 or self.edge <= 0 or self.sigma < 0:
            raise OptionError(
                "radius and edge must be above 0, sigma 0 or more",
                got=f"radius={self.radius}, edge={self.edge}, sigma={self.sigma}",
            )

    def _combined(self, seen: Seen) -> Tensor:
        pairs = zip(seen.values, seen.grads, strict=True)
        return torch.stack([self._one(values, grads) for values, grads in pairs])

    def _one(self, values: Tensor, grads: Tensor) -> Tensor:
        """The map of one example: (channel, *space) twice to (*space)."""
        strength = (values * grads).flatten(1).sum(1).abs()
        num_dominant = round(self.dominant * len(values))
        order = strength.argsort(descending=True, stable=True)
        top, rest = order[:num_dominant], order[num_dominant:].sort().values
        made = (values[top] * grads[top]).sum(0)
        if not len(rest):
            return made
        distances = cosine_distances(values[rest].flatten(1))
        labels = dbscan(distances, self.radius, self.min_channels)
        labels[values[rest].flatten(1).abs().amax(1) == 0] = NOISE
        clusters = [(labels == k).nonzero()[:, 0] for k in labels.unique() if k != NOISE]
        if not clusters:
            return made
        means = torch.stack([strength[rest[members]].mean() for members in clusters])
        above = strength[top].mean() if num_dominant else means.max()
        if above <= 0:  # no channel contributes to first order
            return made
        for members, weight in zip(clusters, (means / above).clamp(max=1), strict=True):
            part, near = values[rest[members]], distances[members][:, members]
            made = made + weight * (part * self._filtered(part, grads[rest[members]], near)).sum(0)
        return made

    def _filtered(self, values: Tensor, grads: Tensor, distances: Tensor) -> Tensor:
        """Gradients of one cluster after both filters: (channel, *space)."""
        alike = torch.exp(-((distances / self.radius) ** 2) / 2)
        alike = alike / alike.sum(1, keepdim=True)
        mixed = alike @ grads.flatten(1)
        if self.sigma > 0:
            mixed = mixed @ _spatial_filter(values.mean(0), self.sigma, self.edge).T
        return mixed.reshape(grads.shape)


def _spatial_filter(guide: Tensor, sigma: float, edge: float) -> Tensor:
    """Weights (place, place) that add up to 1 for each place, near in space and in the guide."""
    grids = torch.meshgrid(*(torch.arange(n) for n in guide.shape), indexing="ij")
    places = torch.stack([g.flatten() for g in grids], 1).to(guide)
    far = torch.cdist(places, places) / sigma
    level = guide.flatten()
    span = level.max() - level.min()
    apart = (level[:, None] - level[None]) / (span if span > 0 else 1) / edge
    near = torch.exp(-(far**2 + apart**2) / 2)
    weights: Tensor = near / near.sum(1, keepdim=True)
    return weights


def cosine_distances(x: Tensor) -> Tensor:
    """1 - cosine between rows, 0 to 2: (n, feature) to (n, n); 1 where a row is 0."""
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    distances: Tensor = (1 - unit @ unit.T).clamp(min=0)
    distances.fill_diagonal_(0)
    return distances


def dbscan(distances: Tensor, radius: float, min_points: int) -> Tensor:
    """Clusters of density (Ester et al. 1996), numbered by their first core point: (n,) int64.

    A core point has `min_points` within `radius`, itself included; clusters are the connected
    cores with all points within `radius` of them. A point near two clusters goes to the one
    with the lower number, and one near none is `NOISE`.

    Shapes: distances (n, n), symmetric.
    """
    near = distances <= radius
    core = near.sum(1) >= min_points
    labels = torch.full((len(near),), NOISE, dtype=torch.long)
    number = 0
    for start in core.nonzero()[:, 0].tolist():
        if labels[start] != NOISE:
            continue
        reached = torch.zeros(len(near), dtype=torch.bool)
        reached[start] = True
        frontier = reached
        while bool(frontier.any()):
            grown = near[frontier].any(0) & core & ~reached
            reached, frontier = reached | grown, grown
        inside = near[reached].any(0) & (labels == NOISE)
        labels[inside] = number
        number += 1
    return labels

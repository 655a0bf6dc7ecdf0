"""Grad-CAM and its two successors: a layer's maps, weighted by the gradients of the score.

Sources: Selvaraju et al. 2017; Chattopadhyay et al. 2018; Omeiza et al. 2019.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.cam.layers import Layer, Seen, paced
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.scoring import INPUT, Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class ActivationMap(Explainer):
    """Base of the maps that are made of one layer.

    Attributes:
        relu: keep only evidence for the score; without it, evidence against is negative.
        coarse: leave the map at the layer's resolution.
        batch_size: examples run together at most; fewer where that is faster.
    """

    needs_space: ClassVar[bool] = True
    relu: bool = True
    coarse: bool = False
    batch_size: int = 32

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """See `Explainer.run`."""
        layer = Layer.of(net, inputs, target, at=at)
        maps, scores = self._maps(layer, progress)
        maps = maps.relu() if self.relu else maps
        return Attribution(
            method=self.name,
            options=self.options(),
            site=layer.tap.label,
            axes=("batch", *layer.space),
            values=maps if self.coarse else layer.upsampled(maps),
            scores=scores,
            passes=layer.passes,
        )

    @abstractmethod
    def _maps(self, layer: Layer, progress: Progress) -> tuple[Tensor, Tensor]:
        """Maps (num, *space) before the ReLU, and scores (num,)."""


@dataclass(frozen=True, kw_only=True)
class GradientActivationMap(ActivationMap):
    """Base of the maps that need one gradient of each example."""

    def _maps(self, layer: Layer, progress: Progress) -> tuple[Tensor, Tensor]:
        maps, scores = [], []
        progress.start(self.name, layer.num, "examples")
        for at in paced(layer.num, self.batch_size):
            seen = layer.gradients(torch.arange(at.start, at.stop))
            maps.append(self._combined(seen))
            scores.append(seen.scores)
            progress.advance(at.stop - at.start)
        progress.finish()
        return torch.cat(maps), torch.cat(scores)

    @abstractmethod
    def _combined(self, seen: Seen) -> Tensor:
        """One map of each row: (n, *space)."""


@dataclass(frozen=True, kw_only=True)
class GradCAM(GradientActivationMap):
    """A layer's maps, each weighted by the mean of its gradient.

    Shapes: inputs (num, *feature); values (num, *space) at the input's resolution.
    Units: of the target per place of the layer; coarse and without the ReLU, places add up to
        the score less the head's bias where the head is linear in the layer's means.
    Randomness: none.
    Cost: one forward pass an example and a backward pass down to the layer only.
    Raises: SiteError for a layer without spatial axes.
    Fails when: the layer's gradient changes sign from place to place (a flattening head), so
        that its mean says little; all evidence at the layer is against the class, and the map
        is 0; the thing is smaller than one place of the layer.
    Source: Selvaraju et al. 2017, arXiv 1610.02391, eq. 1 and 2.
    """

    name: ClassVar[str] = "grad_cam"
    source: ClassVar[str] = "Selvaraju et al. 2017, arXiv 1610.02391"

    def _combined(self, seen: Seen) -> Tensor:
        weights = seen.grads.flatten(2).mean(2)
        return weighted(seen.values, weights)


@dataclass(frozen=True, kw_only=True)
class GradCAMPlusPlus(GradientActivationMap):
    """Grad-CAM whose means favour places that few others of their map help along.

    The weight of a channel is the sum over its places of alpha * relu(gradient), alpha =
    g^2 / (2 g^2 + g^3 * sum of the map), with the score taken through an exponential as in
    the paper; its positive factor exp(score) is left out, since it overflows and only scales.

    Shapes, randomness, cost, raises: as `GradCAM`.
    Units: arbitrary: maps of one example compare, those of two examples do not.
    Fails when: as `GradCAM`. The paper's maps come after a ReLU; of maps that may be negative
        only the positive part enters alpha, so that alpha stays between 0 and 1/2.
    Source: Chattopadhyay et al. 2018, arXiv 1710.11063, eq. 19.
    """

    name: ClassVar[str] = "grad_cam_plus_plus"
    source: ClassVar[str] = "Chattopadhyay et al. 2018, arXiv 1710.11063"

    def _combined(self, seen: Seen) -> Tensor:
        g = seen.grads
        return weighted(seen.values, plus_plus_weights(seen.values, g, g**2, g**3))


@dataclass(frozen=True, kw_only=True)
class SmoothGradCAMPlusPlus(ActivationMap):
    """Grad-CAM++ with its three derivatives averaged over noisy copies of the input.

    The maps that are weighted are those of the input as it is. Places that `neurons` leaves
    out give no gradient to the weights and are 0 in the map; likewise channels that
    `feature_maps` leaves out.

    Attributes:
        num_samples: noisy copies of each example.
        noise: their standard deviation, as a share of the example's range.
        feature_maps: channels that are looked at; all by default.
        neurons: places of the layer's map that are looked at, such as ((0, 3), (1, 3));
            all by default.
        seed: of the noise, which depends on it, the example and the sample's number only.

    Shapes, raises: as `GradCAM`.
    Units: as `GradCAMPlusPlus`.
    Randomness: seeded; the same at every batch size.
    Cost: num_samples times that of `GradCAM`, and two forward passes.
    Fails when: the noise moves the input off the data, and the slopes there are not those here.
        Where the score is linear in the layer (the last one before a mean-pooled linear head)
        its slopes do not depend on the input, and the map is that of `GradCAMPlusPlus`: give
        an earlier layer.
    Source: Omeiza et al. 2019, arXiv 1908.01224, eq. 9 to 12.
    """

    name: ClassVar[str] = "smooth_grad_cam_plus_plus"
    source: ClassVar[str] = "Omeiza et al. 2019, arXiv 1908.01224"
    num_samples: int = 8
    noise: float = 0.15
    feature_maps: tuple[int, ...] | None = None
    neurons: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise OptionError("num_samples must be at least 1", got=str(self.num_samples))
        if not 0 <= self.noise < float("inf"):
            raise OptionError("noise must be a share of the range, 0 or more", got=str(self.noise))

    def _maps(self, layer: Layer, progress: Progress) -> tuple[Tensor, Tensor]:
        scorer = Scorer.of(layer.net, layer.call, layer.target, at=INPUT)
        found, flat = keys(scorer), scorer.value.flatten(1)
        spread = (flat.amax(1) - flat.amin(1)) * self.noise

        def noisy(row: int, sample: int) -> Tensor:
            drawn = torch.randn(
                scorer.value.shape[1:], generator=generator(found[row], self.seed, sample)
            )
            return scorer.value[row] + spread[row] * drawn.to(flat)

        values, scores = layer.plain(self.batch_size)
        kept = self._kept(values)
        rows = torch.arange(layer.num).repeat_interleave(self.num_samples)
        powers = [torch.zeros_like(values) for _ in range(3)]
        progress.start(self.name, len(rows), "noisy copies")
        for at in paced(len(rows), self.batch_size):
            index = rows[at]
            samples = torch.arange(at.start, at.stop) % self.num_samples
            pairs = zip(index.tolist(), samples.tolist(), strict=True)
            x = torch.stack([noisy(row, sample) for row, sample in pairs])
            grads = layer.gradients(index, x).grads
            for power, total in enumerate(powers, 1):
                total.index_add_(0, index, grads**power / self.num_samples)
            progress.advance(len(index))
        progress.finish()
        weights = plus_plus_weights(values, *(total * kept for total in powers))
        return weighted(values * kept, weights), scores

    def _kept(self, values: Tensor) -> Tensor:
        """1 for neurons that are looked at, else 0: (channel, *space)."""
        kept = torch.ones(values.shape[1:], dtype=values.dtype, device=values.device)
        if self.feature_maps is not None:
            _check(self.feature_maps, len(kept), "feature_maps")
            some = torch.zeros_like(kept)
            some[list(self.feature_maps)] = 1
            kept = some
        if self.neurons is not None:
            places = torch.zeros_like(kept[0])
            for place in self.neurons:
                if len(place) != places.ndim:
                    raise OptionError(
                        "a neuron is given by its place along the layer's spatial axes",
                        got=str(place),
                        expected=f"{places.ndim} numbers",
                    )
                for i, size in zip(place, places.shape, strict=True):
                    _check((i,), size, "neurons")
                places[tuple(place)] = 1
            kept = kept * places
        if not bool(kept.any()):
            raise OptionError("no feature map or no neuron is left to look at")
        return kept


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over channels: (n, channel, *space) and (n, channel) to (n, *space)."""
    return torch.einsum("nc...,nc->n...", values, weights)


def plus_plus_weights(values: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Weights of Grad-CAM++ from three derivatives: (n, channel, *space) to (n, channel)."""
    total = values.relu().flatten(2).sum(2)
    total = total.reshape(*total.shape, *(1 for _ in values.shape[2:]))
    # A negative third derivative goes with a first one that the ReLU below drops, or, after
    # averaging, nearly so: alpha is kept between 0 and 1/2 by leaving it out.
    below = 2 * second + total * third.relu()
    alpha = torch.where(second > 0, second / below.where(second > 0, torch.ones_like(below)), 0)
    return (alpha * first.relu()).flatten(2).sum(2)


def _check(numbers: Sequence[int], size: int, name: str) -> None:
    wrong = [i for i in numbers if not 0 <= i < size]
    if wrong:
        raise OptionError(
            f"{name} names {wrong[0]}, which the layer lacks", expected=f"0 to {size - 1}"
        )

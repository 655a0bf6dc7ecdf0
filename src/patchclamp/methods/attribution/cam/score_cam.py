"""Score-CAM: a layer's maps, each weighted by the score of the input seen through that map.

Source: Wang et al. 2020, arXiv 1910.01279.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError, SiteError
from patchclamp.core.progress import Progress
from patchclamp.methods.attribution.cam.grad_cam import ActivationMap, weighted
from patchclamp.methods.attribution.cam.layers import Layer, resized
from patchclamp.methods.scoring import INPUT, Scorer


@dataclass(frozen=True, kw_only=True)
class ScoreCAM(ActivationMap):
    """A layer's maps, weighted by a softmax of the scores of the input multiplied by each map.

    Each map is laid over the input and stretched to 0..1; a map that is the same everywhere
    masks nothing and gets no weight. No gradient is used.

    Attributes:
        baseline: what the input becomes where a map is 0.
        num_maps: look only at this many maps of each example, those that vary most (Li et
            al. 2020 do the same); all by default.

    Shapes: inputs (num, *feature); values (num, *space) at the input's resolution.
    Units: of the layer's values: a weighted mean of them.
    Randomness: none.
    Cost: one forward pass for each example and map.
    Raises: SiteError for a layer without spatial axes, or with others than the input's;
        InputError where all maps of an example are flat.
    Fails when: the scores differ little, and the softmax weighs all maps alike, or much (large
        logits), and it takes a single one; an input in which soft edges are already unusual.
    Source: Wang et al. 2020, arXiv 1910.01279, algorithm 1.
    """

    name: ClassVar[str] = "score_cam"
    source: ClassVar[str] = "Wang et al. 2020, arXiv 1910.01279"
    baseline: float = 0.0
    num_maps: int | None = None

    def __post_init__(self) -> None:
        if self.num_maps is not None and self.num_maps < 1:
            raise OptionError("num_maps must be at least 1", got=str(self.num_maps))

    def _maps(self, layer: Layer, progress: Progress) -> tuple[Tensor, Tensor]:
        if layer.size is None:
            raise SiteError(
                f"Score-CAM lays maps over the input, which '{layer.tap.label}' does not fit",
                got=f"axes {', '.join(layer.space)} at the site, others at the input",
            )
        scorer = Scorer.of(layer.net, layer.call, layer.target, at=INPUT)
        values, _ = layer.plain(self.batch_size)
        chosen = _most_varied(values, self.num_maps)
        # One row is one example seen through one of its maps.
        example, place = chosen.nonzero(as_tuple=True)
        progress.start(self.name, len(example), "masked inputs")

        def masked(at: slice) -> Tensor:
            rows = example[at]
            masks = _stretched(resized(values[rows, place[at]][:, None], _size(layer)))
            x = scorer.value[rows]
            masks = _broadcast(masks[:, 0], scorer.axes, layer.space)
            progress.advance(len(rows))
            return masks * x + (1 - masks) * self.baseline

        seen = scorer.scores(masked, example)
        progress.finish()
        layer.passes.forwards += scorer.passes.forwards + scorer.num
        scores = seen.new_full(chosen.shape, -torch.inf)
        scores[example, place] = seen
        return weighted(values, scores.softmax(1).to(values.dtype)), scorer.plain


def _size(layer: Layer) -> tuple[int, ...]:
    return layer.size or ()


def _most_varied(values: Tensor, num: int | None) -> Tensor:
    """Which maps (num, channel) of each example are looked at: not flat, and most varied."""
    flat = values.flatten(2)
    chosen = flat.amax(2) > flat.amin(2)
    empty = ~chosen.any(1)
    if bool(empty.any()):
        raise InputError(
            f"all maps of example {int(empty.nonzero()[0])} are the same everywhere",
            hint="another layer, or drop the row",
        )
    if num is not None and num < values.shape[1]:
        best = flat.var(2).topk(num, dim=1).indices
        chosen &= torch.zeros_like(chosen).scatter(1, best, torch.ones_like(chosen))
    return chosen


def _stretched(maps: Tensor) -> Tensor:
    """Each map (n, 1, *space) from 0 to 1; interpolation may leave a flat one, which is 0."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, torch.ones_like(high))
    return ((flat - low) / span).reshape(maps.shape)


def _broadcast(maps: Tensor, axes: tuple[str, ...], space: tuple[str, ...]) -> Tensor:
    """Maps (n, *space) in the axes of the input, with size 1 for all others."""
    sizes = dict(zip(space, maps.shape[1:], strict=True))
    return maps.reshape(len(maps), *(sizes.get(a, 1) for a in axes[1:]))

"""Maps that know nothing of what the network does: what a method has to beat.

Each takes and gives what a method does. A method whose score a control reaches has shown
nothing, however good the score.

Source: random, edges, weights: Adebayo et al. 2018, arXiv 1810.03292; another image's map: the
project's own.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, SiteError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import SPACE, Attribution, Explainer
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net
from patchclamp.truth.attribution.edges import edge_strength
from patchclamp.truth.attribution.randomising import changeable, randomised

OWN = "control of patchclamp"
SPREAD = 0.25
"""Of the centre's map: standard deviation as a share of each side."""


@dataclass(frozen=True, kw_only=True)
class Control(Explainer):
    """A map made from the value at the site alone; the network's score is not asked.

    Shapes: inputs (num, *feature); values (num, *site).
    Units: none.
    Randomness: as said.  Cost: one forward pass, to check the target.
    Raises: as every method.
    Fails when: it does well: the bench then lets something else than the network's use of the
        input show.
    """

    source: ClassVar[str] = OWN

    @abstractmethod
    def drawn(self, scorer: Scorer) -> Tensor:
        """The map, in the shape of the value."""

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
        scorer = Scorer.of(net, inputs, target, at=at)
        return Attribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=self.drawn(scorer),
            scores=scorer.plain,
            passes=scorer.passes,
        )


@dataclass(frozen=True, kw_only=True)
class RandomMap(Control):
    """Uniform numbers from 0 to 1, each example's own by `seed` and its inputs."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        shape = scorer.value.shape[1:]
        rows = [torch.rand(shape, generator=generator(key, self.seed)) for key in keys(scorer)]
        return torch.stack(rows).to(scorer.value)


@dataclass(frozen=True, kw_only=True)
class UniformMap(Control):
    """The same number everywhere."""

    name: ClassVar[str] = "uniform"

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        return torch.ones_like(scorer.value)


@dataclass(frozen=True, kw_only=True)
class AbsoluteValue(Control):
    """The value's own size: bright (and dark) places of an image whose grey is 0."""

    name: ClassVar[str] = "absolute_value"

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        return scorer.value.abs()


@dataclass(frozen=True, kw_only=True)
class Edges(Control):
    """Sobel's edges of each channel, or differences along a single axis of space."""

    name: ClassVar[str] = "sobel"
    needs_space: ClassVar[bool] = True
    source: ClassVar[str] = "Sobel and Feldman 1968; as a control Adebayo et al. 2018"

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        space = _space(scorer, self.name, most=2)
        moved = scorer.value.movedim(space, [*range(-len(space), 0)])
        if len(space) == 1:
            rows = edge_strength(moved.reshape(len(moved), -1, moved.shape[-1])).reshape(
                moved.shape
            )
        else:
            rows = edge_strength(moved)
        return rows.movedim([*range(-len(space), 0)], space)


@dataclass(frozen=True, kw_only=True)
class CentreBias(Control):
    """A hill in the middle: what is shown is often there."""

    name: ClassVar[str] = "centre"
    needs_space: ClassVar[bool] = True

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        made = torch.ones_like(scorer.value)
        for axis in _space(scorer, self.name):
            num = made.shape[axis]
            place = torch.arange(num, dtype=made.dtype, device=made.device) - (num - 1) / 2
            shape = [-1 if i == axis else 1 for i in range(made.ndim)]
            made = made * torch.exp(-((place / (SPREAD * num)) ** 2) / 2).reshape(shape)
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenMaps(Control):
    """Maps that are known already, such as the truth itself or the distractor's mask.

    Attributes:
        maps: (num, *space), the same for all channels; or (num, *site).
        label: what they are.
    """

    name: ClassVar[str] = "given"
    maps: Tensor
    label: str = "given"

    def drawn(self, scorer: Scorer) -> Tensor:
        """See `Control`."""
        value = scorer.value
        rest = [i for i, a in enumerate(scorer.axes) if i and a not in SPACE]
        maps = self.maps.to(value)
        if maps.ndim < value.ndim:
            for axis in rest:
                maps = maps.unsqueeze(axis)
        fits = maps.ndim == value.ndim and all(
            m == v or (m == 1 and i > 0)
            for i, (m, v) in enumerate(zip(maps.shape, value.shape, strict=True))
        )
        if not fits:
            raise InputError(
                f"the {self.label} maps have the wrong shape",
                got=str(tuple(self.maps.shape)),
                expected=str(tuple(value.shape)),
            )
        return maps.expand_as(value).clone()


@dataclass(frozen=True, kw_only=True)
class RandomWeights(Explainer):
    """The same method on a copy of the network whose weights are all in another order.

    Shapes, units, cost: as the method.
    Randomness: by `seed`, and the method's own.
    Raises: as the method; EngineError if no order of the weights changes the network.
    Fails when: it does well: the architecture or the image then makes the map, not what was
        learnt.
    Source: Adebayo et al. 2018, arXiv 1810.03292.
    """

    name: ClassVar[str] = "random_weights"
    source: ClassVar[str] = "Adebayo et al. 2018, arXiv 1810.03292"
    method: Explainer
    seed: int = 0

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
        call = net.call(inputs)
        layers, _ = changeable(net, call)
        other = randomised(net, call, layers, self.seed)
        found = self.method.run(other, call, target, at=at, progress=progress)
        return dataclasses.replace(
            found, method=f"{found.method}, random weights", options=self.options()
        )


@dataclass(frozen=True, kw_only=True)
class AnotherImage(Explainer):
    """The same method's map of another example: what it shows of all images alike.

    Shapes, units, cost: as the method.
    Randomness: by `seed`, which example another one gets the map of; and the method's own.
    Raises: as the method; InputError for a single example.
    Fails when: it does well: the map is then one of the data set, not of the example. Where the
        signal is in the same place in all examples it must do well.
    Source: the project's own.
    """

    name: ClassVar[str] = "another_image"
    source: ClassVar[str] = OWN
    method: Explainer
    seed: int = 0

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
        return self.of(self.method.run(net, inputs, target, at=at, progress=progress))

    def of(self, found: Attribution) -> Attribution:
        """The same maps, each example with that of another."""
        if found.num < 2:
            raise InputError("another example's map needs two examples or more", got="1")
        order = torch.randperm(found.num, generator=torch.Generator().manual_seed(self.seed))
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # one round through all of them: none keeps its own
        return dataclasses.replace(
            found,
            method=f"{found.method}, another image",
            options=self.options(),
            values=found.values[other.to(found.values.device)],
            error=None,
            bias=None,
        )


def controls_of(
    method: Explainer, *, seed: int = 0, space: bool = True, moving: bool = True
) -> tuple[Explainer, ...]:
    """All controls of a method.

    Args:
        space: the site has rows and columns, or positions; without, edges and centre are left
            out.
        moving: the signal moves from example to example; if not, another image's map is as good
            as the right one, and is left out.
    """
    in_space = (Edges(), CentreBias()) if space else ()
    another = (AnotherImage(method=method, seed=seed),) if moving else ()
    return (
        RandomMap(seed=seed),
        UniformMap(),
        AbsoluteValue(),
        *in_space,
        RandomWeights(method=method, seed=seed),
        *another,
    )


def _space(scorer: Scorer, name: str, most: int = 3) -> list[int]:
    """Axes of space at the site."""
    found = [i for i, a in enumerate(scorer.axes) if a in SPACE]
    if not 1 <= len(found) <= most:
        raise SiteError(
            f"'{name}' needs rows and columns, or positions",
            got=f"'{scorer.site}' of {scorer.net.name} with axes {', '.join(scorer.axes)}",
            hint="a site with axes of space, or another control",
        )
    return found

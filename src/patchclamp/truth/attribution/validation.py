"""Whether a method's maps may be believed: on planted truth, and on the network itself.

Three questions, each put to the method and to controls that know nothing of the network:

- *planted*: in a network trained for it, do maps show the places that it reads?
- *learnt*: do maps of this network change when its weights are put in another order, while
  they stay when the input hardly changes?
- *faithful*: does the score of this network fall faster when places go in the map's order,
  whatever is put in their place?

A method that a control reaches has shown nothing: there is no verdict then, however good its
score. Nothing here ranks methods in general: what holds for one network need not for another.

Source: Adebayo et al. 2018, arXiv 1810.03292 (weights); Samek et al. 2017, arXiv 1509.06321
(pixel flipping); Shah et al. 2021, arXiv 2102.12781 (planted); controls and verdicts: the
project's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import (
    CaptureError,
    DataError,
    EngineError,
    InputError,
    OptionError,
    SiteError,
)
from patchclamp.core.findings import Interval, Verdict
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.attribution.base import SPACE, Attribution, Explainer
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.faithfulness.curves import PixelFlipping
from patchclamp.methods.attribution.faithfulness.results import RANDOM
from patchclamp.methods.scoring import Scorer
from patchclamp.methods.statistics import bootstrap_mean
from patchclamp.model.inputs import Call
from patchclamp.net import Net
from patchclamp.truth.attribution.base import PlantedMaps, Score
from patchclamp.truth.attribution.controls import (
    AnotherImage,
    RandomMap,
    RandomWeights,
    controls_of,
)
from patchclamp.truth.attribution.glyphs import Glyphs
from patchclamp.truth.attribution.randomising import (
    changeable,
    randomised,
    rank_correlation,
)

JITTER = 0.01
"""Standard deviation of what an input is changed by when its map should stay, as a share of
the standard deviation of the inputs."""


FEWEST = 6
"""Examples: with fewer, all of them on one side are no surprise at the level of 5%."""


class Question(StrEnum):
    """What is asked of a method."""

    PLANTED = "planted"
    LEARNT = "learnt"
    FAITHFUL = "faithful"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rival:
    """A control's score, and by how much the method is ahead of it, example by example."""

    name: str
    score: Score
    lead: Interval

    @property
    def is_beaten(self) -> bool:
        """By more than chance."""
        return self.lead.low > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One question on one network.

    Attributes:
        question: which of the three.
        bench: what it was asked on: "Glyphs", "random weights", "pixel flipping, black".
        network: whose maps.
        measure: of the scores; higher is better.
        method: the method's score.
        rivals: those of the controls.
        gate: why the bench cannot tell anything; empty where it can.
    """

    question: Question
    bench: str
    network: str
    measure: str
    method: Score
    rivals: tuple[Rival, ...]
    gate: tuple[str, ...] = ()

    @property
    def nearest(self) -> Rival:
        """The control that comes closest."""
        return min(self.rivals, key=lambda r: r.lead.low)

    @property
    def beats_chance(self) -> bool:
        """By more than chance: a random map example by example, or what chance gives."""
        drawn = [r for r in self.rivals if r.name == RANDOM]
        if self.question is Question.FAITHFUL and drawn:
            return drawn[0].is_beaten
        return self.method.interval.low > self.method.chance

    @property
    def verdict(self) -> Verdict:
        """Holds where every control is beaten; unknown where one is not, or the gate is shut."""
        if self.gate or self.method.rows.numel() < FEWEST:
            return Verdict.UNKNOWN
        if not self.beats_chance:
            return Verdict.DOES_NOT_HOLD
        beaten = all(r.is_beaten for r in self.rivals)
        return Verdict.HOLDS if beaten else Verdict.UNKNOWN

    @property
    def reason(self) -> str:
        """In words."""
        if self.gate:
            return "the network does not use what was planted: " + "; ".join(self.gate)
        if self.method.rows.numel() < FEWEST:
            return f"{self.method.rows.numel()} examples are too few to tell"
        if self.verdict is Verdict.DOES_NOT_HOLD:
            return "no better than chance"
        if self.verdict is Verdict.UNKNOWN:
            return f"the control '{self.nearest.name}' reaches it"
        return "better than every control"


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """What all trials said of one method on one network, and its maps there.

    Attributes:
        refused: benches whose network the method cannot look at, or measures that its maps do
            not suit, and why.
    """

    method: str
    network: str
    maps: Attribution
    trials: tuple[Trial, ...]
    refused: Mapping[str, str]

    def of(self, question: Question) -> tuple[Trial, ...]:
        """The trials of one question."""
        return tuple(t for t in self.trials if t.question is question)

    def answer(self, question: Question) -> Verdict:
        """Holds where all trials do, does not hold where none does; unknown where they differ."""
        verdicts = {t.verdict for t in self.of(question)}
        return verdicts.pop() if len(verdicts) == 1 else Verdict.UNKNOWN

    @property
    def verdict(self) -> Verdict:
        """Holds where it does for all questions that were asked, planted truth among them."""
        asked = [q for q in Question if self.of(q)]
        answers = {self.answer(q) for q in asked}
        if Verdict.DOES_NOT_HOLD in answers:
            return Verdict.DOES_NOT_HOLD
        whole = answers == {Verdict.HOLDS} and Question.PLANTED in asked
        return Verdict.HOLDS if whole else Verdict.UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Ask a method all three questions.

    Shapes: inputs (num, *feature) of the network that is asked about.
    Units: of each measure; see `Trial`.
    Randomness: by `seed`, and the method's own.
    Cost: three times the method's on this network (as it is, its inputs moved, its weights
        shuffled), three times on each bench, and steps x maps x removals forward passes an
        example for `faithful`.
    Raises: what the method raises; DataError for fewer than two examples.
    Fails when: the bench's network and the user's differ in what makes the method right or
        wrong: planted truth speaks for networks of the bench's kind.
    Source: see the module.

    Attributes:
        num_planted: examples of each bench that are looked at.
        flipping: the measure of faithfulness; None leaves that question out, which costs most.
        seed: of controls, jitter and weights.
    """

    num_planted: int = 100
    flipping: PixelFlipping | None = field(default_factory=PixelFlipping)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_planted < 2:
            raise OptionError("num_planted is at least 2", got=str(self.num_planted))

    def run(
        self,
        method: Explainer,
        net: Net,
        inputs: object,
        target: int | Tensor,
        *,
        at: str | None = None,
        planted: Mapping[str, PlantedMaps] | None = None,
        progress: Progress = SILENT,
    ) -> Validation:
        """Planted truth first, then the network itself.

        Args:
            target: the class that maps explain, one or one for each example.
            at: the site of the maps of this network.
            planted: what benches made, by name; `Glyphs` with its own network by default.

        Raises:
            DataError: fewer than two examples.
        """
        call = net.call(inputs)
        if len(call.tensors()[0]) < 2:
            raise DataError("validation compares examples", got="1", expected="2 or more")
        benches = {"glyphs": Glyphs(seed=self.seed).run()} if planted is None else planted
        progress.start(f"validating {method.name}", len(benches) + 2, "trials")
        trials: list[Trial] = []
        refused: dict[str, str] = {}
        for name, bench in benches.items():
            try:
                trials.append(self.on_planted(method, name, bench))
            except (CaptureError, EngineError, SiteError) as e:  # no attention there, for one
                refused[name] = str(e)
            progress.advance()
        place = _place(method, at)
        scorer = Scorer.of(net, call, target, at=place)
        maps = method.run(net, call, target, at=at)
        other = self._shuffled(scorer)
        shuffled = method.run(other, call, target, at=at)
        trials.append(self.learnt(method, scorer, other, target, maps, shuffled, at=at))
        progress.advance()
        if self.flipping is not None:
            try:
                trials += self.faithful(method, scorer, self.flipping, target, maps, shuffled)
            except InputError as e:  # maps of positions, where the input has pixels
                refused[self.flipping.name] = str(e)
        progress.advance()
        progress.finish()
        return Validation(
            method=method.name,
            network=net.name,
            maps=maps,
            trials=tuple(trials),
            refused=refused,
        )

    def on_planted(self, method: Explainer, name: str, bench: PlantedMaps) -> Trial:
        """Do maps show what the bench's network reads?"""
        few = _first(bench, self.num_planted)

        def score(m: Explainer) -> Score:
            maps = m.run(few.net, few.inputs, few.labels)
            return few.scores(maps, allow_empty=True).signal_mass

        own = score(method)
        made = {m.name: score(m) for m in controls_of(method, seed=self.seed, moving=few.moving)}
        return Trial(
            question=Question.PLANTED,
            bench=name,
            network=f"{type(few.net.module).__name__} of {few.net.num_parameters:,} parameters",
            measure="signal mass",
            method=own,
            rivals=self._rivals(own, made),
            gate=bench.gate.failures,
        )

    def learnt(
        self,
        method: Explainer,
        scorer: Scorer,
        other: Net,
        target: int | Tensor,
        maps: Attribution,
        shuffled: Attribution,
        *,
        at: str | None,
    ) -> Trial:
        """Does the map follow what was learnt, and only that?

        Rank correlation of a map with that of the jittered input, less that with the map of
        the network with all its weights in another order (`shuffled`, of `other`).
        """
        net, call, moved = scorer.net, scorer.call, self._jittered(scorer)

        def score(m: Explainer, plain: Attribution, after: Attribution, at: str | None) -> Score:
            order = _order(m, plain)
            stays = rank_correlation(order, _order(m, m.run(net, moved, target, at=at)))
            follows = rank_correlation(order, _order(m, after))
            return Score.of(stays - follows.clamp(min=0), 0.0, seed=self.seed)

        own = score(method, maps, shuffled, at)
        place = _place(method, at)
        rivals = {
            m.name: score(
                m, m.run(net, call, target, at=place), m.run(other, call, target, at=place), place
            )
            for m in controls_of(method, seed=self.seed, space=_has_space(scorer), moving=False)
            if not isinstance(m, RandomWeights)
        }
        return Trial(
            question=Question.LEARNT,
            bench="random weights",
            network=net.name,
            measure="correlation lost with the weights",
            method=own,
            rivals=self._rivals(own, rivals),
        )

    def faithful(
        self,
        method: Explainer,
        scorer: Scorer,
        flipping: PixelFlipping,
        target: int | Tensor,
        maps: Attribution,
        shuffled: Attribution,
    ) -> tuple[Trial, ...]:
        """Does the score fall faster than for controls? One trial for each kind of removal."""
        net, call, place = scorer.net, scorer.call, None if scorer.tap is None else scorer.site
        blind: dict[str, Attribution] = {}
        for m in controls_of(method, seed=self.seed, space=_has_space(scorer)):
            if isinstance(m, RandomWeights):
                blind[m.name] = shuffled
            elif isinstance(m, AnotherImage):
                blind[m.name] = m.of(maps)
            elif not isinstance(m, RandomMap):  # the measure has one of its own
                blind[m.name] = m.run(net, call, target, at=place)
        like = {RandomWeights.name: method, AnotherImage.name: method}
        own_name = f"{method.name} itself"  # it may be called like a control
        ordered = {own_name: _order(method, maps)}
        for m in controls_of(method, seed=self.seed, space=_has_space(scorer)):
            if m.name in blind:
                ordered[m.name] = _order(like.get(m.name, m), blind[m.name])
        found = flipping.run(net, call, target, ordered, at=place)
        trials = []
        for removal in found.baselines:
            chance = float(found.of(RANDOM, removal).double().mean())
            scores = {
                name: Score.of(found.of(name, removal), chance, seed=self.seed)
                for name in found.maps
            }
            own = scores.pop(own_name)
            trials.append(
                Trial(
                    question=Question.FAITHFUL,
                    bench=f"pixel flipping, {removal}",
                    network=net.name,
                    measure="mean fall of the score",
                    method=own,
                    rivals=self._rivals(own, scores),
                )
            )
        return tuple(trials)

    def _shuffled(self, scorer: Scorer) -> Net:
        """A copy with all weights in another order, but those that make the value looked at."""
        layers, _ = changeable(scorer.net, scorer.call)
        if scorer.tap is not None:
            part = scorer.net.module.get_submodule
            own = {p.data_ptr() for p in part(scorer.tap.site.module).parameters(recurse=False)}
            layers = [  # an unembedding may share the embedding's weights
                x
                for x in layers
                if not own & {p.data_ptr() for p in part(x).parameters(recurse=False)}
            ]
        return randomised(scorer.net, scorer.call, layers, self.seed)

    def _rivals(self, own: Score, others: Mapping[str, Score]) -> tuple[Rival, ...]:
        return tuple(
            Rival(
                name=name,
                score=score,
                lead=bootstrap_mean((own.rows - score.rows).double(), seed=self.seed),
            )
            for name, score in others.items()
        )

    def _jittered(self, scorer: Scorer) -> Call:
        """The inputs of real numbers moved by a little; tokens stay."""
        found = keys(scorer)
        moved = []
        for x in scorer.call.tensors():
            if not x.is_floating_point() or len(x) != len(found):
                moved.append(x)
                continue
            size = JITTER * float(x.std())
            noise = [
                torch.randn(x.shape[1:], generator=generator(f"{key} jitter", self.seed))
                for key in found
            ]
            moved.append(x + size * torch.stack(noise).to(x))
        return scorer.call.mapped(moved)


def _first(bench: PlantedMaps, num: int) -> PlantedMaps:
    """Some of the examples; the gate is that of all."""
    return dataclasses.replace(
        bench,
        inputs=bench.inputs[:num],
        labels=bench.labels[:num],
        signal=bench.signal[:num],
        distractor=None if bench.distractor is None else bench.distractor[:num],
    )


def _place(method: Explainer, at: str | None) -> str | None:
    """Where the map lies: maps of layers with space are laid over the input."""
    return None if method.needs_space else at


def _order(method: Explainer, made: Attribution) -> Tensor:
    """What speaks most for the target, or what matters most either way: (num, *space)."""
    return made.heat(signed=method.is_signed).detach().double()


def _has_space(scorer: Scorer) -> bool:
    return 1 <= sum(a in SPACE for a in scorer.axes) <= 2

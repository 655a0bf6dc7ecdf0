"""Attacks on a pretrained network that carry over to what was fine-tuned from it.

The perturbation is made without the downstream network, its labels or its task: it turns the
features of the pretrained backbone away from those of the clean row, at the layers where this is
found to be easiest. Whatever reads these features downstream is then misled.

Whether that is transfer is decided by comparison, at one radius and on the same rows: with noise
from the corners of the ball, with an attack on the pretrained network's own logits, and with a
network that shares no weights.

Source: Downstream Transfer Attack, Zheng et al. 2024, arXiv 2408.01705 (cosine similarity of
tokens, the most vulnerable layer and its neighbours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from patchclamp.core.errors import OptionError, SiteError, TargetError
from patchclamp.core.findings import Interval
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import Tap
from patchclamp.methods.robustness.attacks.balls import Ball, Norm
from patchclamp.methods.robustness.attacks.base import Task, task_of
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attacks.pgd import unit_mean
from patchclamp.methods.scoring import Passes
from patchclamp.methods.statistics import bootstrap_mean, wilson


@dataclass(frozen=True, kw_only=True)
class LayerVulnerability:
    """How far a short attack on some layers turned the features away.

    Attributes:
        sites: that were attacked.
        similarity: mean cosine similarity to the clean row, over all layers that were looked at.
    """

    sites: tuple[str, ...]
    similarity: float


@dataclass(frozen=True, kw_only=True, eq=False)
class FeaturePoints:
    """Perturbed rows. Shapes: points (n, *feature), similarities (n,).

    Attributes:
        points: within the ball and the limits.
        sites: that were attacked in the end.
        tried: the short attacks by which these were chosen, in order; empty where given.
        similarities: mean cosine similarity at those sites.
        passes: rows that went through the pretrained network.
    """

    points: Tensor
    sites: tuple[str, ...]
    tried: tuple[LayerVulnerability, ...]
    similarities: Tensor
    passes: Passes


@dataclass(frozen=True, kw_only=True)
class FeatureAttack:
    """Projected gradient descent on the cosine similarity of features to those of the clean row.

    Every site is attacked alone for a few steps; the one after which the features of all sites
    together are least like those of the clean rows is the most vulnerable. Its neighbours in
    `sites` are added for as long as that lowers the similarity further. All steps are then taken
    on the mean over the chosen sites. Similarity is taken over the last axis where a value has
    tokens (row, token, unit) and averaged over tokens, over channels of images, and else over
    the whole row.

    Options: `sites` in the order of the network; one alone is attacked as it is; `num_steps`;
    `num_probes`, steps of the short attacks; `momentum`; `token`, the only one that is looked
    at, such as the class token's 0, by default all; `rows_at_once`, which changes no result;
    `seed`.

    Shapes: points (n, *feature).
    Units: those of the input.
    Randomness: the start in the ball, by `seed`.
    Cost: forwards and backwards a row: num_steps, and num_probes for each set of sites tried.
    Raises: SiteError for a site that is no module's value; TargetError where it has no gradient
        to the input; OptionError for a radius or norm that cannot be.
    Fails when: the downstream network was fine-tuned so far that it reads other features, or
        the radius is so small that only a loss of logits finds the few ways that matter (digits,
        a small ViT: no better than logits up to .1, better at .15 of the range).
    Source: see the module.
    """

    sites: tuple[str, ...]
    num_steps: int = 40
    num_probes: int = 8
    momentum: float = 0.75
    token: int | None = None
    rows_at_once: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (len(self.sites), self.num_steps, self.num_probes, self.rows_at_once)
        if min(counts) < 1:
            raise OptionError("sites to attack, steps, probes and rows: 1 or more", got=f"{self}")
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum is from 0 to less than 1", got=f"{self.momentum:g}")

    def run(
        self,
        pretrained: Classifier,
        points: Tensor,
        radius: float,
        *,
        norm: Norm = Norm.LINF,
        progress: Progress = SILENT,
    ) -> FeaturePoints:
        """Perturb rows; `points` go with the classifier's own rows, in order."""
        if norm is Norm.L0:
            raise OptionError("features are attacked in steps", expected="linf or l2")
        zeros = torch.zeros(len(points), dtype=torch.long)
        task = task_of(pretrained, points, zeros, radius, norm=norm, targets=None, rows=None)
        before = dataclasses.replace(pretrained.passes)
        features = _Features.of(self, pretrained, task)
        with torch.no_grad():
            chosen, tried = self._chosen(features, task.ball, progress)
            x = self._descend(features, task.ball, chosen, self.num_steps)
            similar = features.similarity(x, chosen)
        passes = pretrained.passes
        return FeaturePoints(
            points=x,
            sites=tuple(self.sites[i] for i in chosen),
            tried=tried,
            similarities=similar,
            passes=Passes(passes.forwards - before.forwards, passes.backwards - before.backwards),
        )

    def _chosen(
        self, features: _Features, ball: Ball, progress: Progress
    ) -> tuple[tuple[int, ...], tuple[LayerVulnerability, ...]]:
        num = len(self.sites)
        if num == 1:
            return (0,), ()
        everything, tried = tuple(range(num)), []

        def probe(index: tuple[int, ...]) -> float:
            x = self._descend(features, ball, index, self.num_probes)
            similarity = float(features.similarity(x, everything).mean())
            names = tuple(self.sites[i] for i in index)
            tried.append(LayerVulnerability(sites=names, similarity=similarity))
            progress.advance()
            return similarity

        progress.start("vulnerable layers", None, "sets of layers")
        try:
            chosen: tuple[int, ...]
            best, chosen = min((probe((i,)), (i,)) for i in everything)
            while len(chosen) < num:
                ends = ((chosen[0] - 1, chosen[-1]), (chosen[0], chosen[-1] + 1))
                near = [tuple(range(a, b + 1)) for a, b in ends if a >= 0 and b < num]
                lowest, wider = min((probe(index), index) for index in near)
                if lowest >= best:
                    break
                best, chosen = lowest, wider
        finally:
            progress.finish()
        return chosen, tuple(tried)

    def _descend(
        self, features: _Features, ball: Ball, index: tuple[int, ...], num_steps: int
    ) -> Tensor:
        def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
            return features.slopes(x, index)

        return descended(slopes, ball, num_steps, momentum=self.momentum, seed=self.seed)


def descended(
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]],
    ball: Ball,
    num_steps: int,
    *,
    momentum: float,
    seed: int,
) -> Tensor:
    """The lowest point in each ball that was met on the way down, to the last step.

    From a random point, since on the row itself the similarity of features is at its top and
    flat. Unlike an attack this does not stop where the source network is fooled: what carries
    over grows on.

    Args:
        slopes: of points, values (n,) and their slopes (n, *feature).
    """
    x = ball.drawn(torch.Generator().manual_seed(seed))
    average, best = torch.zeros_like(x), x.clone()
    lowest = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for number in range(num_steps + 1):
        values, way = slopes(x)
        lower = values < lowest
        best[lower], lowest[lower] = x[lower], values[lower]
        if number == num_steps:
            break
        average = momentum * average + unit_mean(way)
        size = 0.25 * max(1 - number / num_steps, 0.1)
        x = ball.step(x, -average, torch.full((len(x),), size, dtype=torch.float64))
    return best


@dataclass(eq=False)
class _Features:
    """Features of rows at sites, and how like the clean ones they are."""

    classifier: Classifier
    rows: Tensor
    taps: tuple[Tap, ...]
    attack: FeatureAttack
    clean: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, attack: FeatureAttack, classifier: Classifier, task: Task) -> _Features:
        net, taps = classifier.net, []
        if classifier.tap is not None:
            raise OptionError("features are attacked from the network's input", hint="at='input'")
        for name in attack.sites:
            found = net.taps(name)
            if len(found) != 1 or found[0].site.address not in net.hooks.points:
                raise SiteError(
                    f"'{name}' is not the value of one module of {net.name}",
                    got=f"{len(found)} sites",
                    hint="patchclamp sites MODEL",
                )
            taps.append(found[0])
        made = cls(classifier, task.rows, tuple(taps), attack)
        with torch.no_grad():
            parts = [made.values(task.points[at], at) for at in made.parts()]
        made.clean = [torch.cat(values) for values in zip(*parts, strict=True)]
        return made

    def values(self, x: Tensor, at: slice) -> list[Tensor]:
        """At all sites, differentiable where gradients are on."""
        classifier, net = self.classifier, self.classifier.net
        call = classifier.call.rows(self.rows[at], net.call_dims(classifier.call))
        number = next(i for i, y in enumerate(call.tensors()) if y.is_floating_point())
        given = [x if i == number else y for i, y in enumerate(call.tensors())]
        names = [tap.site.address for tap in self.taps]
        _, found = net.hooks.run(call.mapped(given), record=names, output=False)
        classifier.passes.forwards += len(x)
        return [self._part(tap, tap.view.read(found[tap.site.address])) for tap in self.taps]

    def _part(self, tap: Tap, value: Tensor) -> Tensor:
        token = self.attack.token
        if token is None:
            return value
        if value.ndim != 3 or not -value.shape[1] <= token < value.shape[1]:
            raise SiteError(
                f"'{tap.label}' has no token {token}",
                got=f"shape {tuple(value.shape)}",
                expected="(row, token, unit)",
            )
        return value[:, token]

    def alike(self, x: Tensor, at: slice, index: Sequence[int]) -> Tensor:
        """Mean similarity over sites, (n,)."""
        values = self.values(x, at)
        return torch.stack([_similar(values[i], self.clean[i][at]) for i in index]).mean(0)

    def similarity(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The same of all rows."""
        return torch.cat([self.alike(x[at], at, index) for at in self.parts()])

    def slopes(self, x: Tensor, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Similarities and their slopes, all rows."""
        similar, slopes = [], []
        for at in self.parts():
            leaf, slope = x[at].detach().clone().requires_grad_(), None
            with torch.enable_grad():
                found = self.alike(leaf, at, index)
                if found.requires_grad:
                    (slope,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True)
            if slope is None or not bool(torch.isfinite(slope).all()):
                raise TargetError(
                    "no finite gradient leads from the features to the input",
                    got=", ".join(self.taps[i].label for i in index),
                    hint="other sites",
                )
            self.classifier.passes.backwards += len(leaf)
            similar.append(found.detach())
            slopes.append(slope)
        return torch.cat(similar), torch.cat(slopes)

    def parts(self) -> list[slice]:
        """Rows that are run together."""
        num, size = len(self.rows), self.attack.rows_at_once
        return [slice(start, min(num, start + size)) for start in range(0, num, size)]


def _similar(value: Tensor, clean: Tensor) -> Tensor:
    """Cosine similarity of each row: of tokens or pixels, averaged, or of the whole."""
    if value.ndim == 3:
        return cosine_similarity(value, clean, dim=2).mean(1)
    if value.ndim > 3:
        return cosine_similarity(value, clean, dim=1).flatten(1).mean(1)
    return cosine_similarity(value.flatten(1), clean.flatten(1), dim=1)


class Maker(StrEnum):
    """By what rows were perturbed."""

    FEATURES = "features"
    LOGITS = "logits"
    """Cross-entropy of the pretrained network's own answer, by the same descent."""
    NOISE = "noise"
    """Random corners of the ball: as large as any perturbation in it."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """How one kind of perturbation does on one network.

    Attributes:
        maker: of the perturbation; network: "downstream" or "stranger".
        num: rows that this network gets right as they are.
        success: share of these that it gets wrong once perturbed; interval: of it, 95%.
    """

    maker: Maker
    network: str
    num: int
    success: float
    interval: Interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """What carries over.

    Attributes:
        table: a line for each maker and network.
        over_noise, over_logits: how much more often features succeed than these on the same
            rows of the downstream network, with a 95% interval of the mean.
        over_stranger: than features do on the network that shares no weights; None without one.
        features: the perturbed rows and the layers found.
    """

    table: tuple[Carried, ...]
    over_noise: tuple[float, Interval]
    over_logits: tuple[float, Interval]
    over_stranger: tuple[float, Interval] | None
    features: FeaturePoints

    def of(self, maker: Maker, network: str = "downstream") -> Carried:
        """One line of the table; OptionError where there is none."""
        for line in self.table:
            if line.maker is maker and line.network == network:
                return line
        raise OptionError(f"no line for '{maker}' on '{network}'")

    @property
    def is_shown(self) -> bool:
        """Better than noise, and better than on a stranger: the shared weights carry it."""
        controls = [self.over_noise, self.over_stranger]
        return all(c is not None and c[1].low > 0 for c in controls)


@dataclass(frozen=True, kw_only=True)
class TransferBench:
    """An attack on features against its controls, at one radius on the same rows.

    Options: `attack`; `seed`, of the noise and the intervals.

    Shapes: points (n, *feature), labels (n,) of the downstream task.
    Randomness: by `seed` and the attack's own.
    Cost: the attack twice (features and logits), and four forwards of each other network.
    Raises: as `FeatureAttack.run`; TargetError where a network gets no row right.
    Fails when: the downstream network is broken by noise alone: then nothing can be seen.
    Source: see the module.
    """

    attack: FeatureAttack
    seed: int = 0

    def run(
        self,
        pretrained: Classifier,
        downstream: Classifier,
        points: Tensor,
        labels: Tensor,
        radius: float,
        *,
        stranger: Classifier | None = None,
        norm: Norm = Norm.LINF,
        progress: Progress = SILENT,
    ) -> Transfer:
        """Perturb rows on the pretrained network and try them elsewhere.

        Args:
            stranger: a network for the downstream task that shares no weights.
        """
        features = self.attack.run(pretrained, points, radius, norm=norm, progress=progress)
        made = {
            Maker.FEATURES: features.points,
            Maker.LOGITS: self._by_logits(pretrained, points, radius, norm),
            Maker.NOISE: self._noise(downstream, points, radius, norm),
        }
        wrong = {m: _wrong(downstream, points, x, labels) for m, x in made.items()}
        table = [_carried(m, "downstream", w) for m, w in wrong.items()]
        over = {m: self._over(wrong[Maker.FEATURES], wrong[m]) for m in made}
        over_stranger = None
        if stranger is not None:
            theirs = {m: _wrong(stranger, points, x, labels) for m, x in made.items()}
            table += [_carried(m, "stranger", w) for m, w in theirs.items()]
            over_stranger = self._over(wrong[Maker.FEATURES], theirs[Maker.FEATURES])
        return Transfer(
            table=tuple(table),
            over_noise=over[Maker.NOISE],
            over_logits=over[Maker.LOGITS],
            over_stranger=over_stranger,
            features=features,
        )

    def _by_logits(
        self, pretrained: Classifier, points: Tensor, radius: float, norm: Norm
    ) -> Tensor:
        rows = torch.arange(len(points))
        answers = pretrained.answers(points, rows).argmax(1)
        ball = Ball.of(norm, points, radius, pretrained.within)

        def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
            seen = pretrained.slopes(x, rows, Loss.CE, answers, None)
            return -seen.losses, -seen.slopes

        attack = self.attack
        with torch.no_grad():
            return descended(
                slopes, ball, attack.num_steps, momentum=attack.momentum, seed=attack.seed
            )

    def _noise(self, downstream: Classifier, points: Tensor, radius: float, norm: Norm) -> Tensor:
        ball = Ball.of(norm, points, radius, downstream.within)
        generator = torch.Generator().manual_seed(self.seed)
        way = torch.randn(points.shape, generator=generator).to(points)
        return ball.step(points, way, torch.ones(len(points), dtype=torch.float64))

    def _over(self, mine: Tensor, other: Tensor) -> tuple[float, Interval]:
        both = ~(mine.isnan() | other.isnan())
        if not bool(both.any()):
            raise TargetError("no row is right on both networks before it is perturbed")
        gain = mine[both] - other[both]
        return float(gain.mean()), bootstrap_mean(gain, seed=self.seed)


def _wrong(network: Classifier, points: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """(n,) 1 where perturbing made an answer wrong, 0 where not, NaN where it was wrong before."""
    rows = torch.arange(len(points))
    before = network.answers(points, rows).argmax(1) == labels
    after = network.answers(x, rows).argmax(1) == labels
    return torch.where(before, (~after).double(), torch.nan)


def _carried(maker: Maker, network: str, wrong: Tensor) -> Carried:
    counted = wrong[~wrong.isnan()]
    if not len(counted):
        raise TargetError(f"the {network} network gets no row right as it is")
    hits, num = int(counted.sum()), len(counted)
    return Carried(
        maker=maker, network=network, num=num, success=hits / num, interval=wilson(hits, num)
    )

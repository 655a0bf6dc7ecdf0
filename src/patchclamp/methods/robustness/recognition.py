"""Whether images show what a network says they show, by measures that do not ask that network.

An image is recognisable as a class if it is as like a real image of the class as real ones are
like each other and its nearest neighbour among all real images is of the class, or if a second
network, trained on its own, agrees. Three controls are measured with it: real images that were
not among the examples (recognised, or the check is blind), the same under a wrong class, and
noise (not recognised, or the check sees everything). Where a control fails there is no verdict.

Source: the control by a second network follows Nguyen et al. 2015, arXiv 1412.1897, section 3.4
(generalisation of fooling images to other networks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.core.findings import Interval
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.confidence import checked_classes, limits_of, odds_at
from patchclamp.methods.statistics import wilson


@dataclass(frozen=True, kw_only=True, eq=False)
class Looked:
    """What was seen in some images. Shapes: (n,).

    Attributes:
        classes: under which they were looked at.
        distances: root mean square to the nearest real image of the class, in units of the input.
        likeness: correlation over elements with the most alike real image of the class, which
            brightness and contrast do not change; usual: what all but `tail` of the real images
            of that class have with others of it.
        neighbours: class of the most alike real image of all.
        agreement: the second network's confidence in the class.
        is_alike: as like the class as real images are, and nearest to it.
        is_agreed: the second network's confidence is high enough.
    """

    classes: Tensor
    distances: Tensor
    likeness: Tensor
    usual: Tensor
    neighbours: Tensor
    agreement: Tensor
    is_alike: Tensor
    is_agreed: Tensor

    @property
    def is_recognised(self) -> Tensor:
        """By either, (n,)."""
        return self.is_alike | self.is_agreed

    @property
    def recognised(self) -> float:
        """The share that is."""
        return float(self.is_recognised.double().mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Recognition:
    """Images with their controls.

    Attributes:
        images: what was asked about.
        real, wrong, noise: controls: held-out real images under their own class and under
            another, and uniform noise.
        interval: 95% interval of the share of images that are recognised.
        reason: why there is no verdict, or None.
    """

    images: Looked
    real: Looked
    wrong: Looked
    noise: Looked
    interval: Interval
    reason: str | None

    @property
    def unrecognisable(self) -> float | None:
        """The share of images that show nothing of their class; None where a control failed."""
        return None if self.reason else 1.0 - self.images.recognised


@dataclass(frozen=True, kw_only=True)
class RecognitionCheck:
    """Look at images with a nearest neighbour and a second network; see the module.

    Options: `tail`, share of real images that may be less like their class than what counts as
    alike; `agreement`, confidence of the second network that counts; `least`, share of real
    images that must be recognised; `most`, share of wrong classes and noise that may be;
    `seed`, of the noise.

    Shapes: points, examples, real (n, *feature); classes, labels, real_labels (n,).
    Randomness: the noise and the wrong classes, by `seed`.
    Cost: 1 forward of the second network for each point and three for each real image.
    Raises: InputError for shapes, or a class with fewer than two examples; OptionError.
    Fails when: a person sees more than both measures, or the second network is fooled by the
        same images although nothing is in them: these then count as recognised, which is the
        cautious side.
    Source: see the module.
    """

    tail: float = 0.01
    agreement: float = 0.5
    least: float = 0.9
    most: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for share in (self.tail, self.agreement, self.least, self.most):
            if not 0 < share < 1:
                raise OptionError("shares are between 0 and 1", got=f"{self}")

    def run(
        self,
        witness: Classifier,
        points: Tensor,
        classes: Tensor,
        *,
        examples: Tensor,
        labels: Tensor,
        real: Tensor,
        real_labels: Tensor,
    ) -> Recognition:
        """Look at images under classes.

        Args:
            witness: a second network, trained on its own.
            examples, labels: real images to compare with.
            real, real_labels: others, which are not among them.
        """
        low, high = limits_of(witness, "noise as a control")
        gallery = _Gallery.of(self, witness, examples, labels)
        images = gallery.look(points, checked_classes(witness, classes))
        real_labels = checked_classes(witness, real_labels)
        generator = torch.Generator().manual_seed(self.seed)
        shift = torch.randint(1, witness.num_classes, (len(real),), generator=generator)
        others = (real_labels + shift) % witness.num_classes
        noise = low + (high - low) * torch.rand(real.shape, generator=generator).to(low)
        seen = gallery.look(real, real_labels)
        wrong, blank = gallery.look(real, others), gallery.look(noise, real_labels)
        return Recognition(
            images=images,
            real=seen,
            wrong=wrong,
            noise=blank,
            interval=wilson(int(images.is_recognised.sum()), len(points)),
            reason=self._reason(seen, wrong, blank),
        )

    def _reason(self, real: Looked, wrong: Looked, noise: Looked) -> str | None:
        if real.recognised < self.least:
            return f"of held-out real images only {real.recognised:.2f} are recognised"
        if wrong.recognised > self.most:
            return f"of real images under a wrong class {wrong.recognised:.2f} are recognised"
        if noise.recognised > self.most:
            return f"of noise {noise.recognised:.2f} is recognised"
        return None


@dataclass(eq=False)
class _Gallery:
    """Real images to compare with."""

    check: RecognitionCheck
    witness: Classifier
    examples: Tensor
    labels: Tensor
    usual: Tensor

    @classmethod
    def of(
        cls, check: RecognitionCheck, witness: Classifier, examples: Tensor, labels: Tensor
    ) -> _Gallery:
        labels = checked_classes(witness, labels)
        if len(labels) != len(examples) or examples.shape[1:] != witness.points.shape[1:]:
            raise InputError(
                "examples are inputs of the second network, each with a label",
                got=f"{tuple(examples.shape)} and {len(labels)} labels",
            )
        alike = _scaled(examples) @ _scaled(examples).T
        alike.fill_diagonal_(-1.0)
        usual = torch.full((witness.num_classes,), torch.inf, dtype=torch.float64)
        for number in labels.unique().tolist():
            own = labels == number
            if int(own.sum()) < 2:
                raise InputError(f"class {number} has one example", expected="two or more")
            usual[number] = alike[own][:, own].amax(1).quantile(check.tail)
        return cls(check, witness, examples, labels, usual)

    def look(self, x: Tensor, classes: Tensor) -> Looked:
        """At images under classes."""
        if len(x) != len(classes) or x.shape[1:] != self.examples.shape[1:]:
            raise InputError(
                "images are of the form of the examples, each with a class",
                got=f"{tuple(x.shape)} and {len(classes)} classes",
                expected=f"(n, {', '.join(map(str, self.examples.shape[1:]))})",
            )
        is_other = self.labels[None] != classes[:, None]
        if bool(is_other.all(1).any()):
            missing = int(classes[is_other.all(1)][0])
            raise InputError(f"there is no example of class {missing}")
        alike = _scaled(x) @ _scaled(self.examples).T
        away = torch.cdist(x.double().flatten(1), self.examples.double().flatten(1))
        likeness = alike.masked_fill(is_other, -1.0).amax(1)
        neighbours = self.labels[alike.argmax(1)]
        odds = odds_at(self.witness, x, torch.zeros(len(x), dtype=torch.long), classes)
        usual, agreement = self.usual[classes], torch.sigmoid(odds)
        return Looked(
            classes=classes,
            distances=away.masked_fill(is_other, torch.inf).amin(1) / x[0].numel() ** 0.5,
            likeness=likeness,
            usual=usual,
            neighbours=neighbours,
            agreement=agreement,
            is_alike=(neighbours == classes) & (likeness >= usual),
            is_agreed=agreement >= self.check.agreement,
        )


def _scaled(x: Tensor) -> Tensor:
    """Rows without their mean, of norm 1; a row of one value is like nothing: zeros."""
    flat = x.double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    norm: Tensor = flat.norm(dim=1, keepdim=True)
    return flat / torch.where(norm > 1e-12, norm, torch.inf)

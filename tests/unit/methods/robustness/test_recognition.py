"""Recognition on images whose class is plain to see, and checks that see nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.recognition import Recognition, RecognitionCheck

NUM_CLASSES = 3
SIDE = 6


class Templates(nn.Module):
    """Logits are correlations with the templates; with `constant`, always the same."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(40 * _templates().flatten(1) / SIDE**2)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        logits = (flat - flat.mean(1, keepdim=True)) @ self.weight.T
        return 0 * logits if self.constant else logits


def _templates() -> Tensor:
    made = torch.randn(NUM_CLASSES, SIDE * SIDE, generator=torch.Generator().manual_seed(5))
    return (made - made.mean(1, keepdim=True)).reshape(NUM_CLASSES, 1, SIDE, SIDE)


def drawn(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % NUM_CLASSES
    noise = 0.05 * torch.randn((num, 1, SIDE, SIDE), generator=generator)
    return (0.5 + 0.15 * _templates()[labels] + noise).clamp(0, 1), labels


def looked(points: Tensor, classes: Tensor, *, constant: bool = False) -> Recognition:
    x, labels = drawn(60, seed=0)
    real, real_labels = drawn(60, seed=1)
    module = Templates(constant=constant).eval()
    witness = Classifier.open(patchclamp.open(module, x[:1]), x, within=(0.0, 1.0))
    return RecognitionCheck(agreement=0.97).run(
        witness,
        points,
        classes,
        examples=x,
        labels=labels,
        real=real,
        real_labels=real_labels,
    )


def test_real_images_are_recognised_whatever_their_contrast_and_brightness() -> None:
    x, labels = drawn(30, seed=2)
    found = looked(0.3 + 0.3 * x, labels)
    assert found.reason is None
    assert found.images.recognised >= 0.95
    assert found.unrecognisable is not None
    assert found.unrecognisable <= 0.05
    assert found.interval.low > 0.8
    assert torch.equal(found.images.neighbours, labels)


def test_noise_and_wrong_classes_are_not() -> None:
    x, labels = drawn(30, seed=2)
    noise = torch.rand(30, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    for images, classes in ((noise, labels), (x, (labels + 1) % NUM_CLASSES)):
        found = looked(images, classes)
        assert found.reason is None
        assert found.unrecognisable is not None
        assert found.unrecognisable >= 0.9


def test_a_copy_of_an_example_is_at_distance_nought() -> None:
    x, labels = drawn(60, seed=0)
    found = looked(x[:3], labels[:3]).images
    assert found.distances.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.likeness.tolist() == pytest.approx([1, 1, 1])
    blank = looked(torch.full((1, 1, SIDE, SIDE), 0.5), labels[:1]).images
    assert blank.likeness.tolist() == [0.0]
    assert not bool(blank.is_alike)


def test_no_verdict_where_a_control_fails() -> None:
    x, labels = drawn(60, seed=0)
    module = Templates().eval()
    witness = Classifier.open(patchclamp.open(module, x[:1]), x, within=(0.0, 1.0))
    noise = torch.rand(60, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))

    def asked(real: Tensor, agreement: float) -> Recognition:
        return RecognitionCheck(agreement=agreement).run(
            witness, x, labels, examples=x, labels=labels, real=real, real_labels=labels
        )

    blind = asked(noise, 0.9)
    assert blind.unrecognisable is None
    assert blind.reason is not None
    assert "held-out" in blind.reason
    gullible = asked(x, 1e-9)
    assert gullible.unrecognisable is None
    assert gullible.reason is not None
    assert "wrong class" in gullible.reason


def test_bad_input_is_said() -> None:
    x, labels = drawn(6, seed=2)
    with pytest.raises(InputError, match="each with a class"):
        looked(x, labels[:2])
    with pytest.raises(OptionError, match="shares"):
        RecognitionCheck(tail=0)
    witness = Classifier.open(patchclamp.open(Templates().eval(), x[:1]), x, within=(0.0, 1.0))

    def run(examples: Tensor, known: Tensor) -> Recognition:
        return RecognitionCheck().run(
            witness, x, labels, examples=examples, labels=known, real=x, real_labels=labels
        )

    with pytest.raises(InputError, match="has one example"):
        run(x[:3], labels[:3])
    with pytest.raises(InputError, match="no example of class"):
        run(x[[0, 3]], labels[[0, 3]])
    with pytest.raises(InputError, match="each with a label"):
        run(x, labels[:3])

"""Linear classifiers, whose worst perturbations have a closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.methods.robustness.attacks.classifier import Classifier


def linear(
    points: Tensor,
    num_classes: int = 2,
    *,
    seed: int = 0,
    within: tuple[float, float] | None = None,
) -> tuple[Classifier, nn.Linear, Tensor]:
    """A classifier of the points, its layer, and the labels that it gives them."""
    generator = torch.Generator().manual_seed(seed)
    size = points[0].numel()
    layer = nn.Linear(size, num_classes, dtype=points.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(num_classes, size, generator=generator))
        layer.bias.copy_(-layer.weight @ points.flatten(1).mean(0))  # no class has all points
    module = nn.Sequential(nn.Flatten(), layer).eval()
    classifier = Classifier.open(patchclamp.open(module, points), points, within=within)
    labels = classifier.answers(points, torch.arange(len(points))).argmax(1)
    return classifier, layer, labels


def difference(layer: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of two classes, weights (n, size) and offsets (n,) of the margin."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return weight[labels] - weight[1 - labels], bias[labels] - bias[1 - labels]

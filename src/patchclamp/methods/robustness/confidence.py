"""Confidence of a class without saturation, and the way uphill: what instruments on it share.

Confidence is the softmax probability of a class. Its log-odds, z_c - log sum of exp of the other
logits, say the same, in float64 and without an end at 1, so that a search can still tell two
points apart where both print as 100%.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.methods.robustness.attacks.balls import Limits
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss

_SURE = 6.0
"""Log-odds above which the slope of a float32 softmax is mostly rounding."""


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Of one class in each row, (n,) float64; `sigmoid` of it is the confidence."""
    z = logits.double()
    others = z.scatter(1, classes[:, None], -math.inf).logsumexp(1)
    return z.gather(1, classes[:, None])[:, 0] - others


def odds_at(
    classifier: Classifier, x: Tensor, rows: Tensor, classes: Tensor, *, at_once: int | None = None
) -> Tensor:
    """Log-odds of a class at points, (n,)."""
    return log_odds(classifier.answers(x, rows, at_once=at_once), classes)


def uphill(
    classifier: Classifier, x: Tensor, rows: Tensor, classes: Tensor, odds: Tensor
) -> Tensor:
    """Slopes of the log-odds, (n, *feature).

    Where a class is all but sure, those of its margin over the next class take their place:
    these are the same slopes where one other class holds what is left.

    Args:
        odds: the log-odds at the points, (n,).
    """
    slopes = torch.zeros_like(x)
    for loss, chosen in ((Loss.CE, odds <= _SURE), (Loss.MARGIN, odds > _SURE)):
        index = chosen.nonzero().flatten()
        if not len(index):
            continue
        aims = classes[index]
        found = classifier.slopes(x[index], rows[index], loss, aims, aims).slopes
        if loss is Loss.CE:  # d log p = (1 - p) d log-odds
            found = found / column(torch.sigmoid(-odds[index]), found)
        slopes[index] = found
    return slopes


def limits_of(classifier: Classifier, what: str) -> Limits:
    """The limits of inputs; OptionError where there are none, or infinite ones."""
    within = classifier.within
    if within is None or not all(bool(torch.isfinite(side).all()) for side in within):
        raise OptionError(
            f"{what} needs to know which inputs exist",
            hint="give the classifier finite limits: within=(low, high)",
        )
    if not bool((within[0] < within[1]).all()):
        raise OptionError(f"{what} needs limits that are apart", got="equal ones")
    return within


def checked_classes(classifier: Classifier, classes: Tensor) -> Tensor:
    """(n,) classes of the network, as int64; TargetError otherwise."""
    whole = not (classes.is_floating_point() or classes.dtype is torch.bool)
    if classes.ndim != 1 or not len(classes) or not whole:
        raise TargetError(
            "classes are whole numbers",
            got=f"{classes.dtype} of shape {tuple(classes.shape)}",
            expected="(n,), n of 1 or more",
        )
    if int(classes.min()) < 0 or int(classes.max()) >= classifier.num_classes:
        raise TargetError(
            f"not classes of {classifier.net.name}",
            got=f"{int(classes.min())} to {int(classes.max())}",
            expected=f"0 to {classifier.num_classes - 1}",
        )
    return classes.to(classifier.value.device, torch.int64)


def column(values: Tensor, like: Tensor) -> Tensor:
    """One value a row, to be multiplied with `like`."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (n,) float64."""
    return (a.double() * b.double()).flatten(1).sum(1)

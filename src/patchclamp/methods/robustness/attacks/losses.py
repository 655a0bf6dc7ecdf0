"""What an attack drives up: one number for each row of logits.

Source: margin, Carlini & Wagner 2017, arXiv 1608.04644; difference of logits ratio, Croce & Hein
2020, arXiv 2003.01690, eq. 6 and 7, whose slopes, unlike those of the cross-entropy, do not
depend on the scale of the logits.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.core.errors import OptionError

_TINY = 1e-12


def margins(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """How far the defended answer stands above: negative where the attack has succeeded, (n,).

    Untargeted: the label's logit minus the largest other. Targeted: the largest other logit
    minus that of the target.
    """
    if targets is None:
        return _of(logits, labels) - _largest_other(logits, labels)
    return _largest_other(logits, targets) - _of(logits, targets)


class Loss(StrEnum):
    """A loss; larger is worse for the network."""

    CE = "ce"
    """Cross-entropy, in the precision of the logits: it saturates where these are large."""
    MARGIN = "margin"
    DLR = "dlr"
    """Difference of logits ratio."""

    def check(self, num_classes: int, *, aimed: bool) -> None:
        """Raise OptionError where there are too few classes for it."""
        least = 4 if aimed else 3
        if self is Loss.DLR and num_classes < least:
            kind = "targeted DLR" if aimed else "DLR"
            raise OptionError(
                f"{kind} is not defined for {num_classes} classes",
                expected=f"{least} or more",
                hint="Loss.MARGIN",
            )

    def values(self, logits: Tensor, labels: Tensor, aims: Tensor | None) -> Tensor:
        """(n,), differentiable.

        Args:
            logits: (n, class).
            labels: (n,) the class to be left.
            aims: (n,) the class to be reached; None for any other.
        """
        if self is Loss.CE:
            if aims is None:
                return functional.cross_entropy(logits, labels, reduction="none")
            return -functional.cross_entropy(logits, aims, reduction="none")
        if self is Loss.MARGIN:
            return -margins(logits, labels, aims)
        ranked = logits.sort(1, descending=True).values
        if aims is None:
            rise = _largest_other(logits, labels) - _of(logits, labels)
            return rise / (ranked[:, 0] - ranked[:, 2] + _TINY)
        rise = _of(logits, aims) - _of(logits, labels)
        return rise / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + _TINY)


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _largest_other(logits: Tensor, classes: Tensor) -> Tensor:
    return torch.scatter(logits, 1, classes[:, None], -math.inf).amax(1)

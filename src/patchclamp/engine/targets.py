"""Targets: what a gradient is taken of, one scalar for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from patchclamp.core.errors import TargetError

Target: TypeAlias = "Callable[[torch.Tensor], torch.Tensor] | int | torch.Tensor"
"""A function of the principal output, or a class: one for all rows, or one for each row."""


def row_scores(output: torch.Tensor, target: Target) -> torch.Tensor:
    """The target of every row.

    Shapes: output (row, class) or (row, position, class), where a class means the last
    position; returns (row).

    Raises:
        TargetError: the class is no output, or the function does not give one scalar per row.
    """
    rows = output.shape[0] if output.ndim else 0
    if callable(target) and not isinstance(target, torch.Tensor):
        scores = target(output)
    else:
        last = output[:, -1] if output.ndim == 3 else output
        wanted = torch.as_tensor(target, device=output.device).expand(rows)
        if last.ndim != 2 or int(wanted.max()) >= last.shape[1] or int(wanted.min()) < 0:
            raise TargetError(
                "the target class is not an output of the network",
                got=str(target),
                expected=f"classes of an output of shape {tuple(output.shape)}",
            )
        scores = last.gather(1, wanted[:, None])[:, 0]
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (rows,):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise TargetError(
            "a target gives one scalar per row",
            got=f"shape {got}",
            expected=f"shape ({rows},)",
            hint="e.g. target=lambda logits: logits[:, -1, 42]",
        )
    return scores

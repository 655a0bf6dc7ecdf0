"""Targets: what a gradient is taken of, one scalar for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from patchclamp.core.errors import TargetError

Target: TypeAlias = "Callable[[torch.Tensor], torch.Tensor] | int | torch.Tensor"
"""A function of the principal output, or a class: one for all rows, or one for each row."""


class Metric(Protocol):
    """One number for each row of the output, where rows belong to examples with their own answers.

    `output` is (row, class) at `position` where that is set, else the whole output; `rows`
    (int64, one per row) says which example of the data each row belongs to.
    """

    @property
    def name(self) -> str:
        """What is measured, for records and reports."""
        ...

    @property
    def position(self) -> int | None:
        """The only position of the output that is read; None for the whole output."""
        ...

    def __call__(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """One scalar per row."""
        ...


def measured(metric: Metric, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The metric of every row of a principal output (row, ...), gradients included.

    Raises:
        TargetError: it is not one finite number per row.
    """
    position = metric.position
    values = metric(output if position is None else output[:, position], rows)
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != (output.shape[0],):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise TargetError(
            f"the metric '{metric.name}' must give one number per row",
            got=f"shape {got}",
            expected=f"({output.shape[0]},)",
        )
    if not bool(torch.isfinite(values).all()):
        raise TargetError(f"the metric '{metric.name}' gives NaN or infinity")
    return values


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

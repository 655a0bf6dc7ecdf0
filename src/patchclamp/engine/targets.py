"""Targets: what a gradient is taken of, one scalar for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

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


@dataclass(frozen=True, eq=False)
class ClassScore:
    """A class of the output: one for all examples, or one for each."""

    classes: int | torch.Tensor
    position: int | None = None

    @property
    def name(self) -> str:
        return f"class {self.classes}" if isinstance(self.classes, int) else "class per example"

    def __call__(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        wanted = torch.as_tensor(self.classes, device=output.device)
        if wanted.ndim > 1 or (wanted.ndim == 1 and int(rows.max()) >= wanted.numel()):
            raise TargetError(
                "a target of classes is one class, or one for each example",
                got=f"shape {tuple(wanted.shape)}",
                expected=f"({int(rows.max()) + 1},)",
            )
        wanted = wanted.expand(rows.numel()) if wanted.ndim == 0 else wanted[rows]
        in_range = (
            output.ndim == 2 and int(wanted.min()) >= 0 and int(wanted.max()) < output.shape[1]
        )
        if not in_range:
            raise TargetError(
                "the target class is not an output of the network",
                got=str(self.classes),
                expected=f"classes of an output of shape {tuple(output.shape)}",
            )
        return output.gather(1, wanted[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class FunctionScore:
    """A user's function of the whole output, which sees one batch of examples at a time.

    So it may hold something for each example, such as the tokens of its right answers.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    position: int | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        num = int(rows.max()) + 1
        order = torch.arange(num, device=rows.device)
        batches = rows.numel() // num
        if rows.numel() % num or not torch.equal(rows, order.repeat(batches)):
            return self.function(output)
        made = [_checked(self.function(part), num) for part in output.split(num)]
        return torch.cat(made)


def _checked(made: object, num: int) -> torch.Tensor:
    if not isinstance(made, torch.Tensor) or tuple(made.shape) != (num,):
        got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise TargetError(
            "a target gives one scalar per row",
            got=f"shape {got}",
            expected=f"shape ({num},)",
            hint="e.g. target=lambda logits: logits[:, -1, 42]",
        )
    return made


def as_metric(target: Metric | Target, *, positions: bool = False) -> Metric:
    """A target in any form as a metric.

    Args:
        target: a class, a tensor with a class for each example, a function of the principal
            output, or a metric already.
        positions: the output is (row, position, class), where a class means the last position.
    """
    if isinstance(target, (int, torch.Tensor)):
        return ClassScore(target, -1 if positions else None)
    if hasattr(target, "name") and hasattr(target, "position"):
        return cast("Metric", target)
    if callable(target):
        return FunctionScore(target)
    raise TargetError(
        "a metric is a class, a class for each example, or a function of the output",
        got=type(target).__name__,
    )


def measured(metric: Metric, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The metric of every row of a principal output (row, ...), gradients included.

    Raises:
        TargetError: it is not one finite number per row.
    """
    position = metric.position
    return measured_there(metric, output if position is None else output[:, position], rows)


def measured_there(metric: Metric, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `measured`, of an output that holds only the metric's position, where it has one."""
    values = metric(output, rows)
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

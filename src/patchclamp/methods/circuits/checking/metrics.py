"""Metrics: what is measured of a network's output, one number for each row.

A metric knows the answers of every example of a prompt set; called with the output of
some rows, and which examples those rows are, it gives a number each. So one metric
serves sweeps and gradients alike, in which examples are repeated, cut into batches and
put in another order. All metrics are differentiable in the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.core.errors import DataError, TargetError
from patchclamp.data.behaviours.pairs import MetricKind, TokenPairs, check_answers
from patchclamp.engine.targets import Metric

__all__ = [
    "KLDivergence",
    "LogitDifference",
    "LogitOf",
    "Metric",
    "ProbabilityDifference",
    "metric_for",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitDifference:
    """Mean logit of the correct answers less the mean logit of the wrong ones.

    Shapes: correct (example, k) and wrong (example, m), padded with -1; output
    (row, class).
    Units: logits (nats of log odds, for one answer of each kind).
    Raises: DataError for rows without answers, answers that are both, or that are no
    class of the output; TargetError for an output that is not (row, class).
    Source: Wang et al. 2022.
    """

    correct: Int[Tensor, "example k"]
    wrong: Int[Tensor, "example m"]
    position: int | None = -1
    name: str = "logit difference"

    def __post_init__(self) -> None:
        check_answers(self.correct, self.wrong, self.name)

    @property
    def reads(self) -> Int[Tensor, "class"]:
        """The classes of the output that make a difference to it."""
        named: Tensor = torch.cat([self.correct.flatten(), self.wrong.flatten()]).unique()
        kept: Tensor = named[named >= 0]
        return kept

    def __call__(
        self, output: Float[Tensor, "row class"], rows: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        right, is_right = _taken(output, self.correct, rows, self.name)
        wrong, is_wrong = _taken(output, self.wrong, rows, self.name)
        return _mean(right, is_right) - _mean(wrong, is_wrong)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbabilityDifference:
    """Probability of all correct answers together less that of all wrong ones.

    Shapes: as for `LogitDifference`. Units: probability, from -1 to 1.
    Raises: as `LogitDifference`.
    Fails when: the network is so sure that the softmax saturates; gradients vanish then.
    Source: Hanna et al. 2023.
    """

    correct: Int[Tensor, "example k"]
    wrong: Int[Tensor, "example m"]
    position: int | None = -1
    name: str = "probability difference"

    def __post_init__(self) -> None:
        check_answers(self.correct, self.wrong, self.name)

    def __call__(
        self, output: Float[Tensor, "row class"], rows: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        shares = _classes(output, self.name).softmax(1)
        right, is_right = _taken(shares, self.correct, rows, self.name)
        wrong, is_wrong = _taken(shares, self.wrong, rows, self.name)
        return (right * is_right).sum(1) - (wrong * is_wrong).sum(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence:
    """Kullback-Leibler divergence of the output from a reference, KL(reference | output).

    With the clean output as reference it is 0 at the clean point, and so is its gradient,
    exactly, because that is its least value. Gradients taken there say nothing: take them
    elsewhere (at the corrupt point, or along a path), or use another metric.

    Shapes: reference logits (example, class); output (row, class).
    Units: nats, 0 or more; larger is further away.
    Raises: DataError for a reference that is not finite; TargetError for an output that
    is not (row, class) with the classes of the reference.
    Source: Conmy et al. 2023.
    """

    reference: Float[Tensor, "example class"]
    position: int | None = -1
    name: str = "KL divergence"

    def __post_init__(self) -> None:
        reference = self.reference
        if reference.ndim != 2 or not reference.is_floating_point() or not reference.numel():
            raise DataError(
                "the reference of a KL divergence is not logits",
                got=f"{reference.dtype} of shape {tuple(reference.shape)}",
                expected="real numbers of shape (example, class)",
            )
        if not bool(reference.isfinite().all()):
            raise DataError("the reference of a KL divergence has values that are not finite")

    def __call__(
        self, output: Float[Tensor, "row class"], rows: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        found = _classes(output, self.name)
        if found.shape[1] != self.reference.shape[1]:
            raise TargetError(
                "the output has other classes than the reference of the KL divergence",
                got=str(found.shape[1]),
                expected=str(self.reference.shape[1]),
            )
        index = _examples(rows, found.shape[0], self.reference.shape[0], self.name)
        reference = self.reference.detach()[index.to(self.reference.device)].to(found)
        divergence: Tensor = torch.nn.functional.kl_div(
            found.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True
        ).sum(1)
        return divergence


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitOf:
    """The logit of one class for each example.

    Shapes: classes (example,), int64; output (row, class). Units: logits.
    Raises: DataError for classes that the output lacks; TargetError for an output that
    is not (row, class).
    Fails when: a part of the network raises all logits alike; that moves this metric and
    no answer. A difference of two logits is blind to it.
    """

    classes: Int[Tensor, "example"]
    position: int | None = -1
    name: str = "logit"

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or self.classes.dtype != torch.int64 or not len(self.classes):
            raise DataError(
                "the metric needs one class for each example",
                got=f"{self.classes.dtype} of shape {tuple(self.classes.shape)}",
                expected="torch.int64 of shape (example,)",
            )
        if int(self.classes.min()) < 0:
            raise DataError("a class is negative", got=str(int(self.classes.min())))

    def __call__(
        self, output: Float[Tensor, "row class"], rows: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        return _taken(output, self.classes[:, None], rows, self.name)[0][:, 0]


def metric_for(pairs: TokenPairs) -> LogitDifference | ProbabilityDifference:
    """The metric that the behaviour is measured by; `rows` are rows of `pairs`."""
    kind = (
        ProbabilityDifference
        if pairs.metric is MetricKind.PROBABILITY_DIFFERENCE
        else LogitDifference
    )
    return kind(correct=pairs.correct, wrong=pairs.wrong, position=pairs.position)


def _classes(output: Tensor, name: str) -> Tensor:
    """The output, if it is one vector of real numbers for each row."""
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.is_floating_point():
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TargetError(
            f"the metric '{name}' takes one row of logits for each example",
            got=f"an output of {got}",
            expected="real numbers of shape (row, class)",
            hint="set position= to the position at which the answer is predicted",
        )
    return output


def _examples(rows: Tensor, num_rows: int, num_examples: int, name: str) -> Tensor:
    """`rows`, if they say for every output row which example it is."""
    if tuple(rows.shape) != (num_rows,) or rows.dtype != torch.int64:
        raise TargetError(
            f"the metric '{name}' needs to know which example each row of the output is",
            got=f"{rows.dtype} of shape {tuple(rows.shape)}",
            expected=f"torch.int64 of shape ({num_rows},)",
        )
    if num_rows and (int(rows.min()) < 0 or int(rows.max()) >= num_examples):
        raise TargetError(
            f"the metric '{name}' has no such example",
            got=f"{int(rows.min())} to {int(rows.max())}",
            expected=f"0 to {num_examples - 1}",
        )
    return rows


def _taken(output: Tensor, answers: Tensor, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Output of each row at its answers, and which of them are no padding: both (row, k)."""
    found = _classes(output, name)
    index = _examples(rows, found.shape[0], answers.shape[0], name)
    chosen = answers[index.to(answers.device)].to(found.device)
    if chosen.numel() and int(chosen.max()) >= found.shape[1]:
        raise DataError(
            f"an answer of the metric '{name}' is outside the vocabulary of the network",
            got=f"class {int(chosen.max())}",
            expected=f"0 to {found.shape[1] - 1}",
        )
    return found.gather(1, chosen.clamp(min=0)), chosen >= 0


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    mean: Tensor = (values * counted).sum(1) / counted.sum(1)
    return mean

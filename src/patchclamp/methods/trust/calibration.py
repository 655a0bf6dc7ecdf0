"""Whether a classifier's confidence means what it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.core.errors import DataError
from patchclamp.core.findings import Interval, Null
from patchclamp.methods.statistics import permutation_null, wilson


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Reliability over bins of equal size.

    Attributes:
        error: expected calibration error.
        interval: of the error, by bootstrap over rows.
        null: the error of a perfectly calibrated network with these confidences.
        confidence, accuracy, count: mean confidence, share correct, rows of each bin.
        accuracy_interval: of each bin's share.
    """

    error: float
    interval: Interval
    null: Null
    confidence: list[float]
    accuracy: list[float]
    count: list[int]
    accuracy_interval: list[Interval]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Expected calibration error in bins of equal numbers of rows.

    The error of finite data is positive even for perfect calibration, so the null draws
    outcomes from the stated confidences and measures the error that they would show.

    Shapes: probabilities (row, class), labels (row).
    Units: share (0..1): mean |confidence - accuracy|.
    Randomness: bootstrap and null draws, by `seed`.  Cost: draws x rows.
    Raises: DataError for fewer rows than bins.
    Fails when: miscalibration in parts of the inputs cancels within a bin.
    Source: Guo et al. 2017, eq. 3; equal-mass bins, Nixon et al. 2019; the null,
        consistency resampling, Broecker & Smith 2007.
    """

    bins: int = 10
    draws: int = 1000
    seed: int = 0

    def run(
        self, probabilities: Float[Tensor, "row class"], labels: Int[Tensor, "row"]
    ) -> CalibrationResult:
        """Measure the top-class calibration."""
        confidence, guess = probabilities.double().max(1)
        return self.judge(confidence, guess == labels)

    def judge(
        self, confidence: Float[Tensor, "row"], right: Bool[Tensor, "row"]
    ) -> CalibrationResult:
        """The same from the confidence of each row's guess and whether it was right."""
        confidence, correct = confidence.double(), right.double()
        num = correct.numel()
        if num < self.bins:
            raise DataError("calibration needs a row for each bin", got=f"{num} rows")
        order = confidence.argsort()
        confidence, correct = confidence[order], correct[order]
        generator = torch.Generator().manual_seed(self.seed)
        error = float(self._error(confidence[None], correct[None])[0])
        fair = torch.rand(self.draws, num, generator=generator, dtype=torch.float64)
        null = self._error(confidence.expand(self.draws, num), (fair < confidence).double())
        rows = torch.randint(num, (self.draws, num), generator=generator).sort(1).values
        drawn = self._error(confidence[rows], correct[rows])
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        parts = [torch.arange(num)[b] for b in torch.arange(num).tensor_split(self.bins)]
        return CalibrationResult(
            error=error,
            interval=Interval(low=low, high=high, method=f"bootstrap over {num} rows"),
            null=permutation_null(
                error, null, "outcomes drawn from the stated confidences (perfect calibration)"
            ),
            confidence=[float(confidence[p].mean()) for p in parts],
            accuracy=[float(correct[p].mean()) for p in parts],
            count=[p.numel() for p in parts],
            accuracy_interval=[wilson(int(correct[p].sum()), p.numel()) for p in parts],
        )

    def _error(
        self, confidence: Float[Tensor, "draw row"], correct: Float[Tensor, "draw row"]
    ) -> Float[Tensor, "draw"]:
        """Expected calibration error of every draw; rows sorted by confidence."""
        num = confidence.shape[1]
        gaps = [
            (c.mean(1) - a.mean(1)).abs() * c.shape[1] / num
            for c, a in zip(
                confidence.tensor_split(self.bins, 1),
                correct.tensor_split(self.bins, 1),
                strict=True,
            )
        ]
        return torch.stack(gaps).sum(0)

"""Gradients at noisy copies of the value: their mean, mean square, and variance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.scoring import Scorer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(Explainer):
    """Mean gradient over copies of the value with Gaussian noise.

    Shapes: inputs (num, *feature); values (num, *site).
    Units: of the target per unit of the value.
    Randomness: the noise, drawn for each example and sample by `seed` and the example itself:
        the same at any number of rows per pass, in any order, in any batch.
    Cost: `num_samples` forward and backward passes an example.
    Raises: InputError for an example whose value is constant: it has no range.
    Fails when: the noise carries the value to where the network was never trained; the mean
        is then smooth, but of another function. A mean over signs cancels.
    Source: Smilkov et al. 2017, arXiv 1706.03825, section 3.

    Attributes:
        noise: standard deviation, as a share of the example's largest less smallest value.
        num_samples: noisy copies of each example.
    """

    name: ClassVar[str] = "smoothgrad"
    is_signed: ClassVar[bool] = False
    source: ClassVar[str] = "Smilkov et al. 2017, arXiv 1706.03825"
    fewest: ClassVar[int] = 1
    """Samples without which the statistic does not exist."""
    squared: ClassVar[bool] = False
    """Squares are added up too."""

    noise: float = 0.15
    num_samples: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.noise < float("inf"):
            raise OptionError("noise must be more than 0 and finite", got=str(self.noise))
        if self.num_samples < self.fewest:
            raise OptionError(
                f"too few samples for {self.name}",
                got=str(self.num_samples),
                expected=f"{self.fewest} or more",
            )

    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """See `Explainer.run`."""
        scorer = Scorer.of(net, inputs, target, at=at)
        rows = torch.arange(scorer.num).repeat_interleave(self.num_samples)
        total = torch.zeros_like(scorer.value, dtype=torch.float64)
        squares = torch.zeros_like(total) if self.squared else total.new_zeros(())
        progress.start(self.name, len(rows), "gradients")
        for piece in scorer.gradients(self._noisy(scorer, rows), rows):
            for row, grad in zip(rows[piece.at].tolist(), piece.grads, strict=True):
                total[row] += grad
                if self.squared:
                    squares[row].addcmul_(grad.double(), grad.double())
            progress.advance(len(piece.grads))
        progress.finish()
        return Attribution(
            method=self.name,
            options=self.options(),
            site=scorer.site,
            axes=scorer.axes,
            values=self._statistic(total, squares).to(scorer.value.dtype),
            scores=scorer.plain,
            passes=scorer.passes,
        )

    def _noisy(self, scorer: Scorer, rows: Tensor) -> Callable[[slice], Tensor]:
        """Makes the noisy copies of a slice of rows."""
        value, known = scorer.value, keys(scorer)
        flat = value.flatten(1)
        ranges = flat.amax(1) - flat.amin(1)
        if bool((ranges == 0).any()):
            raise InputError(
                f"example {int((ranges == 0).nonzero()[0])} has the same value everywhere at "
                f"'{scorer.site}', so that noise as a share of its range is none",
                hint="drop the row",
            )

        def made(at: slice) -> Tensor:
            copies = value[rows[at]]
            for i, k in enumerate(range(at.start, at.stop)):
                row, sample = divmod(k, self.num_samples)
                drawn = torch.randn(
                    value.shape[1:],
                    dtype=value.dtype,
                    generator=generator(known[row], self.seed, sample),
                )
                copies[i] += self.noise * ranges[row] * drawn.to(value.device)
            return copies

        return made

    def _statistic(self, total: Tensor, squares: Tensor) -> Tensor:
        return total / self.num_samples


@dataclass(frozen=True, kw_only=True)
class SmoothGradSquared(SmoothGrad):
    """Mean squared gradient over noisy copies: it has no sign, and none cancels.

    Shapes, randomness, cost, raises: as `SmoothGrad`.
    Units: of the target per unit of the value, squared.
    Fails when: as `SmoothGrad`, but for the signs.
    Source: Hooker et al. 2019, arXiv 1806.10758, section 4.
    """

    name: ClassVar[str] = "smoothgrad_squared"
    source: ClassVar[str] = "Hooker et al. 2019, arXiv 1806.10758"
    squared: ClassVar[bool] = True

    def _statistic(self, total: Tensor, squares: Tensor) -> Tensor:
        return squares / self.num_samples


@dataclass(frozen=True, kw_only=True)
class VarGrad(SmoothGrad):
    """Variance of the gradient over noisy copies: where the network is not linear.

    Shapes, randomness, cost, raises: as `SmoothGrad`.
    Units: of the target per unit of the value, squared.
    Fails when: an element counts linearly: it gets nothing, however much it counts.
    Source: Adebayo et al. 2018, arXiv 1810.03292, appendix.
    """

    name: ClassVar[str] = "vargrad"
    source: ClassVar[str] = "Adebayo et al. 2018, arXiv 1810.03292"
    fewest: ClassVar[int] = 2
    squared: ClassVar[bool] = True

    def _statistic(self, total: Tensor, squares: Tensor) -> Tensor:
        # In float64 of float32 gradients the difference is good to 1e-16 of the mean square.
        scatter = squares - total * total / self.num_samples
        return scatter.clamp(min=0) / (self.num_samples - 1)

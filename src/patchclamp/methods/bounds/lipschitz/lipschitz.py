"""The method: a Lipschitz constant enclosed from above by proof and from below by search."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from patchclamp.core.errors import EngineError, OptionError, nearest
from patchclamp.methods.bounds.lipschitz.layers import Chain
from patchclamp.methods.bounds.lipschitz.lipsdp import Multipliers, certified
from patchclamp.methods.bounds.lipschitz.norm_product import Norm, norm_product, recursive_bound
from patchclamp.methods.bounds.lipschitz.quadratic_constraints import (
    QuadraticForm,
    Ranges,
    activation_widths,
    quadratic_form,
)
from patchclamp.methods.bounds.lipschitz.ranges import Box, activation_ranges, check_box
from patchclamp.methods.bounds.lipschitz.search import Search, steepest
from patchclamp.methods.bounds.lipschitz.solver import SolverOptions, solve


class Method(StrEnum):
    """Where the upper bound comes from, loosest and cheapest first."""

    NORM_PRODUCT = "norm-product"
    RECURSIVE = "recursive"
    LIPSDP_LAYER = "lipsdp-layer"
    LIPSDP = "lipsdp"


@dataclass(frozen=True, kw_only=True)
class SolverAnswer:
    """What a solver said, which no bound relies on.

    Attributes:
        claim: the bound that it believes in; may be too small. It is asked for some tolerances
            more than needed, so that a proved bound slightly below is no contradiction.
        slack: proved bound minus claim.
        status: its own word for how it ended.
        share: of safe multipliers that had to be mixed in for a proof.
    """

    claim: float
    slack: float
    status: str
    share: float


@dataclass(frozen=True, kw_only=True)
class LipschitzBound:
    """A Lipschitz constant lies in [lower, upper].

    Attributes:
        upper: proved, over the reals, for the weights as stored.
        lower: the largest gradient norm found; float64, not proved.
        norm, method: how it was computed.
        local: it holds on a box only.
        solver: what the solver said, one answer for "l2", one an output for "linf".
    """

    upper: float
    lower: float
    norm: Norm
    method: Method
    local: bool
    solver: tuple[SolverAnswer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lipschitz:
    """Upper and lower bound of a chain's Lipschitz constant, everywhere or on a box.

    Options: `norm`, of inputs and outputs alike; `method`; `solver`, which solver looks for
    multipliers and how hard; `search`, for the lower bound.

    Shapes: box, two tensors of num_inputs elements; ranges, see `activation_ranges`.
    Units: output units per input unit.
    Randomness: `search.seed`, lower bound only.
    Cost: norm-product, a decomposition of each weight; recursive, one of each pair of
        activations; lipsdp, a semidefinite program in all inputs and neurons together (100
        neurons: a second with SCS), one an output for "linf".
    Raises: InputError for ranges, boxes or samples that do not fit; EngineError for programs
        that do not fit into memory; MissingExtraError without cvxpy; OptionError.
    Fails when: the solver is stopped early: the bound is then valid and loose, which the
        slack and the share in the result show. Floating-point evaluation of the network is
        not covered: its rounding comes on top.
    Source: Fazlyab et al. 2019; Pauli et al. 2024, arXiv 2401.14033; Combettes & Pesquet 2020.
    """

    norm: Norm = Norm.L2
    method: Method = Method.LIPSDP
    solver: SolverOptions = field(default_factory=SolverOptions)
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        for name, kind in (("norm", Norm), ("method", Method)):
            given = getattr(self, name)
            names = [str(x) for x in kind]
            if str(given) not in names:
                raise OptionError(
                    f"no {name} '{given}'",
                    expected=" or ".join(names),
                    nearest=nearest(str(given), names),
                )
            object.__setattr__(self, name, kind(given))

    def run(
        self,
        chain: Chain,
        *,
        box: Box | None = None,
        ranges: Ranges | None = None,
        samples: Tensor | None = None,
    ) -> LipschitzBound:
        """Bound the chain; see the class.

        Args:
            box: where the bound need hold. Activations whose slope is known there cost nothing.
            ranges: bounds of every activation's input on the box, where better ones are known
                than interval arithmetic gives. Without a box, they say where the bound holds.
            samples: inputs to start the search from, (sample, num_inputs).
        """
        if box is not None:
            box = check_box(box, chain.num_inputs)
            ranges = activation_ranges(chain, box) if ranges is None else ranges
        upper, answers = self._upper(chain, ranges)
        lower = 0.0
        if box is not None or ranges is None:
            lower, _ = steepest(chain, self.norm, self.search, box=box, samples=samples)
        return LipschitzBound(
            upper=upper,
            lower=lower,
            norm=self.norm,
            method=self.method,
            local=ranges is not None,
            solver=answers,
        )

    def _upper(self, chain: Chain, ranges: Ranges | None) -> tuple[float, tuple[SolverAnswer, ...]]:
        if self.method is Method.NORM_PRODUCT:
            return norm_product(chain, self.norm, ranges), ()
        _check_memory(chain, self.solver.memory_limit_gb)
        if self.method is Method.RECURSIVE:
            return recursive_bound(chain, self.norm, ranges), ()
        form = quadratic_form(chain, ranges)
        parts = [form]
        if self.norm is Norm.LINF:
            parts = [form.with_output(slice(i, i + 1)) for i in range(chain.num_outputs)]
        found = [self._solved(part) for part in parts]
        return max(bound for bound, _ in found), tuple(answer for _, answer in found)

    def _solved(self, form: QuadraticForm) -> tuple[float, SolverAnswer]:
        """The smallest bound that any round's multipliers prove."""
        layers = self.method is Method.LIPSDP_LAYER
        rounds: list[tuple[float, SolverAnswer]] = []
        hint: Multipliers | None = None
        while len(rounds) < self.solver.num_rounds and not (hint and hint.well_scaled):
            try:
                hint = solve(form, self.norm, self.solver, layers=layers, before=hint)
            except EngineError:
                if not rounds:
                    raise
                break  # an earlier round's bound stands, with its own status
            proved = certified(form, self.norm, hint)
            answer = SolverAnswer(
                claim=hint.claim,
                slack=proved.bound - hint.claim,
                status=hint.status,
                share=proved.share,
            )
            rounds.append((proved.bound, answer))
        return min(rounds, key=lambda pair: pair[0])


def _check_memory(chain: Chain, limit_gb: float) -> None:
    """Refuse chains whose linear maps alone would not fit; measured at up to 1100 variables."""
    num_variables = chain.num_inputs + sum(activation_widths(chain))
    needed = 20 * 8 * num_variables**2 / 1e9
    if needed > limit_gb:
        raise EngineError(
            f"{num_variables} inputs and neurons together need about {needed:.1f} GB",
            expected=f"at most {limit_gb} GB",
            hint="raise solver.memory_limit_gb, or use Method.NORM_PRODUCT",
        )

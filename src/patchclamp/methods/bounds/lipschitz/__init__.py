"""Lipschitz constants of feed-forward chains: norm products, LipSDP, local bounds.

Source: Fazlyab et al. 2019 (LipSDP); Pauli et al. 2024, arXiv 2401.14033.
"""

from __future__ import annotations

from patchclamp.methods.bounds.lipschitz.activations import (
    gelu,
    leaky_relu,
    max_min,
    relu,
    sigmoid,
    silu,
    tanh,
)
from patchclamp.methods.bounds.lipschitz.layers import (
    Activation,
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Linear,
    Residual,
)
from patchclamp.methods.bounds.lipschitz.lipschitz import (
    Lipschitz,
    LipschitzBound,
    Method,
    SolverAnswer,
)
from patchclamp.methods.bounds.lipschitz.norm_product import Norm
from patchclamp.methods.bounds.lipschitz.ranges import activation_ranges
from patchclamp.methods.bounds.lipschitz.reading import read_chain
from patchclamp.methods.bounds.lipschitz.search import Search
from patchclamp.methods.bounds.lipschitz.solver import Solver, SolverOptions

__all__ = [
    "Activation",
    "Chain",
    "Elementwise",
    "GroupSort",
    "Householder",
    "Linear",
    "Lipschitz",
    "LipschitzBound",
    "Method",
    "Norm",
    "Residual",
    "Search",
    "Solver",
    "SolverAnswer",
    "SolverOptions",
    "activation_ranges",
    "gelu",
    "leaky_relu",
    "max_min",
    "read_chain",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
]

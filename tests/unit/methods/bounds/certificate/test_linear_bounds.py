"""A row carried over one step: what it loses to rounding, in rational arithmetic.

Each test takes the worst point of the box for the rounding errors that really occurred, so
that the invariant fails for about every second row if the loss is not taken off.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.linear_bounds import (
    Bounds,
    Rows,
    affine_interval,
    line_step,
)
from patchclamp.methods.bounds.certificate.network import (
    Affine,
    Elementwise,
    Function,
    Input,
    Network,
    Term,
    csr,
)
from patchclamp.methods.bounds.certificate.replay import Replay

Numbers = NDArray[np.float64]
SIZE, NUM_ROWS = 7, 12


def exact(values: Numbers) -> list[Fraction]:
    return [Fraction(float(v)) for v in values]


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def lowest(a: list[Fraction], lower: Numbers, upper: Numbers) -> Fraction:
    """Minimum of a . x over the box, exactly."""
    ends = zip(a, exact(lower), exact(upper), strict=True)
    return sum((min(c * low, c * high) for c, low, high in ends), Fraction(0))


def started(*steps: Affine | Elementwise, seed: int = 0) -> tuple[Bounds, np.random.Generator]:
    """Bounds of the input on one box; the steps are for the caller to take."""
    rng = np.random.default_rng(seed)
    network = Network(steps=(Input(SIZE), *steps), sha256="")
    bounds = Bounds(network=network, empty=np.zeros(1, bool), unbounded=np.zeros(1, bool))
    centre = rng.normal(size=(1, SIZE))
    bounds.append(centre - 1.5, centre + 1.0, np.zeros((1, SIZE)))
    return bounds, rng


def matrix_step(rng: np.random.Generator, relative: float = 0.0) -> tuple[Affine, Numbers]:
    """Two terms on the same source, one of them sparse, and their sum as a list."""
    dense = rng.normal(size=(SIZE, SIZE)) * 10.0 ** rng.integers(-3, 4, (SIZE, SIZE))
    columns = rng.integers(0, SIZE, SIZE)
    entries = rng.normal(size=SIZE)
    sparse = np.zeros((SIZE, SIZE))
    sparse[np.arange(SIZE), columns] = entries
    terms = (
        Term(source=0, matrix=dense, relative=relative),
        Term(source=0, matrix=csr(entries, columns, np.arange(SIZE + 1), SIZE)),
    )
    bias = rng.normal(size=SIZE)
    return Affine(terms=terms, bias=bias, bias_error=np.zeros(SIZE)), np.stack([dense, sparse])


def test_a_row_over_an_affine_step() -> None:
    step, matrices = matrix_step(np.random.default_rng(4))
    bounds, rng = started(step)
    bounds.append(*affine_interval(bounds, step))
    a = rng.normal(size=(1, NUM_ROWS, SIZE)) * 10.0 ** rng.integers(-2, 3, (1, NUM_ROWS, SIZE))
    rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
    rows._over_affine(1, step, a)
    naive = 0
    for i in range(NUM_ROWS):
        given, kept = exact(a[0, i]), exact(rows.pending[0][0, i])
        true = [
            sum((dot(given, exact(m[:, j])) for m in matrices), Fraction(0)) for j in range(SIZE)
        ]
        constant = dot(given, exact(step.bias))
        gap = [t - k for t, k in zip(true, kept, strict=True)]
        gain = lowest(gap, bounds.lower[0][0], bounds.upper[0][0])
        assert constant + gain >= Fraction(float(rows.constant[0, i]))
        naive += constant + gain < Fraction(float(a[0, i] @ step.bias))
    assert naive > NUM_ROWS // 2


def test_the_interval_of_an_affine_step() -> None:
    """Encloses the exact range, that of every matrix within the stated error included."""
    for relative in (0.0, 1e-9):
        for seed in range(5):
            step, matrices = matrix_step(np.random.default_rng(seed), relative)
            bounds, _ = started(step, seed=seed)
            lower, upper, _ = affine_interval(bounds, step)
            for i in range(SIZE):
                signs = [1 + Fraction(relative), 1 - Fraction(relative)]
                for factor in signs:
                    pairs = zip(exact(matrices[0, i]), exact(matrices[1, i]), strict=True)
                    row = [factor * p + q for p, q in pairs]
                    shift = Fraction(float(step.bias[i]))
                    low = lowest(row, bounds.lower[0][0], bounds.upper[0][0]) + shift
                    high = shift - lowest([-c for c in row], bounds.lower[0][0], bounds.upper[0][0])
                    assert Fraction(float(lower[0, i])) <= low
                    assert high <= Fraction(float(upper[0, i]))
                # Each term is bounded by itself, so that this is what there is to reach.
                box = bounds.lower[0][0], bounds.upper[0][0]
                reach = shift + sum(lowest(exact(m[i]), *box) for m in matrices)
                assert float(reach) - float(lower[0, i]) < 1e-9 + 1e5 * relative


def test_a_row_over_an_elementwise_step_and_into_the_input() -> None:
    """Every choice of lines: given slopes, own slopes, S-shaped functions."""
    naive = 0
    for function in (Function.RELU, Function.TANH):
        step = Elementwise(function=function, source=0, size=SIZE)
        for seed in range(4):
            bounds, rng = started(step, seed=seed)
            line_step(bounds, 1, step)
            a = rng.normal(size=(1, NUM_ROWS, SIZE)) * 10.0 ** rng.integers(-2, 3, SIZE)
            hint = rng.random((1, NUM_ROWS, SIZE))
            rows = Rows(bounds, np.zeros((1, NUM_ROWS)), {1: hint} if seed % 2 else None)
            rows._over_elementwise(1, step, a)
            kept = rows.pending.pop(0)
            lines = bounds.lines[1]
            lower, upper = bounds.lower[0], bounds.upper[0]
            crossing = (lower[0] < 0) & (upper[0] > 0) & bool(seed % 2)
            for i in range(NUM_ROWS):
                below = lines.lower_slope[0]
                if function is Function.RELU:
                    below = np.where(crossing, hint[0, i], below)
                slope = np.where(a[0, i] > 0, below, lines.upper_slope[0])
                shift = np.where(a[0, i] > 0, lines.lower_intercept[0], lines.upper_intercept[0])
                given = exact(a[0, i])
                gap = [
                    c * s - k
                    for c, s, k in zip(given, exact(slope), exact(kept[0, i]), strict=True)
                ]
                true = dot(given, exact(shift)) + lowest(gap, lower[0], upper[0])
                assert true >= Fraction(float(rows.constant[0, i]))
                naive += true < Fraction(float(a[0, i] @ shift))
    assert naive > 40


def test_a_row_at_the_input() -> None:
    bounds, rng = started()
    a = rng.normal(size=(1, NUM_ROWS, SIZE)) * 10.0 ** rng.integers(-2, 3, (1, NUM_ROWS, SIZE))
    rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
    rows.add(0, a)
    found = rows.lowest()
    for i in range(NUM_ROWS):
        true = lowest(exact(a[0, i]), bounds.lower[0][0], bounds.upper[0][0])
        assert Fraction(float(found[0, i])) <= true
        assert true - Fraction(float(found[0, i])) < 1e-10 * np.abs(a[0, i]).sum()


def test_adding_coefficients() -> None:
    bounds, rng = started()
    first, second = rng.normal(size=(2, 1, NUM_ROWS, SIZE))
    rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
    rows.add(0, first)
    rows.add(0, second * 1e-5)
    for i in range(NUM_ROWS):
        parts = zip(exact(first[0, i]), exact(second[0, i] * 1e-5), strict=True)
        kept = exact(rows.pending[0][0, i])
        gap = [p + q - k for (p, q), k in zip(parts, kept, strict=True)]
        true = lowest(gap, bounds.lower[0][0], bounds.upper[0][0])
        assert true >= Fraction(float(rows.constant[0, i]))
        assert true < 0


def test_weighted_rows() -> None:
    """weights @ rows is rounded, and what that may change comes off; a single weight 1 is exact."""
    step, _ = matrix_step(np.random.default_rng(4))
    bounds, rng = started(step)
    bounds.append(*affine_interval(bounds, step))
    replay = Replay(bounds.network)
    rows, offsets = rng.normal(size=(5, SIZE)), rng.normal(size=5)
    naive = 0
    for _ in range(20):
        weights = rng.random((1, 5))
        mixed = replay._mixed(bounds, weights, rows, offsets)
        kept = exact(mixed.pending[1][0, 0])
        w = exact(weights[0])
        gap = [dot(w, exact(rows[:, j])) - kept[j] for j in range(SIZE)]
        true = dot(w, exact(offsets)) + lowest(gap, bounds.lower[1][0], bounds.upper[1][0])
        assert true >= Fraction(float(mixed.constant[0, 0]))
        naive += true < Fraction(float(weights[0] @ offsets))
    assert naive > 10
    single = replay._mixed(bounds, np.eye(5)[2:3], rows, offsets)
    assert single.constant[0, 0] == offsets[2]
    assert np.array_equal(single.pending[1][0, 0], rows[2])

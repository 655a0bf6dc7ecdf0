"""A row carried over one step: what it loses to rounding, in rational arithmetic.

Each test takes the worst point of the box for the rounding errors that really occurred, so
that the invariant fails for about every second row if the loss is not taken off.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.linear_bounds import (
    Bounds,
    Rows,
    affine_interval,
    elementwise_interval,
    elementwise_noise,
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
from patchclamp.methods.bounds.certificate.relaxations import Lines
from patchclamp.methods.bounds.certificate.replay import Replay, Splits

Numbers = NDArray[np.float64]
SIZE, NUM_ROWS = 30, 12


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
    """One matrix and no bias: all that is lost is what the product's rounding may cost."""
    rng = np.random.default_rng(4)
    for bias in (np.zeros(SIZE), rng.normal(size=SIZE)):
        matrix = rng.normal(size=(SIZE, SIZE)) * 10.0 ** rng.integers(-3, 4, (SIZE, SIZE))
        step = Affine(terms=(Term(source=0, matrix=matrix),), bias=bias, bias_error=np.zeros(SIZE))
        bounds, rng = started(step)
        bounds.append(*affine_interval(bounds, step))
        a = rng.normal(size=(1, NUM_ROWS, SIZE)) * 10.0 ** rng.integers(-2, 3, SIZE)
        rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
        rows._over_affine(1, step, a.copy())
        naive = 0
        for i in range(NUM_ROWS):
            given, kept = exact(a[0, i]), exact(rows.pending[0][0, i])
            gap = [dot(given, exact(matrix[:, j])) - kept[j] for j in range(SIZE)]
            true = dot(given, exact(bias)) + lowest(gap, bounds.lower[0][0], bounds.upper[0][0])
            assert true >= Fraction(float(rows.constant[0, i]))
            naive += true < Fraction(float(a[0, i] @ bias))
        assert naive > NUM_ROWS // 2


def test_a_row_over_two_terms() -> None:
    step, matrices = matrix_step(np.random.default_rng(4))
    bounds, rng = started(step)
    bounds.append(*affine_interval(bounds, step))
    a = rng.normal(size=(1, NUM_ROWS, SIZE))
    rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
    rows._over_affine(1, step, a.copy())
    for i in range(NUM_ROWS):
        given, kept = exact(a[0, i]), exact(rows.pending[0][0, i])
        parts = [[dot(given, exact(m[:, j])) for j in range(SIZE)] for m in matrices]
        gap = [p + q - k for p, q, k in zip(*parts, kept, strict=True)]
        true = dot(given, exact(step.bias))
        true += lowest(gap, bounds.lower[0][0], bounds.upper[0][0])
        assert true >= Fraction(float(rows.constant[0, i]))


def test_the_interval_of_an_affine_step() -> None:
    """Encloses the exact range, that of every matrix within the stated error included."""
    for relative in (0.0, 1e-9):
        for seed in range(2):
            step, matrices = matrix_step(np.random.default_rng(seed), relative)
            bounds, _ = started(step, seed=seed)
            lower, upper, _ = affine_interval(bounds, step)
            for i in range(0, SIZE, 3):
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


def test_a_row_over_an_elementwise_step() -> None:
    """Lines with no intercept, where slopes are rounded, and with large ones, where sums are."""
    step = Elementwise(function=Function.RELU, source=0, size=SIZE)
    for size in (0.0, 1e8):
        naive = 0
        for sign in (-1.0, 1.0):
            bounds, rng = started(step, seed=int(sign) + 1)
            slopes, shifts = rng.random((2, 1, SIZE)), size * rng.normal(size=(2, 1, SIZE))
            a = sign * np.abs(rng.normal(size=(1, NUM_ROWS, SIZE)))
            half = SIZE // 2  # Sums that almost cancel, so that their errors are large beside them.
            shifts[..., half:] = -shifts[..., :half]
            a[..., half:] = a[..., :half] * (1 + 1e-9 * rng.normal(size=half))
            lines = Lines(slopes[0], shifts[0], slopes[1], shifts[1])
            bounds.append(*bounds_of(bounds), elementwise_noise(bounds, step, lines))
            bounds.lines[1] = lines
            rows = Rows(bounds, np.zeros((1, NUM_ROWS)))
            rows._over_elementwise(1, step, a.copy())
            side = 0 if sign > 0 else 1
            slope, shift = slopes[side, 0], shifts[side, 0]
            for i in range(NUM_ROWS):
                given, kept = exact(a[0, i]), exact(rows.pending[0][0, i])
                parts = zip(given, exact(slope), kept, strict=True)
                gap = [c * s - k for c, s, k in parts]
                true = dot(given, exact(shift)) + lowest(gap, *(b[0] for b in bounds_of(bounds)))
                assert true >= Fraction(float(rows.constant[0, i]))
                naive += true < Fraction(float(a[0, i] @ shift))
        assert naive > NUM_ROWS // 4


def bounds_of(bounds: Bounds) -> tuple[Numbers, Numbers]:
    return bounds.lower[0], bounds.upper[0]


def test_slopes_given_for_crossing_neurons_only() -> None:
    """A neuron that is always on keeps slope 1, whatever the hint says; hints stay in [0, 1]."""
    step = Elementwise(function=Function.RELU, source=0, size=4)
    network = Network(steps=(Input(4), step), sha256="")
    bounds = Bounds(network=network, empty=np.zeros(1, bool), unbounded=np.zeros(1, bool))
    lower, upper = np.array([[1.0, -2.0, -1.0, -1.0]]), np.array([[2.0, -1.0, 1.0, 1.0]])
    bounds.append(lower, upper, np.zeros((1, 4)))
    bounds.append(*elementwise_interval(bounds, 1, step))
    rows = Rows(bounds, np.zeros((1, 1)), {1: np.array([[[0.5, 0.5, 7.0, -3.0]]])})
    rows._over_elementwise(1, step, np.ones((1, 1, 4)))
    assert rows.pending[0].tolist() == [[[1.0, 0.0, 1.0, 0.0]]]


def test_a_row_at_the_input() -> None:
    """Long sums that cancel, so that the rounding is large beside the result."""
    size, num = 200, 40
    rng = np.random.default_rng(0)
    for radius in (0.0, 1e-3):
        bounds = Bounds(
            network=Network(steps=(Input(size),), sha256=""),
            empty=np.zeros(1, bool),
            unbounded=np.zeros(1, bool),
        )
        centre = rng.normal(size=(1, size))
        bounds.append(centre - radius, centre + radius, np.zeros((1, size)))
        a = rng.normal(size=(1, num, size))
        rows = Rows(bounds, np.zeros((1, num)))
        rows.add(0, a.copy())
        found = rows.lowest()
        plain = np.maximum(a, 0) @ bounds.lower[0][0] + np.minimum(a, 0) @ bounds.upper[0][0]
        naive = 0
        for i in range(num):
            true = lowest(exact(a[0, i]), bounds.lower[0][0], bounds.upper[0][0])
            assert Fraction(float(found[0, i])) <= true
            assert true - Fraction(float(found[0, i])) < 1e-10
            naive += Fraction(float(np.nextafter(np.nextafter(plain[0, i], -9), -9))) > true
        assert naive > 3


def test_errors_of_the_network_itself_reach_refined_intervals() -> None:
    """A bias that is 0.25 off and weights that are 1 % off widen the bounds by as much."""
    mixing = np.array([[1.0, 1.0], [2.0, -1.0]])
    first = Affine(terms=(Term(source=0, matrix=mixing),), bias=np.zeros(2), bias_error=np.zeros(2))
    second = Affine(
        terms=(Term(source=2, matrix=np.array([[4.0, -4.0]]), relative=0.01),),
        bias=np.array([-6.0]),
        bias_error=np.array([0.25]),
    )
    relus = [Elementwise(function=Function.RELU, source=i, size=n) for i, n in ((1, 2), (3, 1))]
    network = Network(steps=(Input(2), first, relus[0], second, relus[1]), sha256="")
    layers = Replay(network).layers(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    # On [1, 2]^2 all is positive up to y = 8 x1 - 4 x0 - 6: from -6 at (2, 1), where both
    # neurons are 3, to 6 at (1, 2), where they are 3 and 0. Intervals alone say -10.
    assert -7.0 < layers.lower[3][0, 0] <= -6 - 0.25 - 0.04 * (3 + 3)
    assert 7.0 > layers.upper[3][0, 0] >= 6 + 0.25 + 0.04 * 3


def test_multipliers_of_splits() -> None:
    """Six on one neuron: their sums are rounded, and what that may cost comes off."""
    rng = np.random.default_rng(1)
    step, _ = matrix_step(np.random.default_rng(4))
    relu = Elementwise(function=Function.RELU, source=1, size=SIZE)
    bounds, _ = started(step, relu)
    bounds.append(*affine_interval(bounds, step))
    replay, num, depth = Replay(bounds.network), 20, 6
    shape = (num, depth)
    magnitude = np.repeat(bounds.magnitude[1], num, axis=0)
    many = replace(bounds, empty=np.zeros(num, bool), magnitude=[magnitude[:, :0], magnitude])
    splits = Splits(
        layer=np.zeros(shape, np.int32),
        index=np.full(shape, 3, np.int32),
        point=rng.normal(size=shape),
        above=rng.random(shape) < 0.5,
    )
    multipliers = np.abs(rng.normal(size=shape)) * 10.0 ** rng.integers(-9, 9, shape)
    rows = Rows(many, np.zeros((num, 1)))
    replay._pull(rows, splits, multipliers)
    naive = 0
    for i in range(num):
        signs = [-1 if above else 1 for above in splits.above[i]]
        force = [s * m for s, m in zip(signs, exact(multipliers[i]), strict=True)]
        true = -dot(force, exact(splits.point[i]))
        gap = sum(force, Fraction(0)) - Fraction(float(rows.pending[1][i, 0, 3]))
        true += min(gap * end for end in exact(np.array([-1.0, 1.0]) * magnitude[i, 3]))
        assert true >= Fraction(float(rows.constant[i, 0]))
        plain = -(np.array(signs) * multipliers[i] * splits.point[i]).sum()
        naive += true < Fraction(float(np.nextafter(plain, -np.inf)))
    assert naive > 5


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

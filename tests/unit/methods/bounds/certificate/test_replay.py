"""Bounds of whole networks: sound against samples and exact arithmetic, tight where they can be."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.certificate.form import INPUT, LEAF
from patchclamp.methods.bounds.certificate.replay import Replay, Splits
from tests.unit.methods.bounds.certificate.small_networks import (
    conv_residual,
    f32,
    mlp,
    node,
    packed,
)

Numbers = NDArray[np.float64]
FUNCTIONS = ["Relu", "LeakyRelu", "Sigmoid", "Tanh"]


def both(size: int) -> tuple[Numbers, Numbers]:
    """Rows that bound each output from below and from above."""
    return np.concatenate([np.eye(size), -np.eye(size)]), np.zeros(2 * size)


def samples(lower: Numbers, upper: Numbers, num: int) -> Numbers:
    rng = np.random.default_rng(7)
    inside = lower + (upper - lower) * rng.random((num, len(lower)))
    corners = np.where(rng.random((num // 4, len(lower))) < 0.5, lower, upper)
    return np.clip(np.concatenate([inside, corners]), lower, upper)


def networks() -> list[tuple[str, bytes, float]]:
    found = [(f"mlp {f}", mlp([4, 8, 7, 3], seed=2, function=f)[0], 0.4) for f in FUNCTIONS]
    return found + [(f"conv {f}", conv_residual(function=f), 0.1) for f in ("Relu", "Tanh")]


@pytest.mark.parametrize(("name", "data", "radius"), networks(), ids=[n[0] for n in networks()])
def test_samples_lie_inside_and_smaller_boxes_are_tighter(
    name: str, data: bytes, radius: float
) -> None:
    replay = Replay(data)
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(3, replay.network.num_inputs))
    rows, offsets = both(replay.network.num_outputs)
    wide = replay.margins(centre - radius, centre + radius, rows, offsets)
    narrow = replay.margins(centre - radius / 4, centre + radius / 4, rows, offsets)
    assert np.isfinite(wide).all()
    for i in range(3):
        x = samples(centre[i] - radius, centre[i] + radius, 10_000 if "mlp" in name else 2_000)
        values = replay.network.forward(x) @ rows.T
        assert (wide[i] <= values.min(axis=0) + 1e-12).all()
        assert (wide[i] > values.min(axis=0) - 4.0).all()
    assert (narrow.reshape(3, 2, -1).sum(axis=1) > wide.reshape(3, 2, -1).sum(axis=1)).all()


def exact_output(layers: list, x: Numbers) -> list[Fraction]:
    values = [Fraction(float(v)) for v in x]
    for i, (w, b) in enumerate(layers):
        values = [
            sum(
                (Fraction(float(c)) * v for c, v in zip(row, values, strict=True)),
                Fraction(float(s)),
            )
            for row, s in zip(w, b, strict=True)
        ]
        if i < len(layers) - 1:
            values = [max(v, Fraction(0)) for v in values]
    return values


def test_radius_0_encloses_the_exact_value() -> None:
    """In rational arithmetic; plain float64 is on the wrong side of it about half of the time."""
    data, layers = mlp([5, 12, 11, 4], seed=5)
    replay = Replay(data)
    x = np.random.default_rng(3).normal(size=(12, 5))
    rows, offsets = both(4)
    found = replay.margins(x, x, rows, offsets)
    plain = replay.network.forward(x)
    wrong = 0
    for i in range(len(x)):
        exact = exact_output(layers, x[i])
        for j, value in enumerate(exact):
            assert Fraction(float(found[i, j])) <= value <= -Fraction(float(found[i, 4 + j]))
            assert -found[i, 4 + j] - found[i, j] < 1e-10
            wrong += Fraction(float(plain[i, j])) > value
    assert wrong > 8


def test_first_layer_is_exact_to_rounding() -> None:
    """An affine network's bounds are attained at corners, up to what rounding may have done."""
    data, ((w, b),) = mlp([6, 3], seed=1)
    replay = Replay(data)
    lower, upper = -np.full((1, 6), 0.3), np.full((1, 6), 0.7)
    rows, offsets = both(3)
    corners = np.array(list(product([-0.3, 0.7], repeat=6)))
    values = corners @ w.T.astype(np.float64) + b
    found = replay.margins(lower, upper, rows, offsets)[0]
    assert np.allclose(found, np.concatenate([values.min(0), -values.max(0)]), atol=1e-12)


def test_lines_by_hand() -> None:
    """y = relu(x) - relu(x - 1) on [-1, 3], by the lines one would draw."""
    weights = {"w": np.ones((1, 2), np.float32), "b": np.array([0, -1], np.float32)}
    weights |= {"v": np.array([[1], [-1]], np.float32)}
    nodes = [node("Gemm", "x w b", "h"), node("Relu", "h", "a"), node("MatMul", "a v", "y")]
    replay = Replay(packed(nodes, weights, (1, 1)))
    lower, upper = np.array([[-1.0]]), np.array([[3.0]])
    # relu(x) >= x, relu(x - 1) <= (x + 1) / 2: y >= (x - 1) / 2 >= -1.
    # relu(x) <= 3 (x + 1) / 4, relu(x - 1) >= 0 (2 > 2 fails): y <= 3.
    found = replay.margins(lower, upper, np.array([[1.0], [-1.0]]), np.zeros(2))[0]
    assert found == pytest.approx([-1.0, -3.0], abs=1e-12)


def test_backward_bounds_beat_intervals() -> None:
    """x - x through two matrices is 0; intervals do not know it, lines do."""
    weights = {"w": f32(np.random.default_rng(0), 3, 3)}
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "x w", "b"),
        node("Sub", "a b", "d"),
        node("Relu", "d", "y"),
    ]
    replay = Replay(packed(nodes, weights, (1, 3)))
    found = replay.margins(-np.ones((1, 3)), np.ones((1, 3)), *both(3))
    assert np.abs(found).max() < 1e-10


def test_boxes_do_not_influence_each_other() -> None:
    data, _ = mlp([4, 9, 8, 3], seed=4)
    replay = Replay(data)
    rng = np.random.default_rng(0)
    centre, radius = rng.normal(size=(7, 4)), rng.random((7, 1))
    rows, offsets = both(3)
    together = replay.margins(centre - radius, centre + radius, rows, offsets)
    for i in range(7):
        box = slice(i, i + 1)
        alone = replay.margins(centre[box] - radius[box], centre[box] + radius[box], rows, offsets)
        # More rows may be refined beside boxes that want more, which only helps.
        assert (together[i] >= alone[0] - 1e-9).all()


def test_values_out_of_range_prove_nothing() -> None:
    weights = {"w": np.full((2, 2), 3e38, np.float32)}
    nodes = [node("MatMul", "x w", "h0")]
    for i in range(9):
        nodes += [node("Relu", f"h{i}", f"r{i}"), node("MatMul", f"r{i} w", f"h{i + 1}")]
    nodes.append(node("Sigmoid", "h9", "y"))
    replay = Replay(packed(nodes, weights, (1, 2)))
    found = replay.margins(np.zeros((1, 2)), np.ones((1, 2)), np.eye(2), np.ones(2))
    assert (found == -np.inf).all()


@pytest.mark.parametrize(
    ("lower", "upper"),
    [([0.0, 0.0], [1.0, -1.0]), ([0.0, 0.0], [np.inf, 1.0]), ([np.nan, 0], [1, 1]), ([0.0], [1.0])],
)
def test_bad_boxes(lower: list[float], upper: list[float]) -> None:
    replay = Replay(mlp([2, 3, 1])[0])
    with pytest.raises(InputError, match="box"):
        replay.margins(np.array([lower]), np.array([upper]), np.ones((1, 1)), np.zeros(1))


# Proofs by neuron.


def paths(*leaves: list[tuple[int, int, float, bool]]) -> Splits:
    depth = max(1, *(len(leaf) for leaf in leaves))
    full = [leaf + [(LEAF, 0, 0.0, False)] * (depth - len(leaf)) for leaf in leaves]
    return Splits(
        layer=np.array([[s[0] for s in leaf] for leaf in full], np.int32),
        index=np.array([[s[1] for s in leaf] for leaf in full], np.int32),
        point=np.array([[s[2] for s in leaf] for leaf in full]),
        above=np.array([[s[3] for s in leaf] for leaf in full]),
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_neuron_margins_hold_for_the_samples_of_their_leaf(function: str) -> None:
    """Any slopes, multipliers and points, also silly ones; all splits of two neurons."""
    data, _ = mlp([3, 6, 5, 2], seed=8, function=function)
    replay, rng = Replay(data), np.random.default_rng(2)
    lower, upper = -np.ones(3), np.ones(3)
    x = samples(lower, upper, 4_000)
    values, arguments = [x], []
    for step in replay.network.steps[1:]:
        source = step.terms[0].source if hasattr(step, "terms") else step.source
        part = values[source]
        values.append(_apply(step, part))
        if not hasattr(step, "terms"):
            arguments.append(part)
    rows, offsets = np.array([[1.0, -1.0], [0.5, 2.0]]), np.array([0.1, -0.3])
    layers = replay.layers(
        lower,
        upper,
        {"1.0": rng.uniform(-0.5, 1.5, (2, 5, 6)).astype(np.float32)},
    )
    for trial in range(6):
        cuts = [(0, trial, 0.1 * trial, s) for s in (False, True)]
        other = [(1, trial % 5, -0.1, s) for s in (False, True)]
        first = [(INPUT, trial % 3, 0.2, s) for s in (False, True)]
        leaves = [[a, b, c] for a in cuts for b in other for c in first]
        weights = rng.random((8, 2))
        slopes = [rng.uniform(-1, 2, (8, n)).astype(np.float32) for n in (6, 5)]
        multipliers = rng.exponential(size=(8, 3)).astype(np.float32)
        found = replay.neuron_margins(
            layers, paths(*leaves), rows, offsets, weights, slopes, multipliers
        )
        for i, leaf in enumerate(leaves):
            inside = np.ones(len(x), bool)
            for layer, index, point, above in leaf:
                value = (x if layer == INPUT else arguments[layer])[:, index]
                inside &= value >= point if above else value <= point
            y = (values[-1][inside] @ rows.T + offsets) @ weights[i]
            assert y.min(initial=np.inf) >= found[i] - 1e-12


def _apply(step: object, x: Numbers) -> Numbers:
    from patchclamp.methods.bounds.certificate.network import Affine, Elementwise, apply

    if isinstance(step, Affine):
        return step.terms[0].after(x) + step.bias
    assert isinstance(step, Elementwise)
    return apply(step, x)


def test_multipliers_close_what_slopes_alone_do_not() -> None:
    """y = relu(a) with a = x0 + x1; b = a - 0.5 is divided at 0.25, and b >= 0.25 says a >= 0.75
    only through its multiplier."""
    weights = {
        "w": np.array([[1, 1], [1, 1]], np.float32),
        "b": np.array([0, -0.5], np.float32),
        "v": np.array([[1], [0]], np.float32),
    }
    nodes = [node("Gemm", "x w b", "h"), node("Relu", "h", "a"), node("MatMul", "a v", "y")]
    replay = Replay(packed(nodes, weights, (1, 2)))
    layers = replay.layers(-np.ones(2), np.ones(2))
    splits = paths([(0, 1, 0.25, True)])
    arguments = (layers, splits, np.ones((1, 1)), np.zeros(1), np.ones((1, 1)))
    slopes = [np.ones((1, 2), np.float32)]
    without = replay.neuron_margins(*arguments, slopes, np.zeros((1, 1), np.float32))
    with_one = replay.neuron_margins(*arguments, slopes, np.ones((1, 1), np.float32))
    assert without[0] < -1.9
    assert with_one[0] == pytest.approx(0.75, abs=1e-12)


def test_slopes_are_used() -> None:
    """Slope 0 proves relu >= 0 where the default line through the origin does not."""
    data = packed([node("Relu", "x", "y")], {}, (1, 1))
    replay = Replay(data)
    layers = replay.layers(np.array([-1.0]), np.array([2.0]))
    arguments = (layers, paths([]), np.ones((1, 1)), np.zeros(1), np.ones((1, 1)))
    own = replay.neuron_margins(*arguments)
    given = replay.neuron_margins(*arguments, [np.zeros((1, 1), np.float32)])
    assert own[0] == pytest.approx(-1.0)
    assert given[0] == pytest.approx(0.0)


def test_slopes_of_layers_are_used() -> None:
    """relu(x) - x >= 0 and x - relu(x) <= 0 on [-2, 1] need slope 1, the default is 0."""
    nodes = [
        node("Relu", "x", "a"),
        node("Sub", "a x", "p"),
        node("Sub", "x a", "n"),
        node("Concat", "p n", "h", axis=1),
        node("Relu", "h", "y"),
    ]
    replay = Replay(packed(nodes, {}, (1, 1)))
    for side, neuron in ((0, 0), (1, 1)):
        slopes = np.zeros((2, 2, 1), np.float32)
        slopes[side, neuron] = 1
        argument = replay.network.operator(1).source
        for given, expected in ((slopes, 0.0), (1 - slopes, -1.0)):
            layers = replay.layers(np.array([-2.0]), np.array([1.0]), {"1.0": given})
            found = (layers.lower[argument][0, 0], -layers.upper[argument][0, 1])[side]
            assert found == pytest.approx(expected, abs=1e-12)


def test_one_neuron_divided_twice() -> None:
    """-relu(x0) + relu(x1) with x0 in [-0.5, 0.5] and x1 >= 0.25 is at least -0.25."""
    replay = Replay(packed([node("Relu", "x", "y")], {}, (1, 2)))
    layers = replay.layers(-np.ones(2), np.ones(2))
    splits = paths([(0, 0, 0.5, False), (0, 0, -0.5, True), (0, 1, 0.25, True)])
    arguments = (layers, splits, np.array([[-1.0, 1.0]]), np.zeros(1), np.ones((1, 1)))
    assert replay.neuron_margins(*arguments)[0] == pytest.approx(-0.25, abs=1e-12)
    # More than the slope of the row: the minimum moves to the other end, as by hand.
    for multipliers, expected in (([0.5, 0, 0], -0.25), ([0, 0.5, 0], -0.75), ([0, 0, 2], -1.0)):
        given = np.array([multipliers], np.float32)
        found = replay.neuron_margins(*arguments, (), given)
        assert found[0] == pytest.approx(expected, abs=1e-12)


def test_empty_leaf_is_closed_and_a_touching_one_is_not() -> None:
    data = packed([node("Relu", "x", "a"), node("Neg", "a", "y")], {}, (1, 1))
    replay = Replay(data)
    layers = replay.layers(np.array([-1.0]), np.array([1.0]))
    splits = paths([(0, 0, 1.5, True)], [(0, 0, 1.0, True)], [(INPUT, 0, 1.5, True)])
    found = replay.neuron_margins(layers, splits, np.ones((1, 1)), np.zeros(1), np.ones((3, 1)))
    assert found[0] == np.inf
    assert found[1] == pytest.approx(-1.0)
    assert found[2] == np.inf


def test_argument_that_is_itself_nonlinear_can_be_divided() -> None:
    """tanh(relu(x)) divided where relu(x) >= 0.5: at least tanh(0.5); relu(x) <= -0.1: empty."""
    replay = Replay(packed([node("Relu", "x", "a"), node("Tanh", "a", "y")], {}, (1, 1)))
    layers = replay.layers(np.array([-1.0]), np.array([1.0]))
    splits = paths([(1, 0, 0.5, True)], [(1, 0, -0.1, False)])
    multipliers = np.full((2, 1), 2.0, np.float32)
    arguments = (layers, splits, np.ones((1, 1)), np.zeros(1), np.ones((2, 1)), ())
    found = replay.neuron_margins(*arguments, multipliers)
    assert np.tanh(0.5) - 0.75 < found[0] <= np.tanh(0.5)
    assert found[1] == np.inf

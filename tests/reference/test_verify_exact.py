"""The verifier against exact minima of ReLU networks, found by mixed-integer programming."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from patchclamp.methods.bounds.certificate.check import check
from patchclamp.methods.bounds.counterexample import Standing
from patchclamp.methods.bounds.property import Case, Property
from patchclamp.methods.bounds.verify import Answer, Verify
from tests.unit.methods.bounds.certificate.small_networks import Array, mlp


def exact_minimum(layers: list[tuple[Array, Array]], low: Array, high: Array) -> float:
    """The smallest first output over a box: big-M encoding, solved to a gap of 0 by HiGHS."""
    num_in = len(low)
    sizes = [len(b) for _, b in layers]
    num_hidden = sum(sizes[:-1])
    # variables: x, then for every hidden layer h (after ReLU), then its binaries, then y
    total = num_in + 2 * num_hidden + sizes[-1]
    lower, upper = np.full(total, -np.inf), np.full(total, np.inf)
    lower[:num_in], upper[:num_in] = low, high
    rows: list[tuple[Array, float, float]] = []
    start, before, least, most = num_in, 0, low, high
    for number, (w, b) in enumerate(layers):
        w, b = w.astype(np.float64), b.astype(np.float64)
        low_z = np.maximum(w, 0) @ least + np.minimum(w, 0) @ most + b
        high_z = np.maximum(w, 0) @ most + np.minimum(w, 0) @ least + b
        n = len(b)
        last = number == len(layers) - 1
        for i in range(n):
            z = np.zeros(total)
            z[before : before + w.shape[1]] = w[i]
            if last:
                z[start + i] = -1
                rows.append((z, -b[i], -b[i]))
                continue
            h, d = start + i, start + n + i
            lower[h], upper[h] = 0, max(high_z[i], 0)
            lower[d], upper[d] = 0, 1
            above = -z.copy()
            above[h] += 1
            rows.append((above, b[i], np.inf))  # h >= z
            below = above.copy()
            below[d] = -low_z[i]
            rows.append((below, -np.inf, b[i] - low_z[i]))  # h <= z - l (1 - d)
            off = np.zeros(total)
            off[h], off[d] = 1, -max(high_z[i], 0)
            rows.append((off, -np.inf, 0))  # h <= u d
        before, start = start, start + (n if last else 2 * n)
        least, most = np.maximum(low_z, 0), np.maximum(high_z, 0)
    integral = np.zeros(total)
    at = num_in
    for n in sizes[:-1]:
        integral[at + n : at + 2 * n] = 1
        at += 2 * n
    cost = np.zeros(total)
    cost[at] = 1
    found = milp(
        cost,
        constraints=LinearConstraint(
            np.array([r for r, _, _ in rows]), [a for _, a, _ in rows], [b for _, _, b in rows]
        ),
        bounds=Bounds(lower, upper),
        integrality=integral,
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return float(found.fun)


def below(low: Array, high: Array, threshold: float, num_outputs: int = 1) -> Property:
    """Unsafe where the first output is at most the threshold."""
    row = np.eye(1, num_outputs)
    case = Case(
        lower=low,
        upper=high,
        rows=row,
        offsets=np.array([-threshold]),
        input_rows=np.zeros((0, len(low))),
        input_offsets=np.zeros(0),
    )
    return Property(cases=(case,), num_inputs=len(low), num_outputs=num_outputs)


@pytest.mark.parametrize(
    ("sizes", "few_inputs"),
    [((2, 10, 10, 1), 16), ((4, 8, 8, 1), 16), ((4, 8, 8, 1), 0), ((20, 6, 6, 1), 16)],
    ids=["by input", "by input, 4", "by neuron, 4", "by neuron, 20"],
)
def test_answers_on_both_sides_of_the_exact_minimum(
    sizes: tuple[int, ...], few_inputs: int, tmp_path: Path
) -> None:
    for seed in range(2):
        data, layers = mlp(sizes, seed=seed)
        path = tmp_path / f"{seed}.onnx"
        path.write_bytes(data)
        low, high = np.full(sizes[0], -1.0), np.full(sizes[0], 1.0)
        least = exact_minimum(layers, low, high)
        solver = Verify(timeout=30, few_inputs=few_inputs)
        text = tmp_path / "property.vnnlib"
        text.write_text(f"; {seed}")

        safe = below(low, high, least - 0.01)
        proved = solver.run(path, safe, text)
        assert proved.answer is Answer.UNSAT
        assert proved.certificate is not None
        assert check(proved.certificate, path, safe, text).valid

        unsafe = solver.run(path, below(low, high, least + 0.01), text)
        assert unsafe.answer is Answer.SAT
        found = unsafe.counterexample
        assert found is not None
        assert found.standing is Standing.EXACT
        assert found.y[0] <= least + 0.01
        assert found.y[0] >= least - 1e-6


def test_exact_minimum_is_the_smallest_over_the_pieces() -> None:
    """The peer itself, on a network small enough to try every pattern of signs."""
    _, layers = mlp((2, 4, 1), seed=3)
    low, high = np.full(2, -1.0), np.full(2, 1.0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 401)] * 2), -1).reshape(-1, 2)
    (w, b), (v, c) = layers
    on_grid = np.maximum(grid @ w.T + b, 0) @ v.T + c
    least = exact_minimum(layers, low, high)
    assert least <= on_grid.min() + 1e-6
    assert least >= on_grid.min() - 0.02


def test_a_proof_of_one_threshold_does_not_serve_another(tmp_path: Path) -> None:
    data, layers = mlp((2, 12, 12, 1), seed=0)
    path, text = tmp_path / "n.onnx", tmp_path / "p.vnnlib"
    path.write_bytes(data)
    text.write_text("; p")
    low, high = np.full(2, -1.0), np.full(2, 1.0)
    least = exact_minimum(layers, low, high)
    proved = Verify(timeout=60).run(path, below(low, high, least - 0.05), text)
    assert proved.certificate is not None
    for threshold in (least + 0.001, least + 1.0):
        assert not check(proved.certificate, path, below(low, high, threshold), text).valid


@pytest.mark.parametrize("function", ["Tanh", "Sigmoid"])
@pytest.mark.parametrize("num_inputs", [3, 20])
def test_smooth_networks_are_never_proved_above_a_sample(
    function: str, num_inputs: int, tmp_path: Path
) -> None:
    data, layers = mlp((num_inputs, 8, 8, 1), seed=1, function=function)
    path, text = tmp_path / "n.onnx", tmp_path / "p.vnnlib"
    path.write_bytes(data)
    text.write_text("; p")
    low, high = np.full(num_inputs, -0.3), np.full(num_inputs, 0.3)
    corners = np.array(list(itertools.product([-0.3, 0.3], repeat=min(num_inputs, 10))))
    x = np.zeros((len(corners), num_inputs))
    x[:, : corners.shape[1]] = corners
    value = x
    squash = np.tanh if function == "Tanh" else lambda t: 1 / (1 + np.exp(-t))
    for i, (w, b) in enumerate(layers):
        value = value @ w.T.astype(float) + b
        value = squash(value) if i < len(layers) - 1 else value
    sampled = float(value.min())
    solver = Verify(timeout=30)
    assert solver.run(path, below(low, high, sampled + 1e-3), text).answer is Answer.SAT
    far = solver.run(path, below(low, high, sampled - 1.0), text)
    assert far.answer is Answer.UNSAT
    assert far.holds == "the reals"


def test_a_timeout_gives_no_verdict(tmp_path: Path) -> None:
    data, _ = mlp((5, 60, 60, 60, 1), seed=0)
    path = tmp_path / "n.onnx"
    path.write_bytes(data)
    low, high = np.full(5, -1.0), np.full(5, 1.0)
    verdict = Verify(timeout=1e-6).run(path, below(low, high, -50.0))
    assert verdict.answer is Answer.TIMEOUT
    assert verdict.certificate is None
    assert verdict.counterexample is None


def test_too_many_open_boxes_are_unknown(tmp_path: Path) -> None:
    data, layers = mlp((5, 40, 40, 1), seed=0)
    path = tmp_path / "n.onnx"
    path.write_bytes(data)
    low, high = np.full(5, -1.0), np.full(5, 1.0)
    x = np.random.default_rng(0).uniform(-1, 1, (2000, 5))
    for i, (w, b) in enumerate(layers):
        x = x @ w.T + b
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    # far below what the network reaches, and far above what one box can prove
    verdict = Verify(timeout=60, max_boxes=1).run(path, below(low, high, float(x.min()) - 4.0))
    assert verdict.answer is Answer.UNKNOWN
    assert "sub-problems" in verdict.reason

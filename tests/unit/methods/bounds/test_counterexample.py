"""Points run again: what they are counterexamples of, and how they are written."""

from __future__ import annotations

import gzip
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from patchclamp.core.errors import InputError, MissingExtraError, PropertyError, SourceError
from patchclamp.methods.bounds.counterexample import (
    Counterexample,
    Replay,
    Standing,
    confirm,
    float32_within,
)
from patchclamp.methods.bounds.property import Property
from patchclamp.methods.bounds.vnnlib import parse_property

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="the runtime that counterexamples are checked in")
if importlib.util.find_spec("onnx2torch") is None:
    pytest.skip("needs onnx2torch", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402  (after the skips)

FLOAT, DOUBLE, WHOLE = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64


def network(
    offset: float = 0.0, *, kind: int = FLOAT, shape: tuple[object, ...] = ("n", 2), opset: int = 13
) -> bytes:
    """y = (x + offset) - offset, which is x but for rounding."""
    held = np.array([offset], dtype=np.float64 if kind == DOUBLE else np.float32)
    nodes = [
        helper.make_node("Add", ["x", "c"], ["h"]),
        helper.make_node("Sub", ["h", "c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(held, "c")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    raw: bytes = proto.SerializeToString()
    return raw


def stated(unsafe: str, box: str = "(>= X_0 0.25) (<= X_0 0.5)") -> Property:
    declared = "".join(f"(declare-const {v}_{i} Real)" for v in "XY" for i in range(2))
    return parse_property(f"{declared}(assert (and {box} (>= X_1 -1) (<= X_1 1)))(assert {unsafe})")


INSIDE = np.array([0.3, 0.1])


class TestStanding:
    @pytest.mark.parametrize(
        ("unsafe", "offset", "standing", "in_runtime"),
        [
            ("(<= Y_0 0.35)", 0.0, Standing.EXACT, True),
            ("(<= Y_0 0)", 1e8, Standing.FLOAT32_ONLY, True),  # 0.3 is lost beside 1e8
            ("(>= Y_0 0.26)", 1e8, Standing.EXACT, False),
            ("(<= Y_0 0.29995)", 0.0, Standing.WITHIN_TOLERANCE, False),
            ("(<= Y_0 0.2998)", 0.0, Standing.NONE, False),
            ("(<= Y_0 0)", 0.0, Standing.NONE, False),
        ],
    )
    def test_each(self, unsafe: str, offset: float, standing: Standing, in_runtime: bool) -> None:
        found = confirm(network(offset), stated(unsafe), INSIDE)
        assert found.standing is standing
        assert found.holds_in_runtime is in_runtime
        assert (found.margin <= 0) is (standing is Standing.EXACT)

    def test_outputs_are_those_of_the_runtime(self) -> None:
        found = confirm(network(1e8), stated("(>= Y_0 0.26)"), INSIDE)
        np.testing.assert_array_equal(found.y, [0, 0])
        np.testing.assert_allclose(Replay(network(1e8)).run_float64(INSIDE), INSIDE, atol=1e-7)

    def test_a_network_of_float64_runs_in_it(self) -> None:
        found = confirm(network(1e8, kind=DOUBLE), stated("(>= Y_0 0.26)"), INSIDE)
        assert (found.standing, found.holds_in_runtime) == (Standing.EXACT, True)

    def test_without_the_runtime_it_is_said_that_nothing_was_checked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else plain(name)
        )
        replay = Replay(network())
        found = replay.confirm(stated("(<= Y_0 0.35)"), INSIDE)
        assert (found.standing, found.runtime_margin, found.holds_in_runtime) == (
            Standing.EXACT,
            None,
            None,
        )
        np.testing.assert_array_equal(found.y, found.x)
        with pytest.raises(MissingExtraError, match="onnxruntime"):
            replay.run_runtime(INSIDE)

    @pytest.mark.parametrize("offset", [float("nan"), float("inf")])
    def test_an_output_that_is_no_number_proves_nothing(self, offset: float) -> None:
        found = confirm(network(offset), stated("(or (<= Y_0 0) (>= Y_0 0))"), INSIDE)
        assert (found.standing, found.margin) == (Standing.NONE, np.inf)


class TestPoint:
    def test_the_point_becomes_float32_and_stays_inside(self) -> None:
        box = "(>= X_0 0.1) (<= X_0 0.3)"
        for point in (-9, 0.1, 0.2, 0.3, 9):
            found = confirm(network(), stated("(<= Y_0 1)", box), np.array([point, 0.0]))
            assert found.standing is Standing.EXACT
            assert found.x[0] == np.float32(found.x[0])
            assert 0.1 <= found.x[0] <= 0.3
            assert abs(found.x[0] - np.clip(point, 0.1, 0.3)) < 3e-8

    def test_a_box_without_float32_numbers_keeps_the_point(self) -> None:
        found = confirm(
            network(), stated("(<= Y_0 1)", "(>= X_0 0.1) (<= X_0 0.1)"), np.array([0.1, 0.0])
        )
        assert found.x[0] == pytest.approx(0.1, abs=1e-16)
        assert found.standing is Standing.EXACT
        assert found.runtime_margin == pytest.approx(1.5e-9, rel=0.1)  # float32(0.1) lies outside

    def test_what_rounding_would_lose_is_kept_as_it_is(self) -> None:
        point = np.array([0.3, 0.0])
        assert float(np.float32(0.3)) > 0.30000001
        found = confirm(network(), stated("(<= Y_0 0.300000000001)"), point)
        assert found.standing is Standing.EXACT
        assert found.x[0] == 0.3
        assert found.holds_in_runtime is False

    def test_the_case_that_is_met_is_the_one_that_it_is_moved_into(self) -> None:
        text = "(or (and (<= X_0 0.3) (<= Y_0 -5)) (and (>= X_0 0.4) (>= Y_0 0.35)))"
        found = confirm(network(), stated(text), np.array([0.395, 0.0]))
        assert found.standing is Standing.EXACT
        assert 0.4 <= found.x[0] < 0.4001

    @pytest.mark.parametrize("seed", range(5))
    def test_rounding_within(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        centre = rng.normal(size=200) * 10.0 ** rng.integers(-40, 39, size=200)
        width = np.abs(centre) * 10.0 ** rng.integers(-12, -5, size=200)
        lower, upper = centre - width, centre + width
        x = np.clip(rng.uniform(lower, upper), lower, upper)
        found = float32_within(x, lower, upper)
        assert ((found >= lower) & (found <= upper)).all()
        single = found.astype(np.float32).astype(np.float64) == found
        # Where none was found there is none: the neighbours of the interval's middle lie outside.
        for i in np.flatnonzero(~single):
            near = np.float32(x[i])
            sides = [np.nextafter(near, np.float32(s)) for s in (-np.inf, np.inf)]
            assert not any(lower[i] <= float(n) <= upper[i] for n in (near, *sides))
            assert found[i] == x[i]
        assert single.any()
        assert not single.all()


class TestText:
    def test_the_form_of_vnn_comp(self) -> None:
        found = Counterexample(
            x=np.array([0.1, -2.0]),
            y=np.array([1e-9]),
            standing=Standing.EXACT,
            margin=0.0,
            runtime_margin=None,
        )
        assert found.text() == "((X_0 0.1)\n(X_1 -2.0)\n(Y_0 1e-09))"

    def test_numbers_come_back_whole(self) -> None:
        found = confirm(network(), stated("(<= Y_0 0.35)"), INSIDE)
        read = dict(re.findall(r"\(([XY]_\d) ([^()]+)\)", found.text()))
        assert [float(read[f"X_{i}"]) for i in range(2)] == found.x.tolist()
        assert [float(read[f"Y_{i}"]) for i in range(2)] == found.y.tolist()


class TestNetworks:
    @pytest.mark.parametrize("name", ["n.onnx", "n.onnx.gz"])
    def test_files(self, tmp_path: Path, name: str) -> None:
        raw = network(shape=(1, 1, 2))
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        replay = Replay(tmp_path / name)
        assert replay.shape == (1, 1, 2)
        assert replay.confirm(stated("(<= Y_0 0.35)"), INSIDE).standing is Standing.EXACT

    def test_packed_bytes_and_old_opsets(self) -> None:
        raw = gzip.compress(network(opset=8))
        assert confirm(raw, stated("(<= Y_0 0.35)"), INSIDE).standing is Standing.EXACT

    def test_bad_calls(self, tmp_path: Path) -> None:
        good = stated("(<= Y_0 0.35)")
        with pytest.raises(PropertyError, match="got 2 inputs; expected 3"):
            confirm(network(shape=(1, 3)), good, INSIDE)
        for point in (np.zeros(3), np.array([0.3, np.nan])):
            with pytest.raises(InputError, match="one finite number for every input"):
                confirm(network(), good, point)
        one = parse_property(
            "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
            "(assert (and (<= X_0 1) (>= X_0 0) (<= X_1 1) (>= X_1 0) (<= Y_0 0)))"
        )
        with pytest.raises(PropertyError, match="got 1 outputs; expected 2"):
            confirm(network(), one, INSIDE)
        for raw in (b"", b"no network", gzip.compress(network())[:-9]):
            with pytest.raises(SourceError):
                confirm(raw, good, INSIDE)
        with pytest.raises(SourceError, match="cannot be read"):
            confirm(tmp_path / "none.onnx", good, INSIDE)

    def test_networks_of_another_form(self) -> None:
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "z"], ["y"])],
            "g",
            [helper.make_tensor_value_info(name, FLOAT, (1, 2)) for name in ("x", "z")],
            [helper.make_tensor_value_info("y", FLOAT, (1, 2))],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        with pytest.raises(SourceError, match="got 2 inputs, 1 outputs"):
            Replay(proto.SerializeToString())

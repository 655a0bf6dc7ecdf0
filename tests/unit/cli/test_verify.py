"""`patchclamp verify` and `check-certificate`, with a solver that does as it is told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from patchclamp.cli import run
from patchclamp.cli import verify as command
from patchclamp.core.errors import SourceError
from patchclamp.core.progress import Progress
from patchclamp.methods.bounds.certificate.form import CaseProof, Certificate, Mode
from patchclamp.methods.bounds.counterexample import Counterexample, Standing
from patchclamp.methods.bounds.property import Property

Called = Callable[..., tuple[int, str, str]]

PROPERTY = """(declare-const X_0 Real)(declare-const Y_0 Real)
(assert (and (>= X_0 0) (<= X_0 1)))
(assert (<= Y_0 0))
"""


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """Run a command line: exit code, stdout, stderr."""
    monkeypatch.delenv("PATCHCLAMP_DEBUG", raising=False)

    def called(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return called


def point(standing: Standing = Standing.EXACT, runtime: float | None = -1.0) -> Counterexample:
    return Counterexample(
        x=np.array([0.5]), y=np.array([-1.0]), standing=standing, margin=-1, runtime_margin=runtime
    )


def proof() -> Certificate:
    """A tree that is one leaf."""
    case = CaseProof(
        mode=Mode.INPUT,
        layer=np.array([-2], dtype=np.int32),
        index=np.array([0], dtype=np.int32),
        point=np.array([0.0]),
        weights=np.array([[1.0]]),
    )
    return Certificate(network="0" * 64, property="0" * 64, cases=(case,))


@dataclass
class Solver:
    """What the solver answers, how it was made and on what it was run."""

    answer: str = "unsat"
    counterexample: Counterexample | None = None
    certificate: Certificate | None = None
    error: Exception | None = None
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    runs: list[tuple[Path, Property, Path]] = field(default_factory=list)

    def make(self, **options: Any) -> Solver:
        self.options = options
        return self

    def run(self, network: Path, stated: Property, path: Path, progress: Progress) -> object:
        self.runs.append((network, stated, path))
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            try:
                time.sleep(0.01)
            except Exception:  # as a solver that takes what it does not know for a failed try
                continue
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            answer=self.answer,
            counterexample=self.counterexample,
            certificate=self.certificate,
            reason="because",
            holds="the reals",
            cpu_seconds=1.25,
            boxes=1234,
        )


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Stands in for the module of the solver."""
    found = Solver()
    module = ModuleType("patchclamp.methods.bounds.verify")
    module.Verify = found.make  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "n.onnx").write_bytes(b"network")
    (tmp_path / "p.vnnlib").write_text(PROPERTY)
    return tmp_path / "n.onnx", tmp_path / "p.vnnlib"


class TestAnswers:
    @pytest.mark.parametrize(("answer", "code"), [("unsat", 0), ("unknown", 3), ("timeout", 3)])
    def test_one_word_on_stdout(
        self, call: Called, solver: Solver, files: tuple[Path, Path], answer: str, code: int
    ) -> None:
        solver.answer = answer
        got, out, err = call("verify", *files)
        assert (got, out) == (code, f"{answer}\n")
        assert "because" in err
        assert "1,234 boxes, 1.2 CPU-seconds" in err
        assert ("holds over the reals" in err) is (answer == "unsat")
        assert call("verify", *files, "--exit-zero")[0] == 0

    def test_sat_comes_with_its_point(
        self, call: Called, solver: Solver, files: tuple[Path, Path]
    ) -> None:
        solver.answer, solver.counterexample = "sat", point()
        code, out, err = call("verify", *files)
        assert (code, out) == (1, "sat\n((X_0 0.5)\n(Y_0 -1.0))\n")
        assert "the counterexample is exact" in err

    @pytest.mark.parametrize(
        ("standing", "runtime", "said"),
        [
            (Standing.FLOAT32_ONLY, -1.0, "is float32-only"),
            (Standing.EXACT, 0.5, "onnxruntime does not confirm it"),
            (Standing.EXACT, None, "not checked in onnxruntime"),
        ],
    )
    def test_what_sat_rests_on_is_said(
        self,
        call: Called,
        solver: Solver,
        files: tuple[Path, Path],
        standing: Standing,
        runtime: float | None,
        said: str,
    ) -> None:
        solver.answer, solver.counterexample = "sat", point(standing, runtime)
        assert said in call("verify", *files)[2]

    @pytest.mark.parametrize("found", [None, point(Standing.NONE)])
    def test_sat_without_a_point_is_no_verdict(
        self, call: Called, solver: Solver, files: tuple[Path, Path], found: Counterexample | None
    ) -> None:
        solver.answer, solver.counterexample = "sat", found
        code, out, err = call("verify", *files)
        assert (code, out) == (3, "")
        assert "without a point" in err

    def test_json(self, call: Called, solver: Solver, files: tuple[Path, Path]) -> None:
        solver.answer, solver.counterexample = "sat", point(runtime=float("inf"))
        code, out, _ = call("verify", *files, "--json")
        found = json.loads(out)
        assert (code, found["answer"], found["boxes"]) == (1, "sat", 1234)
        assert found["counterexample"]["x"] == [0.5]
        assert found["counterexample"]["standing"] == "exact"
        assert found["counterexample"]["runtime_margin"] is None
        solver.answer = "unsat"
        assert json.loads(call("verify", *files, "--json")[1])["counterexample"] is None

    def test_the_solver_gets_what_was_given(
        self, call: Called, solver: Solver, files: tuple[Path, Path]
    ) -> None:
        call("verify", *files, "--timeout", "1m", "--seed", 7)
        assert solver.options["seed"] == 7
        assert 50 < solver.options["timeout"] <= 60
        network, stated, path = solver.runs[0]
        assert (network, path) == files
        assert stated.cases[0].upper[0] == 1
        files[0].rename(files[0].with_name("n.onnx.gz"))
        call("verify", *files)
        assert solver.runs[1][0].name == "n.onnx.gz"


class TestNoVerdict:
    """What cannot be read leaves stdout empty."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("(assert (<= Y_0", "line 1, column 2"),
            (PROPERTY.replace("(<= X_0 1)", "(<= X_0 -1)"), "no input is left"),
            (PROPERTY.replace("(<= X_0 1)", "(<= X_0 X_0)"), "X_0 has no upper bound"),
        ],
    )
    def test_bad_properties(
        self, call: Called, solver: Solver, files: tuple[Path, Path], text: str, message: str
    ) -> None:
        files[1].write_text(text)
        code, out, err = call("verify", *files)
        assert (code, out) == (2, "")
        assert message in err
        assert solver.runs == []

    def test_missing_files(self, call: Called, solver: Solver, files: tuple[Path, Path]) -> None:
        for pair in (("none.onnx", files[1]), (files[0], "none.vnnlib")):
            code, out, err = call("verify", *pair)
            assert (code, out) == (2, "")
            assert "there is no " in err

    def test_errors_of_the_solver(
        self, call: Called, solver: Solver, files: tuple[Path, Path]
    ) -> None:
        solver.error = SourceError("no operator 'Foo'")
        assert call("verify", *files)[:2] == (2, "")
        solver.error = RuntimeError("odd")
        assert call("verify", *files)[:2] == (3, "")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "takes a network and a property"),
            (("n.onnx",), "takes a network and a property"),
            (("n.onnx", "p.vnnlib", "--results", "r.csv"), "takes a network and a property"),
            (("n.onnx", "p.vnnlib", "--timeout", "0"), "--timeout is not a time"),
            (("n.onnx", "p.vnnlib", "--timeout", "-1"), "--timeout is not a time"),
            (("n.onnx", "p.vnnlib", "--seed", "-1"), "--seed must be at least 0"),
            (("n.onnx", "p.vnnlib", "--batch", "i.csv"), "--batch takes the networks"),
            (("--batch", "i.csv"), "list of instances 'i.csv' cannot be read"),
        ],
    )
    def test_bad_calls(
        self,
        call: Called,
        solver: Solver,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: tuple[str, ...],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, err = call("verify", *options)
        assert (code, out) == (2, "")
        assert message in err
        assert list(tmp_path.iterdir()) == []


class TestTimeout:
    def test_a_solver_that_does_not_return_is_interrupted(
        self,
        call: Called,
        solver: Solver,
        files: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(command, "GRACE", 0.05)
        solver.seconds = 30
        began = time.monotonic()
        code, out, err = call("verify", *files, "--timeout", "0.5")
        assert (code, out) == (3, "timeout\n")
        assert "the time was up" in err
        assert time.monotonic() - began < 15

    def test_so_is_the_reading_of_a_file(
        self,
        call: Called,
        solver: Solver,
        files: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def slow(path: Path) -> None:
            time.sleep(30)

        monkeypatch.setattr(command, "GRACE", 0.05)
        monkeypatch.setattr("patchclamp.methods.bounds.vnnlib.read_property", slow)
        assert call("verify", *files, "--timeout", "0.5", "--json")[0] == 3
        assert solver.runs == []

    def test_the_alarm_is_gone_afterwards(self) -> None:
        import signal

        before = signal.getsignal(signal.SIGALRM)
        with pytest.raises(command._TimeUpError), command._alarm(0.01):
            time.sleep(5)
        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        with command._alarm(5):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


class TestCertificates:
    def test_a_proof_is_written_and_read(
        self, call: Called, solver: Solver, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        solver.certificate = proof()
        code, out, err = call("verify", *files, "--certificate", tmp_path / "c")
        assert (code, out) == (0, "unsat\n")
        assert f"certificate: {tmp_path / 'c'}" in err
        checked = ("--network", files[0], "--property", files[1])
        code, out, _ = call("check-certificate", tmp_path / "c", *checked)
        assert code == 1
        assert out.splitlines()[0] == "invalid"
        assert "another network" in out
        code, out, _ = call("check-certificate", tmp_path / "c", *checked, "--json")
        found = json.loads(out)
        assert (code, found["valid"], found["holds"]) == (1, False, None)
        assert found["failures"]

    def test_valid(
        self,
        call: Called,
        solver: Solver,
        files: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from patchclamp.methods.bounds.certificate import check
        from patchclamp.methods.bounds.certificate import files as form

        seen = []

        def valid(*given: object) -> check.CheckResult:
            seen.append(given)
            return check.CheckResult(valid=True, failures=(), num_leaves=7, num_cases=1)

        monkeypatch.setattr(check, "check", valid)
        form.write_certificate(proof(), tmp_path / "c")
        checked = ("--network", files[0], "--property", files[1])
        code, out, err = call("check-certificate", tmp_path / "c", *checked)
        assert (code, out) == (0, "valid\n")
        assert "7 leaves" in err
        assert seen[0][1] == files[0]
        assert seen[0][3] == files[1]

    def test_only_unsat_has_one(
        self, call: Called, solver: Solver, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert "gave none" in call("verify", *files, "--certificate", tmp_path / "c")[2]
        solver.answer = "unknown"
        assert "only unsat has one" in call("verify", *files, "--certificate", tmp_path / "c")[2]
        assert not (tmp_path / "c").exists()

    def test_bad_files(
        self, call: Called, solver: Solver, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        code, out, err = call("verify", *files, "--certificate", tmp_path / "no" / "c")
        assert (code, out) == (3, "")
        assert "does not exist" in err
        assert solver.runs == []
        (tmp_path / "c").write_bytes(b"none")
        checked = ("--network", files[0], "--property", files[1])
        assert call("check-certificate", tmp_path / "c", *checked)[:2] == (2, "")
        assert call("check-certificate", tmp_path / "d", *checked)[:2] == (2, "")


class TestBatch:
    @pytest.fixture
    def batch(self, files: tuple[Path, Path]) -> Path:
        path = files[0].with_name("instances.csv")
        path.write_text("n.onnx,p.vnnlib,116\nn.onnx,bad.vnnlib,60\n")
        path.with_name("bad.vnnlib").write_text("(assert")
        return path

    def test_rows(
        self, call: Called, solver: Solver, batch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(batch.parent)
        code, out, err = call("verify", "--batch", batch)
        assert (code, out) == (3, "instances.results.csv\n")
        assert "2 instances: 1 unsat, 1 error" in err
        assert "n.onnx p.vnnlib: unsat" in err
        with (batch.parent / "instances.results.csv").open(newline="") as file:
            good, bad = csv.DictReader(file)
        assert (good["network"], good["property"], good["verdict"]) == (
            "n.onnx",
            "p.vnnlib",
            "unsat",
        )
        assert "because" in good["detail"]
        assert bad["verdict"] == "error"
        assert "line 1, column 2" in bad["detail"]
        assert 100 < solver.options["timeout"] <= 116
        assert call("verify", "--batch", batch)[0] == 3
        assert len(solver.runs) == 1  # the second call found both rows

    def test_options(self, call: Called, solver: Solver, batch: Path, tmp_path: Path) -> None:
        batch.write_text("n.onnx,p.vnnlib,116\n")
        place = ("--results", tmp_path / "r.csv", "--timeout", "9", "--json")
        code, out, _ = call("verify", "--batch", batch, *place)
        (row,) = json.loads(out)
        assert (code, row["verdict"], row["timeout"]) == (0, "unsat", 9)
        assert solver.options["timeout"] <= 9

    @pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError()])
    def test_a_batch_outlives_its_worst_instance(
        self, call: Called, solver: Solver, batch: Path, tmp_path: Path, error: Exception
    ) -> None:
        batch.write_text("n.onnx,p.vnnlib,116\n")
        solver.error = error
        place = ("--results", tmp_path / "r.csv", "--json")
        code, out, _ = call("verify", "--batch", batch, *place)
        (row,) = json.loads(out)
        assert (code, row["verdict"]) == (3, "error")
        assert "odd" in row["detail"] or "memory" in row["detail"]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from patchclamp.cli import run; "
        "codes = [run([c, '--help']) for c in ('verify', 'check-certificate')]; "
        "heavy = [m for m in ('torch', 'numpy', 'onnx') if m in sys.modules]; "
        "sys.exit(str(heavy) if heavy else any(codes))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "--certificate" in ended.stdout

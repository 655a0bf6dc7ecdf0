"""Lists of instances, and batches that are interrupted and go on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from patchclamp.core.errors import DataError, OutputError, PropertyError
from patchclamp.methods.bounds.instances import HEAD, Instance, Row, read_instances, run_batch


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A list of three instances on two networks, one of them packed."""
    for name in ("a.onnx", "b.onnx.gz", "p.vnnlib", "q.vnnlib.gz"):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(name.encode())
    (tmp_path / "instances.csv").write_text(
        "files/a.onnx,files/p.vnnlib,116\n"
        "./files/b.onnx, files/p.vnnlib, 60.5\r\n"
        "\n"
        "files/b.onnx,files/q.vnnlib,116"
    )
    return tmp_path


class Solver:
    """Answers unsat and notes what it was asked."""

    def __init__(self, *, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.stop_at, self.fail_at = stop_at, fail_at

    def __call__(self, instance: Instance) -> Row:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(instance.names)
        if len(self.asked) - 1 == self.fail_at:
            raise PropertyError("line 3:\nbroken", got="x")
        return Row(
            network=instance.names[0],
            property=instance.names[1],
            verdict="unsat",
            seconds=0.1 + len(self.asked) / 3,
            cpu_seconds=0.2,
            detail='closed, "all" of them',
        )


class TestList:
    def test_paths_are_relative_to_the_list(self, place: Path) -> None:
        found = read_instances(place / "instances.csv")
        assert [i.network.name for i in found] == ["a.onnx", "b.onnx.gz", "b.onnx.gz"]
        assert [i.property.name for i in found] == ["p.vnnlib", "p.vnnlib", "q.vnnlib.gz"]
        assert [i.timeout for i in found] == [116, 60.5, 116]
        assert all(i.network.parent == place / "files" for i in found[::2])
        assert found[1].names == ("./files/b.onnx", "files/p.vnnlib")
        assert {i.timeout for i in read_instances(place / "instances.csv", timeout=7)} == {7}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("files/a.onnx,files/p.vnnlib", "line 4: no instance; got 2 values"),
            ("files/a.onnx,files/p.vnnlib,1,2", "line 4: no instance; got 4 values"),
            ("files/a.onnx,files/p.vnnlib,soon", "line 4: no time limit; got 'soon'"),
            ("files/a.onnx,files/p.vnnlib,nan", "line 4: no time limit"),
            ("files/a.onnx,files/p.vnnlib,0", "line 4: no time limit"),
            ("files/c.onnx,files/p.vnnlib,1", "line 4: no file '.*c.onnx'"),
            ("files/a.onnx,,1", "line 4: no file"),
            ("\"[('f', 'a.onnx'), ('g', 'b.onnx')]\",files/p.vnnlib,1", "line 4: .*several"),
        ],
    )
    def test_bad_lines(self, place: Path, line: str, message: str) -> None:
        path = place / "instances.csv"
        path.write_text("\n\nfiles/a.onnx,files/p.vnnlib,1\n" + line + "\n")
        with pytest.raises(DataError, match=message):
            read_instances(path)

    def test_bad_lists(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            read_instances(tmp_path / "none.csv")
        (tmp_path / "empty.csv").write_text("\n\n")
        with pytest.raises(DataError, match="is empty"):
            read_instances(tmp_path / "empty.csv")
        (tmp_path / "raw.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="no text"):
            read_instances(tmp_path / "raw.csv")


class TestBatch:
    def test_one_row_for_each(self, place: Path) -> None:
        solver, out = Solver(), place / "out.csv"
        rows = run_batch(read_instances(place / "instances.csv"), solver, out)
        assert len(solver.asked) == 3
        with out.open(newline="") as file:
            written = list(csv.DictReader(file))
        assert [w["network"] for w in written] == [row.network for row in rows]
        assert tuple(written[0]) == HEAD
        assert written[0]["detail"] == 'closed, "all" of them'
        assert float(written[0]["seconds"]) == rows[0].seconds
        assert rows[1].timeout == 60.5

    def test_an_interrupted_batch_goes_on(self, place: Path) -> None:
        instances, out = read_instances(place / "instances.csv"), place / "out.csv"
        with pytest.raises(KeyboardInterrupt):
            run_batch(instances, Solver(stop_at=2), out)
        with out.open("ab") as file:
            file.write(b"files/b.onnx,files/q.vn")  # as a writer leaves it that was killed
        second = Solver()
        rows = run_batch(instances, second, out)
        assert second.asked == [instances[2].names]
        assert [row.network for row in rows] == [i.names[0] for i in instances]
        assert out.read_text().count("\n") == 4
        third = Solver()
        assert run_batch(instances, third, out) == rows
        assert third.asked == []

    def test_what_has_changed_is_solved_again(self, place: Path) -> None:
        path, out = place / "instances.csv", place / "out.csv"
        run_batch(read_instances(path), Solver(), out)
        (place / "files" / "q.vnnlib.gz").write_bytes(b"other")
        solver = Solver()
        run_batch(read_instances(path), solver, out)
        assert solver.asked == [("files/b.onnx", "files/q.vnnlib")]
        run_batch(read_instances(path, timeout=5), solver, out)
        assert len(solver.asked) == 4

    def test_the_same_line_twice_is_two_instances(self, place: Path) -> None:
        path, out = place / "instances.csv", place / "out.csv"
        path.write_text("files/a.onnx,files/p.vnnlib,116\n" * 2)
        with pytest.raises(KeyboardInterrupt):
            run_batch(read_instances(path), Solver(stop_at=1), out)
        solver = Solver()
        assert len(run_batch(read_instances(path), solver, out)) == 2
        assert len(solver.asked) == 1

    def test_an_instance_that_fails_has_no_verdict_and_does_not_end_the_batch(
        self, place: Path
    ) -> None:
        instances, out = read_instances(place / "instances.csv"), place / "out.csv"
        rows = run_batch(instances, Solver(fail_at=1), out)
        assert [row.verdict for row in rows] == ["unsat", "error", "unsat"]
        assert rows[1].detail == "line 3: broken; got x."
        assert run_batch(instances, Solver(stop_at=0), out) == rows

    def test_other_files_are_not_written_to(self, place: Path) -> None:
        instances = read_instances(place / "instances.csv")
        for text in ("precious", "a,b\n1,2\n", ",".join(HEAD) + "\n1,2\n"):
            (place / "other.csv").write_text(text)
            with pytest.raises(OutputError):
                run_batch(instances, Solver(), place / "other.csv")
            assert (place / "other.csv").read_text() == text
        for out in (place, place / "no" / "out.csv"):
            with pytest.raises(OutputError):
                run_batch(instances, Solver(), out)

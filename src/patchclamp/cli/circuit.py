"""`patchclamp circuit`: from a behaviour of a network to a circuit that has been checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from patchclamp.cli import circuit_summary as summary
from patchclamp.cli import terminal
from patchclamp.cli.options import AllowPickle, AsJson, Switch
from patchclamp.cli.progress import watch
from patchclamp.cli.values import at_least
from patchclamp.core.errors import DataError, OptionError, OutputError

if TYPE_CHECKING:
    from patchclamp.core.document import Document
    from patchclamp.core.progress import Progress
    from patchclamp.methods.circuits.checking.behaviour import Performance
    from patchclamp.methods.circuits.finding.search import CircuitSearch, Found, Task
    from patchclamp.model.tokens import Tokenizer
    from patchclamp.net import Net

PAIRS = 32
"""Pairs to find the circuit on, and pairs to check it on, where the call does not say."""

# Spelled out, because reading them from the methods would import torch for --help;
# tests/unit/cli/test_circuit.py compares them.
AblationName: TypeAlias = Literal["resample", "mean", "positional mean", "zero", "noise"]
DirectionName: TypeAlias = Literal["both", "noising", "denoising"]
PathName: TypeAlias = Literal["inputs", "activations", "none"]
SignName: TypeAlias = Literal["absolute", "signed"]


def circuit(
    model: str,
    *,
    task: str | None = None,
    variant: str | None = None,
    pairs: Path | None = None,
    num: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    level: float = 0.9,
    ablation: AblationName = "resample",
    direction: DirectionName = "both",
    path: PathName = "inputs",
    steps: int = 4,
    mixed: int = 1,
    sign: SignName = "absolute",
    verify: int = 32,
    batch_size: int = 16,
    force: Switch = False,
    out: Path = Path("circuit.json"),
    svg: Path | None = None,
    page: Path | None = None,
    mib: Path | None = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> int:
    """Find the circuit of a behaviour, and check it on prompts that it was not found on.

    Exits with 1 if the network does not do the task, or no small circuit is faithful enough.

    Args:
        model: a name that `patchclamp models` lists, a folder or a file.
        task: a behaviour that `patchclamp circuits tasks` lists.
        variant: how its corrupt prompts are made; the first that is listed without it.
        pairs: your own pairs instead of a task, as JSON lines with clean, corrupt, correct, wrong.
        num: pairs to find the circuit on; 32 without it, and with --pairs all that are left.
        held_out: pairs to check it on; 32 without it, and with --pairs half of them.
        seed: of the pairs that are drawn or split, of random circuits and of intervals.
        level: faithfulness that the circuit must reach.
        ablation: what edges outside the circuit carry.
        direction: ends at which gradients are taken: clean, corrupt or both.
        path: what moves along the points between the two ends.
        steps: points between the two ends.
        mixed: pairs of points at which some places are clean and the others corrupt.
        sign: how effects of examples are added up.
        verify: edges whose effect is measured exactly, largest first.
        batch_size: pairs that run at a time.
        force: go on where the network does not do the task; the result says so.
        out: the circuit and its record.
        svg: also draw the circuit.
        page: also write a page with the circuit and its evidence.
        mib: also write the circuit in the form of the MIB benchmark.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print what was found as JSON.
    """
    for option, value, least in (
        ("--num", num, 1),
        ("--held-out", held_out, 1),
        ("--seed", seed, 0),
        ("--steps", steps, 1),
        ("--mixed", mixed, 0),
        ("--verify", verify, 1),
        ("--batch-size", batch_size, 1),
    ):
        if value is not None:
            at_least(option, value, least)
    asked = Asked(
        task=task, variant=variant, pairs=pairs, num=num, held_out=held_out, seed=seed
    ).checked()
    outputs = Outputs(out=out, svg=svg, page=page, mib=mib).checked()

    import patchclamp
    from patchclamp.methods.circuits.checking.behaviour import performs
    from patchclamp.methods.circuits.finding import edge_attribution as first_order
    from patchclamp.methods.circuits.finding.search import CircuitSearch
    from patchclamp.methods.circuits.network.ablation import Ablation

    search = CircuitSearch(
        attribution=first_order.EdgeAttribution(
            direction=first_order.Direction(direction),
            path=first_order.Path(path),
            steps=steps,
            mixed=mixed,
            seed=seed,
            sign=first_order.Sign(sign),
            batch_size=batch_size,
        ),
        level=level,
        ablation=Ablation(ablation),
        verify=verify,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    with watch() as progress:
        net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
        made = asked.of(net)
        performance = performs(net, made.held_out, batch_size=batch_size, seed=seed)
        found = None
        if force or performance.objection is None:
            progress.note(f"{net.name} is right on {performance.accuracy:.0%} of '{made.name}'")
            found = search.run(net, made, performance=performance, progress=progress)
            # The circuit and what is said of it come first: a drawing that fails loses neither.
            outputs.write_circuit(found)
    if found is None:  # data is written where no bar is drawn: bars take stdout for themselves
        return _absent(performance, as_json)
    if as_json:
        files = {kind: str(place) for kind, place in outputs.named}
        terminal.data_json({**summary.found_json(found, level), "files": files})
    else:
        summary.print_found(found, level)
    summary.warn(found, level)
    with watch() as progress:
        outputs.write_others(net, made, search, found, asked.command(model, search), progress)
    terminal.message(f"written: {', '.join(str(place) for _, place in outputs.named)}")
    return 0 if summary.reached(found, level) and performance.present else 1


def _absent(performance: Performance, as_json: bool) -> int:
    """Say that there is nothing to explain; returns the exit code."""
    from patchclamp.methods.circuits.checking.behaviour import LEAST_PAIRS

    if performance.num < LEAST_PAIRS:  # a matter of the call, not of the network
        performance.require()
    if as_json:
        terminal.data_json(
            {"performance": summary.performance_json(performance), "circuit": None, "files": {}}
        )
    else:
        summary.print_performance(performance)
    terminal.message(f"no circuit: {performance.objection}")
    terminal.message("hint: explain a behaviour that the network has, or see --force")
    return 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which pairs the command line asks for."""

    task: str | None
    variant: str | None
    pairs: Path | None
    num: int | None
    held_out: int | None
    seed: int

    def checked(self) -> Asked:
        """Itself. Raises: OptionError for none or both of --task and --pairs, or a mixture."""
        if (self.task is None) == (self.pairs is None):
            raise OptionError(
                "a circuit is of one behaviour",
                got="neither --task nor --pairs" if self.task is None else "--task and --pairs",
                expected="--task NAME or --pairs FILE.jsonl",
                hint="patchclamp circuits tasks lists the names",
            )
        for option, value in (("--variant", self.variant), ("--num", self.num)):
            if self.pairs is not None and value is not None:
                raise OptionError(f"{option} is for tasks that are drawn, not for --pairs")
        return self

    def command(self, model: str, search: CircuitSearch) -> str:
        """The command line that finds the same circuit."""
        given: dict[str, object] = {
            "--task": self.task,
            "--variant": self.variant,
            "--pairs": self.pairs,
            "--num": self.num,
            "--held-out": self.held_out,
            "--seed": self.seed,
            "--level": search.level,
            "--ablation": search.ablation,
            "--direction": search.attribution.direction,
            "--path": search.attribution.path,
            "--steps": search.attribution.steps,
            "--mixed": search.attribution.mixed,
            "--sign": search.attribution.sign,
            "--verify": search.verify,
            "--batch-size": search.batch_size,
        }
        words = [str(w) for o, v in given.items() if v is not None for w in (o, v)]
        return shlex.join(
            ["patchclamp", "circuit", model, *words, *(["--force"] if search.force else [])]
        )

    def of(self, net: Net) -> Task:
        """The pairs, for this network.

        Raises: DataError for an unknown task, a network without a tokenizer, or pairs that do
        not fit it.
        """
        from patchclamp.data.behaviours.pairs import read_pairs, tokenised
        from patchclamp.methods.circuits.finding.search import own_task, shipped_task

        tokenizer = tokenizer_of(net)
        if self.task is not None:
            return shipped_task(
                net,
                self.task,
                num=PAIRS if self.num is None else self.num,
                num_held_out=PAIRS if self.held_out is None else self.held_out,
                seed=self.seed,
                variant=self.variant or "",
            )
        assert self.pairs is not None
        own = read_pairs(self.pairs)
        tokenised(own, tokenizer)  # before they are split, so that errors number them as given
        held_out = len(own) // 2 if self.held_out is None else self.held_out
        if held_out > len(own) - 2:
            raise OptionError(
                "--held-out leaves no two pairs to find a circuit on",
                got=f"{held_out} of {len(own)}",
            )
        return own_task(net, own, held_out_share=held_out / len(own), seed=self.seed)


def tokenizer_of(net: Net) -> Tokenizer:
    """The network's tokenizer. Raises: DataError if it cannot continue a prompt."""
    from patchclamp.model.sources import Task as MadeFor

    hint = "patchclamp models lists language models"
    if net.tokenizer is None:
        raise DataError(f"{net.name} has no tokenizer, so it cannot take prompts", hint=hint)
    if net.task is MadeFor.ENCODE_TEXT:
        raise DataError(f"{net.name} encodes texts and predicts no next token", hint=hint)
    return net.tokenizer


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files that are written."""

    out: Path
    svg: Path | None
    page: Path | None
    mib: Path | None

    @property
    def named(self) -> list[tuple[str, Path]]:
        """Those that were asked for."""
        every = (("out", self.out), ("svg", self.svg), ("page", self.page), ("mib", self.mib))
        return [(name, path) for name, path in every if path is not None]

    def checked(self) -> Outputs:
        """Itself. Raises: OutputError, OptionError for files that could not be written."""
        seen: dict[Path, str] = {}
        for name, path in self.named:
            terminal.require_writable(path)
            other = seen.setdefault(path.resolve(), name)
            if other != name:
                raise OptionError(f"--{other} and --{name} name the same file", got=f"'{path}'")
        return self

    def write_circuit(self, found: Found) -> None:
        """The circuit itself."""
        from patchclamp.report.writing import write_whole

        write_whole(self.out, found.circuit.to_json().encode())

    def write_others(
        self,
        net: Net,
        task: Task,
        search: CircuitSearch,
        found: Found,
        command: str,
        progress: Progress,
    ) -> None:
        """The other files that were asked for."""
        from patchclamp.report import write_page
        from patchclamp.report.circuit_drawing import circuit_svg
        from patchclamp.report.writing import write_whole

        if self.svg is not None:
            scores = dict(zip(found.wiring.writers, found.scores.nodes.tolist(), strict=True))
            drawn = circuit_svg(found.circuit, title=f"{net.name}: {task.name}", node_scores=scores)
            write_whole(self.svg, drawn.encode())
        if self.mib is not None:
            write_whole(self.mib, _in_mib_form(net, found).encode())
        if self.page is not None:
            write_page(_document(net, task, search, found, command, progress), self.page)


def _in_mib_form(net: Net, found: Found) -> str:
    """The circuit as MIB's JSON; a table of positions is merged into its one input node."""
    from patchclamp.methods.circuits.comparing.exchange import to_mib

    width = net.sites["resid_pre.0"].shape[-1]
    if not isinstance(width, int):
        raise OutputError(f"the width of the stream of {net.name} is not fixed", got=str(width))
    return to_mib(found.circuit, width=width, merge_inputs=True)


def _document(
    net: Net,
    task: Task,
    search: CircuitSearch,
    found: Found,
    command: str,
    progress: Progress,
) -> Document:
    """A page of one section, the one that an audit has too."""
    import datetime

    from patchclamp.audit.circuit_parts import weigh
    from patchclamp.audit.context import versions
    from patchclamp.audit.sections.circuit import circuit_section
    from patchclamp.core.document import Document, Facts
    from patchclamp.methods.circuits.finding.search import contrasts_of
    from patchclamp.methods.circuits.network.ablation import references

    wiring, record = found.wiring, found.circuit.record
    held = references(
        wiring,
        contrasts_of(net, task.train),
        search.ablation,
        batch_size=search.batch_size,
        seed=search.seed,
    )
    weighed = weigh(
        wiring,
        found.circuit,
        contrasts_of(net, task.held_out),
        held,
        batch_size=search.batch_size,
        seed=search.seed,
        progress=progress,
    )
    section = circuit_section(
        found, net, search=search, weighed=weighed, tried=(found.performance,)
    )
    return Document(
        title=f"{net.name}: {task.name}",
        subtitle=f"a circuit of {found.circuit.num_edges:,} edges, {net.num_parameters:,} "
        "parameters in the network",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        header=Facts(
            title="What was explained",
            items=(
                ("network", net.name),
                ("opened from", net.loaded.origin),
                ("SHA-256 of class and weights", record.model_hash),
                ("behaviour", record.task),
                ("SHA-256 of the pairs", record.data_hash),
            ),
        ),
        sections=(section,),
        versions=versions(),
    )

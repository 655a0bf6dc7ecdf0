"""`patchclamp circuits ...`: behaviours, heads, and circuits reproduced and compared."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from patchclamp.cli import terminal
from patchclamp.cli.circuit import PAIRS, DirectionName, tokenizer_of
from patchclamp.cli.options import AllowPickle, AsJson, Switch
from patchclamp.cli.progress import watch
from patchclamp.cli.values import at_least
from patchclamp.core.errors import DataError, OptionError

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.core.circuit import Circuit
    from patchclamp.data.behaviours.pairs import TokenPairs
    from patchclamp.methods.circuits.checking.behaviour import Performance
    from patchclamp.methods.circuits.comparing.checkpoints import CheckpointChanges
    from patchclamp.methods.circuits.finding.search import Reproduction
    from patchclamp.net import Net

HEADS_SHOWN = 30
"""Rows of a comparison of checkpoints; JSON has all."""

SAME_SCORE = 1e-3
"""Change of a score, as a share of the largest, that other machines' rounding may make."""

RECORDED = ("model", "model_hash", "task", "metric", "ablation", "direction", "sign")
"""What a record says that makes two circuits differ for other reasons than the networks."""

CHOSEN = ("variant", "level")
"""The same of the record's options."""


def tasks(*, as_json: AsJson = False) -> None:
    """List the behaviours that circuits are found for.

    Args:
        as_json: print JSON.
    """
    from patchclamp.data.behaviours import catalogue

    entries = catalogue()
    if as_json:
        terminal.data_json([dataclasses.asdict(entry) for entry in entries])
        return
    terminal.table(
        sys.stdout,
        ("task", "example", "answer", "variants", "source"),
        [(e.name, e.example, e.answer, ", ".join(e.variants), e.source) for e in entries],
    )
    terminal.message("your own pairs can be given too: patchclamp circuit MODEL --pairs FILE.jsonl")


def heads(
    model: str,
    *,
    rows: int = 32,
    length: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Say what each attention head does, on random tokens that repeat.

    A kind is named where a head does it more than the same head would at random tokens.

    Args:
        model: a name that `patchclamp models` lists, a folder or a file.
        rows: rows of random tokens.
        length: tokens in a row, where the network reads as many.
        seed: of the tokens and of what they are compared with.
        batch_size: rows that run at a time.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print every score with its interval and null as JSON.
    """
    for option, value, least in (("--seed", seed, 0), ("--batch-size", batch_size, 1)):
        at_least(option, value, least)
    import patchclamp
    from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of

    with watch() as progress:
        net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
        typing = HeadTyping(num_rows=rows, length=length, seed=seed, batch_size=batch_size)
        table = typing.run(net)
    if as_json:
        terminal.data_json({"model": net.name, "model_hash": net.hash, "heads": table.to_dicts()})
        return
    kinds = list(dict.fromkeys(table["kind"].to_list()))
    scores = {(n, h, k): s for n, h, k, s in table["layer", "head", "kind", "score"].iter_rows()}
    terminal.table(
        sys.stdout,
        ("head", "does", *kinds),
        [
            (
                f"{layer}.{head}",
                ", ".join(found) or "-",
                *(f"{scores[layer, head, kind]:.2f}" for kind in kinds),
            )
            for (layer, head), found in kinds_of(table).items()
        ],
    )
    terminal.message(
        "attention is a share of 1, copy a rank from -1 to 1; a kind is named where it is beyond "
        "chance for all heads together"
    )


def reproduce(
    circuit: Path,
    model: str | None = None,
    *,
    tolerance: float = SAME_SCORE,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> int:
    """Find a circuit again from nothing but its record, and say whether it is the same.

    Exits with 1 if it is not.

    Args:
        circuit: what `patchclamp circuit --out` wrote.
        model: the network; the name in the record without it.
        tolerance: change of a score that counts as none, as a share of the largest score.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print the comparison as JSON.
    """
    if not 0 <= tolerance < 1:
        raise OptionError("--tolerance is a share of the largest score", got=str(tolerance))
    import patchclamp
    from patchclamp.methods.circuits.finding.search import again

    recorded = read_circuit(circuit)
    _require_shipped(recorded, circuit)
    name = _model_of(recorded, circuit) if model is None else model
    with watch() as progress:
        net = patchclamp.open(name, allow_pickle=allow_pickle, progress=progress)
        made = again(net, recorded, progress=progress)
    same = made.same_edges == 1.0 and made.largest_change <= tolerance
    if as_json:
        terminal.data_json(_reproduction_json(recorded, made, same))
    else:
        terminal.data(
            terminal.shown(
                f"{net.name}, {recorded.record.task}: {'the same' if same else 'ANOTHER'} circuit\n"
                f"edges then and now: {recorded.num_edges:,} and {made.found.circuit.num_edges:,}, "
                f"shared {made.same_edges:.1%}\n"
                f"largest change of a score: {made.largest_change:.2g} of the largest score\n"
                f"faithfulness on held-out pairs: {made.found.parts.faithfulness:.3f}, "
                f"of everything else {made.found.parts.complement:.3f}"
            )
        )
    return 0 if same else 1


def compare(
    a: Path,
    b: Path,
    *,
    model: str | None = None,
    nulls: int = 999,
    seed: int = 0,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Say what two circuits share, by edge, node and head, against chance.

    Args:
        a: what `patchclamp circuit --out` wrote.
        b: another one, of the same layers and heads.
        model: the network of one of the two, to compare by kind of head as well.
        nulls: how often B's edges are moved at random among like edges.
        seed: of the null, and of the tokens that heads are typed on.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print JSON.
    """
    at_least("--nulls", nulls, 1)
    at_least("--seed", seed, 0)
    from patchclamp.methods.circuits.comparing.comparison import CircuitComparison

    first, second = read_circuit(a), read_circuit(b)
    kinds = None
    if model is not None:
        import patchclamp
        from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of

        with watch() as progress:
            net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
            _require_own(net, first, second)
            kinds = kinds_of(HeadTyping(seed=seed).run(net))
    table = CircuitComparison(num_nulls=nulls, seed=seed).run(first, second, kinds)
    differ = _records_that_differ(first, second)
    if as_json:
        terminal.data_json({"a": str(a), "b": str(b), "differ": differ, "levels": table.to_dicts()})
    else:
        terminal.table(
            sys.stdout,
            ("by", "A", "B", "shared", "of either", "of A", "of B", "by chance", "p"),
            [_overlap(row) for row in table.to_dicts()],
        )
    for name, (mine, theirs) in differ.items():
        terminal.message(f"note: the circuits differ in {name}: {mine} and {theirs}")


def diff(
    before: str,
    after: str,
    *,
    task: str,
    variant: str | None = None,
    num: int = PAIRS,
    seed: int = 0,
    direction: DirectionName = "both",
    flips: int = 1999,
    batch_size: int = 16,
    force: Switch = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> int:
    """Say which heads matter to a behaviour in one checkpoint, the other, both or neither.

    Every head is patched exactly, on the same held-out pairs in both. Exits with 1 if a head was
    gained, lost or changed, or if neither checkpoint does the task.

    Args:
        before: a name that `patchclamp models` lists, a folder or a file.
        after: another checkpoint of the same layers and heads.
        task: a behaviour that `patchclamp circuits tasks` lists.
        variant: how its corrupt prompts are made; the first that is listed without it.
        num: pairs to measure heads on.
        seed: of the pairs, of sign flips and of intervals.
        direction: corrupt values in the clean run, clean ones in the corrupt run, or the mean.
        flips: sign flips of the test.
        batch_size: pairs that run at a time.
        force: go on where neither checkpoint does the task.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print every head as JSON.
    """
    for option, value, least in (("--num", num, 1), ("--seed", seed, 0), ("--flips", flips, 1)):
        at_least(option, value, least)
    import patchclamp
    from patchclamp.methods.circuits.checking.behaviour import performs
    from patchclamp.methods.circuits.comparing.checkpoints import CheckpointDiff
    from patchclamp.methods.circuits.finding.edge_attribution import Direction
    from patchclamp.methods.circuits.heads.head_effects import HeadEffects

    measure = HeadEffects(direction=Direction(direction), batch_size=batch_size)
    with watch() as progress:
        nets = [
            patchclamp.open(name, allow_pickle=allow_pickle, progress=progress)
            for name in (before, after)
        ]
        pairs = _same_pairs(nets[0], nets[1], task, variant, num, seed)
        performances = [performs(net, pairs, batch_size=batch_size, seed=seed) for net in nets]
        changes = None
        if force or any(p.present for p in performances):
            first, second = (measure.run(net, pairs, progress=progress) for net in nets)
            if first.heads != second.heads:
                raise DataError(
                    "the checkpoints have different heads and cannot be compared",
                    got=f"{len(first.heads)} and {len(second.heads)} heads",
                )
            judged = CheckpointDiff(num_flips=flips, seed=seed)
            changes = judged.run(first.effects, second.effects, first.heads)
    if changes is None:
        return _neither(performances, as_json)
    if as_json:
        terminal.data_json(_changes_json(performances, changes))
    else:
        _print_changes(performances, changes)
    return 1 if _num_changed(changes.table) else 0


def read_circuit(path: Path) -> Circuit:
    """A circuit from the file that `patchclamp circuit --out` wrote.

    Raises: DataError: no such file, not a circuit, damaged; with the file's name.
    """
    from patchclamp.core.circuit import Circuit

    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise DataError(f"cannot read the circuit '{path}'", got=e.strerror or str(e)) from e
    except UnicodeDecodeError as e:
        raise DataError(f"'{path}' is not UTF-8 text, so it is no circuit") from e
    try:
        return Circuit.from_json(text)
    except DataError as e:
        raise DataError(
            f"'{path}': {e.what}",
            got=e.got,
            expected=e.expected,
            nearest=e.nearest,
            hint="give a file that patchclamp circuit --out wrote",
        ) from e


def _require_shipped(circuit: Circuit, path: Path) -> None:
    """Only pairs that are drawn can be drawn again."""
    from patchclamp.data.behaviours import catalogue

    if circuit.record.task not in {entry.name for entry in catalogue()}:
        raise DataError(
            f"the record of '{path}' does not hold its pairs, which are not of a listed task",
            got=f"'{circuit.record.task}'",
            hint="find it again with patchclamp circuit MODEL --pairs FILE, then "
            "patchclamp circuits compare",
        )


def _model_of(circuit: Circuit, path: Path) -> str:
    """The network's name in the record, if it opens by name."""
    from patchclamp.model.sources.catalogue import names

    if circuit.record.model not in names():
        raise OptionError(
            "the network of the circuit does not open by name",
            got=f"'{circuit.record.model}'",
            hint=f"patchclamp circuits reproduce {path} MODEL",
        )
    return circuit.record.model


def _require_own(net: Net, first: Circuit, second: Circuit) -> None:
    """Kinds of another network's heads say nothing."""
    hashes = [c.record.model_hash for c in (first, second)]
    if net.hash not in hashes:
        raise DataError(
            "neither circuit is of the network given by --model",
            got=f"{net.name} with weights {net.hash[:12]}",
            expected=f"weights {' or '.join(dict.fromkeys(h[:12] for h in hashes))}",
        )


def _reproduction_json(recorded: Circuit, made: Reproduction, same: bool) -> dict[str, object]:
    return {
        "same": same,
        "same_edges": made.same_edges,
        "largest_change": made.largest_change,
        "edges": {"recorded": recorded.num_edges, "now": made.found.circuit.num_edges},
        "faithfulness": made.found.parts.faithfulness,
        "complement": made.found.parts.complement,
    }


def _overlap(row: dict[str, object]) -> tuple[str, ...]:
    """A row of the comparison as text."""
    shares = {key: f"{value:.0%}" for key, value in row.items() if isinstance(value, float)}
    return (
        *(str(row[key]) for key in ("level", "num_a", "num_b", "shared")),
        f"{shares['jaccard']} ({shares['low']} to {shares['high']})",
        shares["share_of_a"],
        shares["share_of_b"],
        f"{shares['null_mean']} ({shares['null_low']} to {shares['null_high']})",
        f"{row['p']:.3f}",
    )


def _records_that_differ(first: Circuit, second: Circuit) -> dict[str, list[str]]:
    """Fields in which overlap may come from how the circuits were found."""
    pairs = {name: [str(getattr(c.record, name)) for c in (first, second)] for name in RECORDED}
    for name in CHOSEN:
        pairs[name] = [str(c.record.options.get(name) or "as usual") for c in (first, second)]
    return {name: both for name, both in pairs.items() if both[0] != both[1]}


def _same_pairs(
    before: Net, after: Net, task: str, variant: str | None, num: int, seed: int
) -> tuple[TokenPairs, ...]:
    """Held-out pairs that are the same tokens for both. Raises: DataError where they are not."""
    import torch

    from patchclamp.data.behaviours import token_pairs
    from patchclamp.data.behaviours.pairs import Split

    drawn = []
    for net in (before, after):
        drawn.append(
            token_pairs(
                task,
                num,
                tokenizer=tokenizer_of(net),
                seed=seed,
                split=Split.HELD_OUT,
                variant=variant,
            )
        )
    same = len(drawn[0]) == len(drawn[1]) and all(
        torch.equal(x.clean, y.clean) and torch.equal(x.correct, y.correct)
        for x, y in zip(*drawn, strict=True)
    )
    if not same:
        raise DataError(
            "the two networks read the prompts as different tokens, so they are not two "
            "checkpoints of one network",
            got=f"{before.name} and {after.name}",
        )
    return drawn[0]


def _neither(performances: list[Performance], as_json: bool) -> int:
    """Say that there is nothing to compare; returns the exit code."""
    from patchclamp.cli.circuit_summary import performance_json, print_performance
    from patchclamp.methods.circuits.checking.behaviour import LEAST_PAIRS

    if performances[0].num < LEAST_PAIRS:  # a matter of the call, not of the networks
        performances[0].require()
    if as_json:
        terminal.data_json(
            {"performance": [performance_json(p) for p in performances], "heads": None}
        )
    for performance in performances:
        if not as_json:
            print_performance(performance)
        terminal.message(f"not compared: {performance.objection}")
    return 1


def _changes_json(performances: list[Performance], changes: CheckpointChanges) -> dict[str, object]:
    from patchclamp.cli.circuit_summary import performance_json

    return {
        "performance": [performance_json(p) for p in performances],
        "heads": changes.table.to_dicts(),
        "changed_between_halves": [changes.false_before, changes.false_after],
    }


def _print_changes(performances: list[Performance], changes: CheckpointChanges) -> None:
    """How both do the task, then the heads that matter in either."""
    import polars as pl

    from patchclamp.cli.circuit_summary import print_performance
    from patchclamp.methods.circuits.comparing.checkpoints import Change

    for performance in performances:
        print_performance(performance)
    absent = pl.col("change") == str(Change.ABSENT)
    rows = changes.table.filter(~absent).sort(pl.col("difference").abs(), descending=True)
    terminal.data(f"\nExact effects of heads on the {performances[0].metric}:\n")
    terminal.table(
        sys.stdout,
        ("head", "change", "before", "after", "difference", "p"),
        [_head_row(row) for row in rows.head(HEADS_SHOWN).to_dicts()],
    )
    left = rows.height - HEADS_SHOWN
    num_absent = changes.table.height - rows.height
    terminal.data(
        (f"{left} more heads matter. " if left > 0 else "")
        + f"{num_absent} heads matter in neither."
    )
    terminal.message(
        "control: between two halves of the pairs of one checkpoint "
        f"{changes.false_before} and {changes.false_after} heads seem to change"
    )


def _head_row(row: dict[str, object]) -> tuple[str, ...]:
    def with_interval(name: str, prefix: str) -> str:
        return f"{row[name]:.3f} ({row[f'{prefix}low']:.3f} to {row[f'{prefix}high']:.3f})"

    return (
        f"{row['layer']}.{row['head']}",
        str(row["change"]),
        with_interval("before", "before_"),
        with_interval("after", "after_"),
        with_interval("difference", ""),
        f"{row['p']:.4f}",
    )


def _num_changed(table: pl.DataFrame) -> int:
    """Heads that were gained, lost or changed."""
    from patchclamp.methods.circuits.comparing.checkpoints import Change

    wanted = [str(change) for change in (Change.GAINED, Change.LOST, Change.CHANGED)]
    return table.filter(table["change"].is_in(wanted)).height

"""`patchclamp verify` and `check-certificate`: is a property of a network proved, and how?

The first line on stdout is `sat`, `unsat`, `unknown` or `timeout`, as VNN-COMP has it; after
`sat` follows the counterexample. What cannot be read prints no such line at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from patchclamp.cli import terminal
from patchclamp.cli.failures import describe
from patchclamp.cli.options import AsJson, Switch
from patchclamp.cli.progress import watch
from patchclamp.cli.values import at_least, duration
from patchclamp.core.errors import EngineError, OptionError, PropertyError, SourceError

if TYPE_CHECKING:
    from patchclamp.core.findings import Json
    from patchclamp.core.progress import Progress
    from patchclamp.methods.bounds.counterexample import Counterexample
    from patchclamp.methods.bounds.instances import Instance, Row
    from patchclamp.methods.bounds.verify import Verdict

TIMEOUT = "5m"
"""Time for one property where nothing else is said."""

GRACE = 0.5
"""Seconds after its time limit at which a solver that has not returned is interrupted."""

AGAIN = 2.0
"""Seconds to the next interruption, should the first have been swallowed."""

CODES = {"unsat": 0, "sat": 1, "unknown": 3, "timeout": 3}
"""Exit codes: a counterexample is a finding; what was not decided is not clean."""


def verify(
    network: Path | None = None,
    property_file: Path | None = None,
    *,
    batch: Path | None = None,
    results: Path | None = None,
    timeout: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    certificate: Path | None = None,
    seed: int = 0,
    as_json: AsJson = False,
    exit_zero: Switch = False,
) -> int:
    """Prove a property of a network, or find a counterexample.

    Prints sat (with the counterexample), unsat, unknown or timeout, in the form of VNN-COMP.
    Exits with 0 for unsat, 1 for sat, 3 where nothing was decided; after a batch with 0, or
    with 3 if an instance could not be run.

    Args:
        network: an .onnx or .onnx.gz file.
        property_file: a .vnnlib or .vnnlib.gz file.
        batch: a list of instances instead: network,property,seconds on every line. A batch that
            was interrupted goes on when the same command is given again.
        results: where the rows of the batch go; instances.csv gives instances.results.csv
            in the working folder.
        timeout: time for one property: 90s, 2m, or plain seconds; 5m or what the list says.
        certificate: write the proof to this file if the answer is unsat.
        seed: seed of everything that is drawn.
        as_json: print JSON.
        exit_zero: exit with 0 whatever the answer is.
    """
    seconds = None if timeout is None else duration("--timeout", timeout)
    at_least("--seed", seed, 0)
    if batch is not None:
        if network is not None or certificate is not None:
            raise OptionError("--batch takes the networks from its list, and writes no certificate")
        out = Path(f"{batch.name.removesuffix('.csv')}.results.csv") if results is None else results
        return _batch(batch, out, seconds, seed, as_json=as_json, exit_zero=exit_zero)
    if network is None or property_file is None or results is not None:
        raise OptionError(
            "verify takes a network and a property, or --batch with a list of them",
            hint="patchclamp verify NET.onnx PROP.vnnlib",
        )
    if certificate is not None:
        terminal.require_writable(certificate)
    limit = duration("--timeout", TIMEOUT) if seconds is None else seconds
    with watch() as progress:
        answer, verdict = _verdict(network, property_file, limit, seed, progress)
    _print(answer, verdict, as_json=as_json)
    if certificate is not None:
        _write(certificate, answer, verdict)
    return 0 if exit_zero else CODES[answer]


def check_certificate(
    file: Path,
    *,
    network: Path,
    property_file: Annotated[Path, Parameter(name="--property")],
    as_json: AsJson = False,
) -> int:
    """Check a proof that `patchclamp verify --certificate` wrote, without the solver.

    Prints valid or invalid, and what is wrong. Exits with 0 for valid and 1 for invalid.

    Args:
        file: the certificate.
        network: the .onnx or .onnx.gz file that it is about.
        property_file: the .vnnlib or .vnnlib.gz file that it proves.
        as_json: print JSON.
    """
    from patchclamp.methods.bounds.certificate.check import check
    from patchclamp.methods.bounds.certificate.files import read_certificate
    from patchclamp.methods.bounds.vnnlib import read_property

    network, property_file = _found(network, "network"), _found(property_file, "property")
    stated = read_property(property_file)
    found = check(read_certificate(file), network, stated, property_file)
    if as_json:
        terminal.data_json(
            {
                "valid": found.valid,
                "failures": list(found.failures),
                "leaves": found.num_leaves,
                "holds": "reals" if found.valid else None,
            }
        )
    else:
        terminal.data("\n".join(["valid" if found.valid else "invalid", *found.failures]))
        terminal.message(f"{found.num_leaves:,} leaves bounded again in float64, rounded outward")
    return 0 if found.valid else 1


class _TimeUpError(BaseException):
    """Raised by the alarm; no Exception, so that no handler on the way takes it for a failure."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise _TimeUpError in the block after so many seconds.

    Only in the main thread of a system with interval timers; elsewhere the solver's own
    watch over its time is all there is.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    def up(number: int, frame: FrameType | None) -> None:
        raise _TimeUpError

    earlier = signal.signal(signal.SIGALRM, up)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def _verdict(
    network: Path, property_file: Path, limit: float, seed: int, progress: Progress
) -> tuple[str, Verdict | None]:
    """The answer, and the verdict; None if the time was up before the solver had one."""
    began = time.monotonic()
    network, property_file = _found(network, "network"), _found(property_file, "property")
    # Imported before the alarm is set: half a package could not be imported again.
    _import_readers()
    from patchclamp.methods.bounds.verify import Verify
    from patchclamp.methods.bounds.vnnlib import read_property

    def left() -> float:
        return limit - (time.monotonic() - began)

    try:
        with _alarm(left() + GRACE):
            stated = read_property(property_file)
            if left() <= 0:
                return "timeout", None
            solver = Verify(timeout=left(), seed=seed)
            verdict = solver.run(network, stated, property_file, progress)
    except _TimeUpError:
        return "timeout", None
    answer = str(verdict.answer)
    if answer == "sat" and _unsupported(verdict.counterexample):
        raise EngineError("the solver answered sat without a point that is a counterexample")
    return answer, verdict


def _unsupported(found: Counterexample | None) -> bool:
    from patchclamp.methods.bounds.counterexample import Standing

    return found is None or found.standing is Standing.NONE


def _import_readers() -> None:
    from patchclamp.model.sources.torchvision_stand_in import import_onnx2torch

    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    if importlib.util.find_spec("onnx2torch") is not None:
        import_onnx2torch()


def _found(path: Path, what: str) -> Path:
    """The file or its packed form. What is neither is left to those who read it, with errors."""
    from patchclamp.methods.bounds.instances import plain_or_packed

    found = plain_or_packed(path)
    if found is None:
        error = SourceError if what == "network" else PropertyError
        raise error(f"there is no {what} '{path}'", expected="a file, or its packed form .gz")
    return found


def _print(answer: str, verdict: Verdict | None, *, as_json: bool) -> None:
    counterexample = None if verdict is None else verdict.counterexample
    if as_json:
        terminal.data_json(_plain(answer, verdict))
    elif answer == "sat" and counterexample is not None:
        terminal.data(f"{answer}\n{counterexample.text()}")
    else:
        terminal.data(answer)
    sys.stdout.flush()
    terminal.message(f"{answer}: {_detail(answer, verdict)}")


def _detail(answer: str, verdict: Verdict | None) -> str:
    """What the answer rests on, in one line."""
    if verdict is None:
        return "the time was up while the files were read or the solver ran"
    found = verdict.counterexample
    parts = [verdict.reason]
    if answer == "sat" and found is not None:
        parts.append(f"the counterexample is {found.standing}")
        if found.holds_in_runtime is None:
            parts.append("not checked in onnxruntime, which is not installed")
        elif not found.holds_in_runtime:
            parts.append("onnxruntime does not confirm it without tolerance")
    if answer in ("sat", "unsat"):
        parts.append(f"holds over {verdict.holds}")
    parts.append(f"{verdict.boxes:,} boxes, {verdict.cpu_seconds:.1f} CPU-seconds")
    return "; ".join(part for part in parts if part)


def _plain(answer: str, verdict: Verdict | None) -> dict[str, object]:
    if verdict is None:
        return {"answer": answer, "reason": _detail(answer, verdict), "counterexample": None}
    return {
        "answer": answer,
        "reason": verdict.reason,
        "holds": verdict.holds,
        "cpu_seconds": verdict.cpu_seconds,
        "boxes": verdict.boxes,
        "certificate": verdict.certificate is not None,
        "counterexample": None
        if answer != "sat" or verdict.counterexample is None
        else _plain_counterexample(verdict.counterexample),
    }


def _plain_counterexample(found: Counterexample) -> dict[str, Json]:
    margins = (found.margin, found.runtime_margin)
    margin, runtime = (m if m is not None and math.isfinite(m) else None for m in margins)
    return {
        "x": found.x.tolist(),
        "y": found.y.tolist(),
        "standing": str(found.standing),
        "margin": margin,
        "runtime_margin": runtime,
        "runtime_checked": found.runtime_margin is not None,
    }


def _write(path: Path, answer: str, verdict: Verdict | None) -> None:
    from patchclamp.methods.bounds.certificate.files import write_certificate

    if answer != "unsat" or verdict is None:
        terminal.message("no certificate: only unsat has one")
    elif verdict.certificate is None:
        terminal.message("no certificate: the solver gave none with this answer")
    else:
        write_certificate(verdict.certificate, path)
        terminal.message(f"certificate: {path}")


def _batch(
    batch: Path, out: Path, seconds: float | None, seed: int, *, as_json: bool, exit_zero: bool
) -> int:
    import dataclasses

    from patchclamp.methods.bounds.instances import ERROR, read_instances, run_batch

    instances = read_instances(batch, timeout=seconds)
    terminal.require_writable(out)
    with watch() as progress:
        rows = run_batch(instances, lambda instance: _solve(instance, seed), out, progress)
    if as_json:
        terminal.data_json([dataclasses.asdict(row) for row in rows])
    else:
        terminal.data(str(out))
    counts = Counter(row.verdict for row in rows)
    terminal.message(
        f"{len(rows)} instances: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}"
    )
    return 3 if counts[ERROR] and not exit_zero else 0


def _solve(instance: Instance, seed: int) -> Row:
    """One row; what fails becomes one too, so that a batch outlives its worst instance."""
    from patchclamp.core.progress import SILENT
    from patchclamp.methods.bounds.instances import ERROR, Row

    began, cpu = time.monotonic(), time.process_time()
    try:
        answer, verdict = _verdict(
            instance.network, instance.property, instance.timeout, seed, SILENT
        )
        detail = _detail(answer, verdict)
    except Exception as error:
        answer, detail = ERROR, describe(error, [], []).what
    return Row(
        network=instance.names[0],
        property=instance.names[1],
        verdict=answer,
        seconds=round(time.monotonic() - began, 3),
        cpu_seconds=round(time.process_time() - cpu, 3),
        detail=detail,
    )

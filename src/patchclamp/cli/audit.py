"""`patchclamp audit`: measure a network's insides and write the page and the findings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from patchclamp.cli import terminal
from patchclamp.cli.options import AllowPickle, Switch
from patchclamp.cli.progress import watch
from patchclamp.cli.values import at_least, duration
from patchclamp.core.errors import OptionError

if TYPE_CHECKING:
    from patchclamp.core.document import Document
    from patchclamp.core.findings import Finding

STRONGEST = 5
"""Findings that the summary spells out."""


def audit(
    model: str = "digits-cnn",
    *,
    data: str | None = None,
    budget: Annotated[str, Parameter(allow_leading_hyphen=True)] = "2m",
    out: Path = Path("report.html"),
    json_out: Annotated[str | None, Parameter(name="--json", allow_leading_hyphen=True)] = None,
    seed: int = 0,
    allow_pickle: AllowPickle = False,
    exit_zero: Switch = False,
) -> int:
    """Open a trained network, measure its insides and write one self-contained page.

    Exits with 1 if a finding is a problem.

    Args:
        model: a name that `patchclamp models` lists, a folder or a file.
        data: a name that `patchclamp data` lists, or a file; chosen by the model without it.
        budget: time to spend: 90s, 2m, 1h30m, or plain seconds.
        out: the page.
        json_out: also write the findings as JSON to this file; - prints them.
        seed: seed of everything that is drawn.
        allow_pickle: read pickled files, which can run any code that is in them.
        exit_zero: exit with 0 whatever is found.
    """
    seconds = duration("--budget", budget)
    at_least("--seed", seed, 0)
    findings_file = _checked_outputs(out, json_out)

    import patchclamp.audit as auditor
    from patchclamp import report
    from patchclamp.report.json_form import plain_document

    given = _command(model, data=data, budget=budget, seed=seed, allow_pickle=allow_pickle)
    with watch() as progress:
        document = auditor.audit(
            model,
            data,
            budget_seconds=seconds,
            seed=seed,
            progress=progress,
            allow_pickle=allow_pickle,
            command=given,
        )
    report.write_page(document, out)
    if findings_file is not None:
        report.write_findings(document, findings_file)
    num_problems = auditor.problems(document)
    _summary(document, num_problems)
    if json_out == "-":
        terminal.data_json(plain_document(document))
    else:
        terminal.data("\n".join(str(path) for path in (out, findings_file) if path is not None))
    return 1 if num_problems and not exit_zero else 0


def _checked_outputs(out: Path, json_out: str | None) -> Path | None:
    """Refuse outputs that could not be written, before the work; returns the file of findings."""
    if json_out is not None and json_out.startswith("-") and json_out != "-":
        raise OptionError("--json takes a file, or - to print", got=repr(json_out))
    terminal.require_writable(out)
    if json_out is None or json_out == "-":
        return None
    findings = Path(json_out)
    terminal.require_writable(findings)
    if findings.resolve() == out.resolve():
        raise OptionError("--out and --json name the same file", got=f"'{out}'")
    return findings


def _command(model: str, *, data: str | None, budget: str, seed: int, allow_pickle: bool) -> str:
    """The command line that makes the same document again."""
    words = ["patchclamp", "audit", model, "--budget", budget, "--seed", str(seed)]
    if data is not None:
        words += ["--data", data]
    if allow_pickle:
        words.append("--allow-pickle")
    return shlex.join(words)


def _summary(document: Document, num_problems: int) -> None:
    """Findings by level of evidence, and the strongest ones, to stderr."""
    from patchclamp.core.findings import Evidence, Verdict

    findings = document.findings
    rows = []
    for level in reversed(Evidence):
        verdicts = [f.verdict for f in findings if f.evidence is level]
        rows.append((str(level), *(str(verdicts.count(verdict)) for verdict in Verdict)))
    terminal.message(f"{document.title}: {len(findings)} findings")
    terminal.table(sys.stderr, ("evidence", *(str(verdict) for verdict in Verdict)), rows)
    for finding in strongest(findings, STRONGEST):
        terminal.message(f"{finding.evidence}: {_sentence(finding)}")
    if document.left_out:
        terminal.message(f"left out: {', '.join(part.what for part in document.left_out)}")
    if num_problems:
        terminal.message(
            f"problems: {num_problems} of {len(findings)} findings; the page says which"
        )


def strongest(findings: Iterable[Finding], num: int) -> list[Finding]:
    """Decided findings, the best proven first, and among equals those farthest from their null."""
    from patchclamp.core.findings import Evidence, Verdict

    levels = list(Evidence)

    def strength(finding: Finding) -> tuple[int, float]:
        level, null = levels.index(finding.evidence), finding.null
        if finding.effect is None or null is None or null.low is None or null.high is None:
            return level, 0.0
        return level, abs(finding.effect - null.mean) / max(null.high - null.low, 1e-12)

    decided = [f for f in findings if f.verdict is not Verdict.UNKNOWN]
    return sorted(decided, key=strength, reverse=True)[:num]


def _sentence(finding: Finding) -> str:
    """The claim with its verdict and effect."""
    from patchclamp.report.text import number

    text = f"{finding.claim} ({finding.verdict}: {number(finding.effect)} {finding.unit}"
    if finding.interval is not None:
        low, high = number(finding.interval.low), number(finding.interval.high)
        text += f", {finding.interval.level:.0%} interval {low} to {high}"
    return f"{text})"

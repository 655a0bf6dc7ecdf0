"""`patchclamp report`: the page of an audit, drawn again from its findings."""

from __future__ import annotations

from pathlib import Path

from patchclamp.cli.options import AsJson
from patchclamp.cli.terminal import data, data_json, require_writable


def report(findings: Path, *, out: Path = Path("report.html"), as_json: AsJson = False) -> None:
    """Draw the page of an audit again from its findings; needs neither model nor data.

    Args:
        findings: the JSON that `patchclamp audit --json` wrote.
        out: the page.
        as_json: print what was written as JSON.
    """
    from patchclamp.report import read_document, write_page

    require_writable(out)
    document = read_document(findings)
    write_page(document, out)
    if as_json:
        data_json({"page": str(out), "findings": len(document.findings)})
    else:
        data(str(out))

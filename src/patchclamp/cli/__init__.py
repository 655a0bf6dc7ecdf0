"""The command line: `patchclamp audit`, `sites`, `record`, `report`, `doctor` and the catalogues.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 clean, 1 findings,
2 the call is wrong, 3 something failed. Every command lives in a module of its own that
is imported when it runs, and imports torch no sooner than it needs it.
"""

from patchclamp.cli.app import main, run

__all__ = ["main", "run"]

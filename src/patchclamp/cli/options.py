"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
"""A flag that is off unless given, and has no `--no-` form."""

AsJson = Annotated[bool, Parameter(name="--json", negative="", show_default=False)]
"""Print JSON instead of text."""

AllowPickle = Annotated[bool, Parameter(name="--allow-pickle", negative="", show_default=False)]
"""Read pickled files, which can run any code that is in them."""

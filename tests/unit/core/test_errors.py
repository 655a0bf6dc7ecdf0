"""One form of message for all errors, and the two exit codes."""

from __future__ import annotations

import pytest

from patchclamp.core import errors
from patchclamp.core.errors import PatchclampError, SiteError, nearest


def test_the_message_says_what_got_expected_nearest_and_the_way_out() -> None:
    error = SiteError("no site 'x'", got="x", expected="y", nearest="z", hint="print(net.sites)")
    assert str(error) == "no site 'x'; got x; expected y; nearest 'z'. hint: print(net.sites)"
    assert str(SiteError("no site 'x'")) == "no site 'x'."


def test_nearest_is_none_when_nothing_is_close() -> None:
    assert nearest("blocks.3.mpl", ["blocks.3.mlp", "embed"]) == "blocks.3.mlp"
    assert nearest("qqqq", ["blocks.3.mlp", "embed"]) is None


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SiteError", 2),
        ("EditError", 2),
        ("InputError", 2),
        ("TargetError", 2),
        ("SourceError", 2),
        ("DataError", 2),
        ("OptionError", 2),
        ("CaptureError", 3),
        ("EngineError", 3),
        ("StoreError", 3),
        ("OutputError", 3),
        ("EvidenceError", 3),
    ],
)
def test_exit_codes_tell_the_users_mistake_from_a_failure(name: str, code: int) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, PatchclampError)
    assert cls.exit_code == code

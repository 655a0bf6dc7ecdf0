"""Checks of a safetensors file that need neither its weights nor a library.

The format: eight bytes with the length of the header, the header as JSON with the
place of every tensor, then the bytes of the tensors without a gap.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from patchclamp.core.errors import SourceError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format."""


def check(path: Path) -> dict[str, object]:
    """Refuse a file that is missing, empty, cut short or no safetensors file.

    Returns:
        Its header: tensor names with type, shape and place.

    Raises:
        SourceError: with what is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            plausible = 0 < length <= min(MAX_HEADER_BYTES, size - 8)
            raw = file.read(length) if plausible else b""
    except OSError as e:
        raise SourceError(f"weights file '{path}' cannot be read: {e.strerror}") from e
    if size == 0:
        raise SourceError(f"weights file '{path}' is empty")
    if not plausible:
        raise SourceError(
            f"'{path}' is no safetensors file, or was cut short",
            got=f"a header of {length} bytes in a file of {size}",
        )
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise SourceError(f"'{path}' has no readable safetensors header") from e
    if size != expected:
        raise SourceError(
            f"weights file '{path}' is damaged or was cut short",
            got=f"{size:,} bytes",
            expected=f"{expected:,}",
            hint="copy or download it again",
        )
    return dict(header)

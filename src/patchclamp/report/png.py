"""PNG pictures in pure Python: written for the examples of a unit, recognised on a page.

An audit shows its inputs as they were fed to the network, a few pixels wide, so
neither an image library nor compression filters are worth a dependency here.
Follows the PNG specification (third edition): 8 bits a sample, greyscale or RGB.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib

from patchclamp.core.errors import InputError

MAGIC = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}
_MAX_SIDE = 2**31 - 1


def encode_png(width: int, height: int, pixels: bytes, channels: int) -> bytes:
    """A PNG file. The same pixels give the same bytes.

    Shapes: pixels (height, width, channels), row-major, one byte a sample.
    Raises: InputError for a size or a number of channels that does not fit.
    """
    if channels not in _COLOUR_TYPE:
        raise InputError("a picture has 1 or 3 channels", got=f"{channels}")
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        raise InputError("a picture needs at least one pixel", got=f"{width} x {height}")
    stride = width * channels
    if len(pixels) != stride * height:
        raise InputError(
            "the pixels do not fill the picture",
            got=f"{len(pixels)} bytes",
            expected=f"{stride * height} = {width} x {height} x {channels}",
        )
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    # Each row is led by its filter type: 0, none.
    rows = b"".join(b"\0" + pixels[y * stride : (y + 1) * stride] for y in range(height))
    return (
        MAGIC
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows, 9))
        + _chunk(b"IEND", b"")
    )


def png_size(png_base64: str) -> tuple[int, int] | None:
    """Width and height of a PNG in base64, or None if it is not one.

    Only the signature and the header are looked at: enough to know that the
    bytes cannot be taken for a page, a script or another kind of picture.
    """
    try:
        data = base64.b64decode(png_base64, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) < 33 or data[:8] != MAGIC or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        return None
    return width, height


def _chunk(name: bytes, body: bytes) -> bytes:
    check = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

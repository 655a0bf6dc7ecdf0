"""The PNG encoder, read back by an independent decoder written from the specification."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest

from patchclamp.core.errors import InputError
from patchclamp.report.png import encode_png, png_size


def decode(data: bytes) -> tuple[int, int, int, bytes]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    raw, stride = zlib.decompress(chunks[b"IDAT"]), width * channels + 1
    rows = [raw[y * stride : (y + 1) * stride] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return width, height, channels, b"".join(row[1:] for row in rows)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 8), (7, 3)])
def test_pixels_come_back(width: int, height: int, channels: int) -> None:
    pixels = bytes(i * 37 % 256 for i in range(width * height * channels))
    data = encode_png(width, height, pixels, channels)
    assert decode(data) == (width, height, channels, pixels)
    assert png_size(base64.b64encode(data).decode()) == (width, height)
    assert data == encode_png(width, height, pixels, channels)


@pytest.mark.parametrize(
    ("width", "height", "num", "channels", "says"),
    [
        (2, 2, 4, 2, "1 or 3 channels"),
        (0, 2, 0, 1, "at least one pixel"),
        (2, 2, 5, 1, "got 5 bytes; expected 4"),
    ],
)
def test_wrong_sizes(width: int, height: int, num: int, channels: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        encode_png(width, height, bytes(num), channels)


@pytest.mark.parametrize("text", ["", "é", "====", base64.b64encode(b"GIF89a" * 9).decode()])
def test_what_is_no_png_has_no_size(text: str) -> None:
    assert png_size(text) is None

"""Image preprocessing as Hugging Face folders write it down, in `preprocessor_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from patchclamp.core.errors import SourceError
from patchclamp.model.sources.loaded import Preprocessing

BYTE = 255.0
RESCALE = 1.0 / BYTE
"""What the library multiplies byte values with where the file names no factor."""


def read_preprocessing(folder: Path) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """The preprocessing of a folder, or None with a note that says why.

    Raises:
        SourceError: the file is not a JSON object.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, ("the folder does not say how images are prepared",)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SourceError(f"'{path}' cannot be read as JSON: {e}") from e
    if not isinstance(data, dict):
        raise SourceError(f"'{path}' is not a JSON object", got=type(data).__name__)
    try:
        return _preprocessing(data), ()
    except (KeyError, TypeError, ValueError) as e:
        return None, (f"preprocessor_config.json is of an unknown form: {e!r}",)


def _preprocessing(data: Mapping[str, object]) -> Preprocessing:
    resized = _sides(data["size"])
    cropped = resized
    if data.get("do_center_crop"):
        cropped = _sides(data.get("crop_size", data["size"]))
    factor = data.get("rescale_factor", RESCALE) if data.get("do_rescale", True) else 1.0
    normalises = data.get("do_normalize", True)
    mean = _numbers(data["image_mean"]) if normalises else (0.0, 0.0, 0.0)
    std = _numbers(data["image_std"]) if normalises else (1.0, 1.0, 1.0)
    if len(mean) != len(std) or not isinstance(factor, (int, float)):
        raise ValueError("mean, std and factor do not fit together")
    return Preprocessing(
        channels=len(mean),
        height=cropped[0],
        width=cropped[1],
        crop=min(1.0, cropped[0] / resized[0]),
        scale=BYTE * float(factor),
        mean=mean,
        std=std,
    )


def _sides(size: object) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    raise TypeError(f"size {size!r}")


def _numbers(values: object) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise TypeError(f"numbers {values!r}")
    return tuple(float(v) for v in values)

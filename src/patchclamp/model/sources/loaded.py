"""What every kind of source comes to: the module, and what is known about its use."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from patchclamp.core.findings import Json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from patchclamp.model.tokens import Tokenizer


class Task(StrEnum):
    """What a network was made for, as far as its source says."""

    CLASSIFY_IMAGES = "image classification"
    LANGUAGE = "language modelling"
    ENCODE_TEXT = "text encoding"
    OTHER = "other"


class Layout(StrEnum):
    """The order of the axes of one image."""

    CHANNELS_FIRST = "channel, row, column"
    CHANNELS_LAST = "row, column, channel"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image with values in [0, 1] becomes an input of the network.

    In this order: resize, so that the centre crop of the share `crop` has the
    size `height` x `width`; crop; then `(x * scale - mean) / std` in each channel.

    Attributes:
        layout: axes of one image as the network takes it.
        channels, height, width: size of one image as the network takes it.
        crop: side of the centre crop over side of the resized image, in (0, 1].
        scale: 1 where the network takes [0, 1], 255 where it takes byte values.
        mean, std: one number a channel.
    """

    layout: Layout = Layout.CHANNELS_FIRST
    channels: int
    height: int
    width: int
    crop: float = 1.0
    scale: float = 1.0
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An opened network.

    Attributes:
        module: a module that was given is the same object, untouched; one that was
            read here is in eval mode, with gradients as its class sets them.
        name: short, for messages and titles.
        origin: fragment of a sentence: "Hugging Face folder", "bundled".
        example_inputs: positional (tuple) or keyword (dict) arguments that it takes.
        tokenizer: None where it takes no text.
        task: what it was made for.
        call_options: keyword arguments that go with every call.
        class_names: one for each output class, or none.
        preprocessing: None where it takes no images, or nothing is known.
        context: the longest token sequence that it takes; None where nothing is known.
        notes: what a reader should know of how it was opened.
    """

    module: nn.Module
    name: str
    origin: str
    example_inputs: tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None = None
    tokenizer: Tokenizer | None = None
    task: Task = Task.OTHER
    call_options: dict[str, Json] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    context: int | None = None
    notes: tuple[str, ...] = ()

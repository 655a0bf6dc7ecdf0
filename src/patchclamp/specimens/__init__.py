"""Specimens: small families of networks, one file each, that train in a minute or two.

A specimen is a plain `nn.Module` with clear submodule names and no dependence on
the rest of the package. The bundled networks are specimens with weights, and the
others give the engines the constructs that real networks are made of: in-place
operations, modules called twice, fused attention, Python time loops, custom
gradients. Importing this module loads no torch; `build` does.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING

from patchclamp.core.errors import OptionError, SourceError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BUILDERS", "build"]

BUILDERS: dict[str, str] = {
    "digits_cnn": "patchclamp.specimens.digits_cnn:DigitsCNN",
    "digits_mlp": "patchclamp.specimens.digits_mlp:DigitsMLP",
    "lstm": "patchclamp.specimens.lstm:LSTMReader",
    "resnet": "patchclamp.specimens.resnet:SmallResNet",
    "spiking": "patchclamp.specimens.spiking:SpikingNet",
    "tiny_lm": "patchclamp.specimens.tiny_lm:TinyLM",
    "vit": "patchclamp.specimens.vit:SmallViT",
}
"""Name of each specimen and the class that builds it, as `module:class`."""


def build(name: str, **options: object) -> nn.Module:
    """A freshly initialised specimen; weights follow the torch seed of the caller.

    Raises: SourceError for an unknown name; OptionError for an unknown option.
    """
    if name not in BUILDERS:
        raise SourceError(
            f"no specimen '{name}' ({len(BUILDERS)} specimens)",
            expected="one of " + ", ".join(BUILDERS),
            nearest=nearest(name, BUILDERS),
        )
    module, _, attribute = BUILDERS[name].partition(":")
    builder = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise OptionError(
                f"specimen '{name}' has no option '{option}'",
                expected="one of " + ", ".join(known),
                nearest=nearest(option, known),
            )
    network: nn.Module = builder(**options)
    return network

"""A module that the caller has already: taken as it is, and never changed."""

from __future__ import annotations

import sys

from torch import nn

from patchclamp.model.sources.loaded import Loaded


def from_module(module: nn.Module) -> Loaded:
    """The module itself; nothing about it is set, called or replaced.

    A module of the transformers library brings its task, example inputs and the
    options that its calls need; of any other only the class is known.
    """
    name = type(module).__name__
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None and isinstance(module, library.PreTrainedModel):
        from patchclamp.model.sources.huggingface import describe

        return describe(module, name=name, origin="module given")
    return Loaded(module=module, name=name, origin="module given")

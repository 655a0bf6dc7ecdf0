"""onnx2torch without torchvision.

Two of its converters (NonMaxSuppression, RoiAlign) import torchvision when the library
is imported, so that no network opens where torchvision is absent. While onnx2torch is
being imported, and only then, a stand-in takes torchvision's place; its three functions
raise when one of those two operators runs.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

from patchclamp.core.errors import MissingExtraError, SourceError

NAMES = ("torchvision", "torchvision.ops")
OPERATORS = {
    "nms": "NonMaxSuppression",
    "box_convert": "NonMaxSuppression",
    "roi_align": "RoiAlign",
}

_one_import = threading.Lock()


def import_onnx2torch() -> ModuleType:
    """onnx2torch, imported with the stand-in if torchvision is absent.

    Raises:
        SourceError: it cannot be imported, as with a torchvision made for another torch.
    """
    with _one_import, _stand_in():
        try:
            return importlib.import_module("onnx2torch")
        except (ImportError, RuntimeError, AttributeError) as e:
            raise SourceError(
                f"onnx2torch cannot be imported: {e}",
                hint="a torchvision that does not fit torch does this; pip uninstall torchvision",
            ) from e


@contextmanager
def _stand_in() -> Iterator[None]:
    if "onnx2torch" in sys.modules or "torchvision" in sys.modules or find_spec("torchvision"):
        yield
        return
    package, ops = (ModuleType(name) for name in NAMES)
    for function, operator in OPERATORS.items():
        setattr(ops, function, _refusing(operator))
    setattr(package, "ops", ops)  # noqa: B010  (a module has no declared attributes)
    for module, name in ((package, NAMES[0]), (ops, NAMES[1])):
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)


def _refusing(operator: str) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise MissingExtraError(
            f"the ONNX operator {operator} is computed by torchvision, which is not installed",
            hint="pip install torchvision, in the version that belongs to your torch",
        )

    return refuse

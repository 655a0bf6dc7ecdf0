"""A network's own architecture with fresh weights, for benches to train.

What holds for the bench's small network need not hold for the user's. Where an architecture
takes square images that are large enough, it can be trained on the bench itself: a copy with all
weights drawn anew, which sees the bench's channel in each of its own and of whose outputs the
first few count. The user's network is not touched.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from patchclamp.core.errors import EngineError
from patchclamp.net import Net
from patchclamp.truth.attribution.base import Build
from patchclamp.truth.attribution.fitting import Recipe
from patchclamp.truth.attribution.glyphs import BOX, NUM_CLASSES, Glyphs

RECIPE = Recipe(epochs=6, rate=3e-3, decay=0.01)


class Alike(nn.Module):
    """A network that sees one channel in all of its own, and of whose outputs the first count.

    Shapes: (n, 1, side, side) to (n, num_classes).
    """

    def __init__(self, module: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.module, self.channels, self.num_classes = module, channels, num_classes

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.module(x.expand(-1, self.channels, -1, -1))
        return made[:, : self.num_classes]


def glyphs_for(net: Net, *, seconds: float = 300.0, seed: int = 0) -> Glyphs:
    """The glyph bench with this network's architecture.

    Args:
        seconds: CPU time that training may take, as measured on a few rows.

    Raises:
        EngineError: why it cannot be: other inputs, too small, no classes, parts that cannot be
            drawn anew, or too slow.
    """
    shapes = [x.shape[1:] for x in net.example.tensors()]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][1] != shapes[0][2]:
        raise _cannot(net, "it does not take one square image", str([tuple(s) for s in shapes]))
    channels, side = int(shapes[0][0]), int(shapes[0][1])
    if side < 2 * BOX:
        raise _cannot(net, f"a glyph needs {2 * BOX} pixels a side", f"{side}")
    with torch.no_grad():
        output = net.run(net.example).output
    if output.ndim != 2 or output.shape[1] < NUM_CLASSES:
        raise _cannot(net, f"it gives fewer than {NUM_CLASSES} classes", str(tuple(output.shape)))
    build = alike(net, channels)
    bench = Glyphs(size=side, num=100, num_train=2000, recipe=RECIPE, build=build, seed=seed)
    needed = _seconds(build, side) * bench.num_train * RECIPE.epochs
    if needed > seconds:
        raise _cannot(net, "training it takes too long", f"about {needed:.0f} s of {seconds:.0f}")
    return bench


def alike(net: Net, channels: int) -> Build:
    """What makes copies of the architecture with fresh weights.

    Raises:
        EngineError: a weight that no part of the network draws anew.
    """

    def build(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        module = copy.deepcopy(net.module)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        return Alike(module, channels, num_classes)

    with torch.random.fork_rng():
        fresh, old = build((1, 1, 1), NUM_CLASSES), dict(net.module.named_parameters())
    for name, p in fresh.named_parameters():
        before = old[name.removeprefix("module.")]
        constant = bool((before == before.flatten()[0]).all())
        if not constant and torch.equal(p.detach(), before.detach()):
            raise _cannot(net, "a part of it cannot be drawn anew", name.removeprefix("module."))
    return build


def _seconds(build: Build, side: int) -> float:
    """CPU time of one row forwards and backwards."""
    with torch.random.fork_rng():
        module, x = build((1, side, side), NUM_CLASSES), torch.rand(8, 1, side, side)
    began = time.process_time()
    module(x).sum().backward()
    return (time.process_time() - began) / len(x)


def _cannot(net: Net, why: str, got: str) -> EngineError:
    return EngineError(
        f"{net.name} cannot be trained on glyphs: {why}",
        got=got,
        hint="the bench's own network, which is the default",
    )

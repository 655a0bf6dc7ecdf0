"""Networks that the bounds and the verifier are measured on; made here in seconds, no download.

`problem(name)` gives a network with a box of inputs. Three of the four in `BOUNDED` have the
shape of public competition networks (fully connected MNIST 256x4, the OVAL base convolution,
ERAN's sigmoid 6x200) and are trained here on scikit-learn's 8x8 digits, enlarged to 28x28, or to
32x32 in random colours. The fourth is the real ACAS Xu 1_1 with the box of property 3, read from
a folder laid out as the competition's: ../shared/data/acasxu beside the repository, or where
PATCHCLAMP_ACASXU says. `FAMILIES` are smaller networks of other kinds; `bound_families.py`
writes them as ONNX with properties.

Training is adversarial (one signed-gradient step per batch), or bounds would be vacuous at the
sizes of box that a property asks for. It depends on nothing but the recipe and PyTorch's
version; weights are kept as safetensors under the temporary folder, or where
PATCHCLAMP_BENCH_CACHE says, under a name made from this file's text.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss

NUM_TRAINED = 1500  # images trained on; the other 297 are for properties
BATCH = 50
GAIN = torch.tensor([1.0, 0.1, 3.0, 0.4])  # of the control law that the controllers learn

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network and a box of inputs.

    Shapes: example, low, high (1, *input); the example is inside the box.
    """

    name: str
    module: nn.Sequential
    example: Tensor
    low: Tensor
    high: Tensor


class Residual(nn.Module):
    """ReLU of a body plus a way past it."""

    def __init__(self, body: nn.Sequential, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Normalise(nn.Module):
    """(x - mean) / std of every channel; a constant part of the network, as competitions have."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, num_channels, 1, 1), mean))
        self.register_buffer("std", torch.full((1, num_channels, 1, 1), std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is made.

    eps: radius of the box of `problem`, around the first held-out image.
    training_eps: size of the adversarial step.
    """

    build: Callable[[], nn.Sequential]
    data: Callable[[], Data]
    eps: float
    training_eps: float
    num_epochs: int = 10
    rate: float = 1e-3


@cache
def grey() -> Data:
    """Digits as (1797, 1, 28, 28) in 0..1, and their classes."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    made = interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    return made[order], torch.from_numpy(digits.target)[order]


@cache
def colour() -> Data:
    """Digits as (1797, 3, 32, 32) in 0..1: random dark paper, random bright ink, some noise."""
    images, classes = grey()
    images = interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    random = torch.Generator().manual_seed(1)
    paper = 0.3 * torch.rand(len(images), 3, 1, 1, generator=random)
    ink = 0.7 + 0.3 * torch.rand(len(images), 3, 1, 1, generator=random)
    noise = 0.03 * torch.randn(len(images), 3, 32, 32, generator=random)
    return (paper + (ink - paper) * images + noise).clamp(0, 1), classes


@cache
def small() -> Data:
    """Digits as (1797, 1, 14, 14) in 0..1, and their classes."""
    images, classes = grey()
    return interpolate(images, size=(14, 14), mode="area"), classes


@cache
def control() -> Data:
    """States (4000, 4) in -1..1 and the push (4000, 1) of a saturated linear law."""
    states = 2 * torch.rand(4000, 4, generator=torch.Generator().manual_seed(2)) - 1
    return states, torch.tanh(-2 * states @ GAIN)[:, None]


def dense(sizes: list[int], kind: type[nn.Module]) -> nn.Sequential:
    """A multilayer perceptron behind a flattening."""
    parts: list[nn.Module] = [nn.Flatten()]
    for n, (before, after) in enumerate(pairwise(sizes)):
        linear = nn.Linear(before, after)
        if kind is nn.Sigmoid:  # slopes of 1/4 and values around 1/2: six layers still train
            nn.init.normal_(linear.weight, std=4 / before**0.5)
            with torch.no_grad():
                linear.bias.copy_(-linear.weight.sum(1) / 2)
        parts += [linear] if n == len(sizes) - 2 else [linear, kind()]
    return nn.Sequential(*parts)


def oval() -> nn.Sequential:
    """The OVAL base network: two strided convolutions, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def conv() -> nn.Sequential:
    """A small convolution network that normalises its input itself."""
    return nn.Sequential(
        Normalise(0.3, 0.3, 1),
        nn.Conv2d(1, 6, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


def residual() -> nn.Sequential:
    """Two residual blocks, the second with a convolution on its way past."""
    one = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    two = nn.Sequential(
        nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 3, padding=1)
    )
    return nn.Sequential(
        nn.Conv2d(1, 6, 4, stride=2, padding=1),
        nn.ReLU(),
        Residual(one, nn.Identity()),
        Residual(two, nn.Conv2d(6, 10, 1, stride=2)),
        nn.Flatten(),
        nn.Linear(160, 10),
    )


def pooled() -> nn.Sequential:
    """A convolution and a max-pool."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 10, 4, stride=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40, 10),
    )


RELU, SIGMOID, TANH = nn.ReLU, nn.Sigmoid, nn.Tanh
BOUNDED: dict[str, Recipe] = {
    "mnist 256x4": Recipe(
        build=lambda: dense([784, 256, 256, 256, 256, 10], RELU),
        data=grey,
        eps=0.03,
        training_eps=0.1,
    ),
    "oval base": Recipe(build=oval, data=colour, eps=0.025, training_eps=0.05, num_epochs=12),
    "sigmoid 6x200": Recipe(
        build=lambda: dense([784] + [200] * 6 + [10], SIGMOID),
        data=grey,
        eps=0.008,
        training_eps=0.1,
        num_epochs=12,
        rate=5e-4,
    ),
}
ACAS = "acas 1_1, property 3"
NAMES = ("mnist 256x4", "oval base", ACAS, "sigmoid 6x200")

FAMILIES: dict[str, Recipe] = {
    "fc_2x256": Recipe(
        build=lambda: dense([784, 256, 256, 10], RELU), data=grey, eps=0.03, training_eps=0.1
    ),
    "fc_6x256": Recipe(
        build=lambda: dense([784] + [256] * 6 + [10], RELU),
        data=grey,
        eps=0.03,
        training_eps=0.1,
        num_epochs=20,
    ),
    "conv": Recipe(build=conv, data=small, eps=0.03, training_eps=0.1, num_epochs=15),
    "residual": Recipe(build=residual, data=small, eps=0.03, training_eps=0.1, num_epochs=15),
    "sigmoid_3x60": Recipe(
        build=lambda: dense([196, 60, 60, 60, 10], SIGMOID),
        data=small,
        eps=0.03,
        training_eps=0.1,
        num_epochs=15,
    ),
    "tanh_3x60": Recipe(
        build=lambda: dense([196, 60, 60, 60, 10], TANH),
        data=small,
        eps=0.03,
        training_eps=0.1,
        num_epochs=15,
    ),
    "pooled": Recipe(build=pooled, data=small, eps=0.03, training_eps=0.1, num_epochs=15),
    "controller_relu": Recipe(
        build=lambda: dense([4, 64, 64, 1], RELU),
        data=control,
        eps=0.1,
        training_eps=0.0,
        num_epochs=40,
    ),
    "controller_tanh": Recipe(
        build=lambda: dense([4, 64, 64, 64, 1], TANH),
        data=control,
        eps=0.1,
        training_eps=0.0,
        num_epochs=20,
    ),
}


def trained(recipe: Recipe, name: str) -> nn.Sequential:
    """The network of a recipe; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
        module = recipe.build()
        inputs, targets = recipe.data()
        inputs, targets = inputs[:NUM_TRAINED], targets[:NUM_TRAINED]
        loss = mse_loss if targets.is_floating_point() else cross_entropy
        optimiser = torch.optim.Adam(module.parameters(), lr=recipe.rate)
        with torch.enable_grad():
            for epoch in range(recipe.num_epochs):
                step = recipe.training_eps * min(1.0, 2 * (epoch + 1) / recipe.num_epochs)
                for rows in torch.randperm(len(inputs)).split(BATCH):
                    x, y = inputs[rows], targets[rows]
                    if step:
                        x = x.clone().requires_grad_()
                        (slope,) = torch.autograd.grad(loss(module(x), y), x)
                        x = (x + step * slope.sign()).clamp(0, 1).detach()
                    optimiser.zero_grad()
                    loss(module(x), y).backward()
                    optimiser.step()
    return module.eval().requires_grad_(False)


def made(name: str) -> nn.Sequential:
    """A trained network, from the cache if it is there."""
    recipe = {**BOUNDED, **FAMILIES}[name]
    folder = os.environ.get("PATCHCLAMP_BENCH_CACHE")
    root = Path(folder) if folder else Path(tempfile.gettempdir()) / "patchclamp-bound-networks"
    text = Path(__file__).read_bytes() + torch.__version__.encode()
    path = root / hashlib.sha256(text).hexdigest()[:16] / f"{name.replace(' ', '_')}.safetensors"
    if path.exists():
        with torch.random.fork_rng(devices=[]):
            module = recipe.build().eval().requires_grad_(False)
        module.load_state_dict(load_file(path))
        return module
    module = trained(recipe, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(module.state_dict(), fresh)
    os.replace(fresh, path)
    return module


def held_out(name: str) -> Data:
    """The part of a network's data that it was not trained on."""
    inputs, targets = {**BOUNDED, **FAMILIES}[name].data()
    return inputs[NUM_TRAINED:], targets[NUM_TRAINED:]


def acas_folder() -> Path:
    """Where the ACAS Xu networks and properties are.

    Raises: FileNotFoundError if they are not there.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "acasxu"
    folder = Path(os.environ.get("PATCHCLAMP_ACASXU", beside))
    if not (folder / "onnx").is_dir():
        raise FileNotFoundError(
            f"no ACAS Xu networks in {folder}; set PATCHCLAMP_ACASXU to a folder with onnx/ and"
            " vnnlib/ as in the verification competition"
        )
    return folder


def acas(network: str = "1_1", prop: str = "3") -> Problem:
    """A real ACAS Xu network with the box of one of the properties that have a single box."""
    folder = acas_folder()
    packed = (folder / "onnx" / f"ACASXU_run2a_{network}_batch_2000.onnx.gz").read_bytes()
    graph = onnx.load_from_string(gzip.decompress(packed)).graph
    held = {i.name: torch.from_numpy(np.array(numpy_helper.to_array(i))) for i in graph.initializer}
    parts: list[nn.Module] = [nn.Flatten()]
    for node in graph.node:
        values = [held[n] for n in node.input if n in held]
        if node.op_type == "MatMul":
            linear = nn.Linear(*values[0].shape)
            linear.weight.data = values[0].T.contiguous()
            parts.append(linear)
        elif node.op_type == "Add":
            linear.bias.data = values[0].flatten()
        elif node.op_type == "Relu":
            parts.append(nn.ReLU())
        elif node.op_type not in ("Flatten", "Sub") or any(v.any() for v in values):
            raise ValueError(f"ACAS Xu {network} has {node.op_type}, which is not expected")
    text = gzip.decompress((folder / "vnnlib" / f"prop_{prop}.vnnlib.gz").read_bytes()).decode()
    bounds = {
        sign: {int(n): float(v) for n, v in re.findall(rf"\({sign}= X_(\d) ([-\d.e]+)\)", text)}
        for sign in "<>"
    }
    low, high = (torch.tensor([bounds[s][n] for n in range(5)]).view(1, 1, 1, 5) for s in "><")
    return Problem(
        name=ACAS if (network, prop) == ("1_1", "3") else f"acas {network}, property {prop}",
        module=nn.Sequential(*parts).eval().requires_grad_(False),
        example=(low + high) / 2,
        low=low,
        high=high,
    )


def problem(name: str) -> Problem:
    """One of `NAMES` or of `FAMILIES`: network and box."""
    if name == ACAS:
        return acas()
    module, recipe = made(name), {**BOUNDED, **FAMILIES}[name]
    inputs, targets = held_out(name)
    right = (
        module(inputs).argmax(1) == targets
        if not targets.is_floating_point()
        else torch.ones(len(inputs), dtype=torch.bool)
    )
    first = int(right.nonzero()[0])
    example = inputs[first : first + 1]
    low, high = example - recipe.eps, example + recipe.eps
    if not targets.is_floating_point():
        low, high = low.clamp(0, 1), high.clamp(0, 1)
    return Problem(name=name, module=module, example=example, low=low, high=high)

"""What attribution costs on EfficientNet-Lite0, in plain forward and backward passes, and memory.

    python benchmarks/attribution_cost.py [--rounds 5] [--check]

Every method explains one image; its CPU time is divided by that of a plain forward and backward
pass (to the input) of the same image in the same round. Peak memory is what the process held at
most while a method ran, above what it held after the model was opened and had run once; each
method is measured in a process of its own. The bar is for what is in use at once: glibc is told
to give back what is freed (MALLOC_MMAP_THRESHOLD_). With its defaults it keeps more, for a plain
pass too; that figure stands beside it. Captum runs beside it where it can be imported, with
its own defaults but for the number of samples.

PATCHCLAMP_IMAGENET20 is a folder of `imagenet_NN_LABEL.jpg`, as the foolbox wheel ships them in
`foolbox/data`. Without it, completeness is measured on three images of noise, and the figures
say so. Writes results/attribution_cost.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from paired import Job, measure, ratio, write
from PIL import Image

import patchclamp
from patchclamp.methods.attribution.base import completeness_error
from patchclamp.methods.attribution.cam.grad_cam import GradCAM
from patchclamp.methods.attribution.faithfulness.curves import removed
from patchclamp.methods.attribution.faithfulness.removal import Mean
from patchclamp.methods.attribution.gradients.integrated import IntegratedGradients
from patchclamp.methods.attribution.gradients.smooth import SmoothGrad
from patchclamp.methods.attribution.perturbation.occlusion import Occlusion
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.scoring import Scorer
from patchclamp.model.preprocessing import prepared
from patchclamp.net import Net

VARIABLE = "PATCHCLAMP_IMAGENET20"
MODEL = "efficientnet-lite0"
PLAIN = "forward and backward"
BLACK = -127 / 128
"""A black pixel, as this network takes it."""

PLAINS = 5  # plain passes timed together, since one is short
MIB = 1 << 20
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
ENOUGH = 0.9  # share of the images whose error is at most 5%


@dataclass(frozen=True)
class Scene:
    """One image, what it is explained for, and the network."""

    net: Net
    x: torch.Tensor
    label: int


@dataclass(frozen=True)
class Cost:
    """A method measured.

    Attributes:
        run: explains one image once.
        bar: the largest allowed time in forward and backward passes; None for a peer.
        memory_bar: the most MiB above the model.
        needs: package without which it is skipped.
    """

    name: str
    run: Callable[[Scene], object]
    bar: float | None = None
    memory_bar: float | None = None
    needs: str | None = None


def plain(scene: Scene) -> None:
    """Forward and backward passes of the image."""
    for _ in range(PLAINS):
        x = scene.x.clone().requires_grad_()
        torch.autograd.grad(scene.net.module(x)[0, scene.label], x)


def ours_integrated(scene: Scene) -> object:
    """Exactly 50 gradients: the tolerance is out of reach."""
    method = IntegratedGradients(baseline=BLACK, max_gradients=50, tolerance=1e-12, strict=False)
    return method.run(scene.net, scene.x, scene.label)


def ours_smooth(scene: Scene) -> object:
    return SmoothGrad(num_samples=25).run(scene.net, scene.x, scene.label)


def ours_occlusion(scene: Scene) -> object:
    method = Occlusion(window=32, stride=16, baseline=BLACK)
    return method.run(scene.net, scene.x, scene.label)


def ours_grad_cam(scene: Scene) -> object:
    return GradCAM().run(scene.net, scene.x, scene.label)


def ours_flipping(scene: Scene) -> object:
    """One map with one replacement: the whole measure asks for two, and a control beside."""
    scorer = Scorer.of(scene.net, scene.x, scene.label)
    order = torch.rand(1, *scene.x.shape[2:], generator=torch.Generator().manual_seed(0))
    rank = order.flatten(1).argsort(1).argsort(1).reshape(order.shape)
    points = torch.linspace(0, rank[0].numel(), 57).round().long()
    return removed(scorer, rank, points, Mean())


def ours_pgd(scene: Scene) -> object:
    network = Classifier.open(scene.net, scene.x)
    label = torch.tensor([scene.label])
    return PGD(num_steps=10).run(network, network.value, label, 1e-6)  # too little to stop early


def captum_integrated(scene: Scene, steps: int = 50, together: int | None = None) -> torch.Tensor:
    from captum.attr import IntegratedGradients as Peer

    made: torch.Tensor = Peer(scene.net.module).attribute(
        scene.x, baselines=BLACK, target=scene.label, n_steps=steps, internal_batch_size=together
    )
    return made


def captum_smooth(scene: Scene) -> object:
    from captum.attr import NoiseTunnel, Saliency

    tunnel = NoiseTunnel(Saliency(scene.net.module))
    return tunnel.attribute(scene.x, nt_samples=25, target=scene.label, abs=False)


def captum_occlusion(scene: Scene) -> object:
    from captum.attr import Occlusion as Peer

    return Peer(scene.net.module).attribute(
        scene.x,
        sliding_window_shapes=(3, 32, 32),
        strides=(3, 16, 16),
        baselines=BLACK,
        target=scene.label,
    )


COSTS = [
    Cost("integrated gradients, 50", ours_integrated, 55, 100),
    Cost("SmoothGrad, 25", ours_smooth, 26),
    Cost("occlusion, 32/16", ours_occlusion, 75),
    Cost("Grad-CAM", ours_grad_cam, 0.6),
    Cost("pixel flipping, 56 steps", ours_flipping, 30),
    Cost("PGD, 10", ours_pgd, 10),
    Cost("captum: integrated gradients, 50", captum_integrated, needs="captum"),
    Cost("captum: SmoothGrad, 25", captum_smooth, needs="captum"),
    Cost("captum: occlusion, 32/16", captum_occlusion, needs="captum"),
]
"""What is measured. Add a row for another method; a bar of its own makes it count."""


def images(net: Net) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images as the network takes them, their labels, and what they are."""
    folder = os.environ.get(VARIABLE)
    how = net.loaded.preprocessing
    if folder is None or how is None:
        x = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            return x, net.module(x).argmax(1), f"noise, because {VARIABLE} is not set"
    paths = sorted(Path(folder).glob("imagenet_*.jpg"))
    if not paths:
        sys.exit(f"{VARIABLE}={folder} holds no imagenet_*.jpg")
    made = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        side, whole = min(image.size), round(how.height / how.crop)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((whole, whole), Image.Resampling.BICUBIC, box=box)
        square = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        made.append(prepared(square, how))
    labels = [int(path.stem.split("_")[-1]) for path in paths]
    return torch.cat(made), torch.tensor(labels), "labelled ImageNet images"


@dataclass(frozen=True)
class Completeness:
    """Errors of integrated gradients.

    Attributes:
        images: what they are.
        right: how many the network classifies right.
        met: how many have an error of at most 5%.
        rows: of each image.
    """

    images: str
    right: int
    met: int
    rows: list[dict[str, float]]


def completeness(net: Net) -> Completeness:
    """Errors of integrated gradients on every image, beside captum's on as many gradients."""
    x, labels, what = images(net)
    rows, right = [], 0
    for i, label in enumerate(labels.tolist()):
        one = x[i : i + 1]
        with torch.no_grad():
            right += int(net.module(one).argmax()) == label
        found = IntegratedGradients(baseline=BLACK, strict=False).run(net, one, label)
        row = {
            "error": float(found.error),
            "unresolved": float(found.unresolved),
            "gradients": float(found.num_gradients),
        }
        if find_spec("captum") is not None:
            peer = captum_integrated(Scene(net, one, label), int(found.num_gradients), together=8)
            before = found.baseline_scores
            row["captum_error"] = float(completeness_error(peer, found.scores, before))
        rows.append(row)
        print(f"  {i:3d}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    met = sum(row["error"] <= 0.05 for row in rows)
    print(f"completeness error <= 5% on {met} of {len(rows)} ({what}; {right} classified right)")
    return Completeness(what, right, met, rows)


def peak(cost: Cost, scene: Scene) -> float | None:
    """MiB above the model while a method runs, in this process; None where it cannot be read."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None
    plain(scene)  # code that is loaded at the first pass is not what a method takes
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)  # memory kept from opening the model would hide what is used

    def held(name: str) -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    before = held("VmRSS")
    clear.write_text("5", encoding="utf-8")  # the highest mark starts again
    cost.run(scene)
    return (held("VmHWM") - before) / MIB


def scene_of(net: Net) -> Scene:
    x, labels, _ = images(net)
    return Scene(net, x[:1], int(labels[0]))


def peaks(costs: list[Cost], settings: dict[str, str]) -> dict[str, float | None]:
    """Each method in a process of its own, with these variables in its environment."""
    found: dict[str, float | None] = {}
    for cost in [Cost(PLAIN, plain), *costs]:
        command = [sys.executable, __file__, "--peak", cost.name]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **settings}
        )
        found[cost.name] = json.loads(done.stdout.splitlines()[-1])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", metavar="NAME", help="print the peak memory of one method")
    return parser.parse_args()


def judged(
    costs: list[Cost],
    taken: dict[str, list[float]],
    memory: dict[str, float | None],
    kept: dict[str, float | None],
) -> list[str]:
    """Print the figures; what missed its bar."""
    missed = []
    print(f"{PLAIN}: {statistics.median(taken[PLAIN]):.4f} s CPU, {_mib(memory[PLAIN])}")
    for cost in costs:
        times, held = ratio(taken, cost.name, PLAIN)["median"], memory[cost.name]
        bar = "" if cost.bar is None else f" (bar {cost.bar:g})"
        line = f"  {cost.name:<36}{times:7.1f} passes{bar}, {_mib(held)}"
        print(f"{line} ({_mib(kept[cost.name])} with the allocator's defaults)")
        if cost.bar is not None and times > cost.bar:
            missed.append(cost.name)
        if cost.memory_bar is not None and held is not None and held > cost.memory_bar:
            missed.append(f"{cost.name}, memory")
    return missed


def _mib(held: float | None) -> str:
    return "memory not measured" if held is None else f"{held:.0f} MiB"


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    net = patchclamp.open(MODEL)
    scene = scene_of(net)
    if options.peak:
        chosen = next(c for c in [Cost(PLAIN, plain), *COSTS] if c.name == options.peak)
        print(json.dumps(peak(chosen, scene)))
        return
    skipped = [c.name for c in COSTS if c.needs is not None and find_spec(c.needs) is None]
    costs = [c for c in COSTS if c.name not in skipped]
    for name in skipped:
        print(f"skipped: {name} (the package is not installed)")
    jobs: dict[str, Job] = {PLAIN: lambda: plain(scene)}
    jobs |= {c.name: partial(c.run, scene) for c in costs}
    taken = measure(jobs, options.rounds)
    taken[PLAIN] = [t / PLAINS for t in taken[PLAIN]]
    memory, kept = peaks(costs, GIVE_BACK), peaks(costs, {})
    missed = judged(costs, taken, memory, kept)
    complete = completeness(net)
    if complete.met < ENOUGH * len(complete.rows):
        missed.append("completeness")
    figures = {
        "model": MODEL,
        "plain_cpu_seconds": statistics.median(taken[PLAIN]),
        "passes": {c.name: ratio(taken, c.name, PLAIN) for c in costs},
        "bars": {c.name: c.bar for c in costs if c.bar is not None},
        "mib_above_the_model": memory,
        "mib_with_the_allocators_defaults": kept,
        "memory_bars": {c.name: c.memory_bar for c in costs if c.memory_bar is not None},
        "completeness": asdict(complete),
        "skipped": skipped,
        "missed": missed,
        "rounds": options.rounds,
    }
    write("attribution_cost", figures)
    if options.check and missed:
        sys.exit(f"bar missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

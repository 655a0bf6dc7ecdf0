"""Fooling images, level sets, transfer from features and attributes of objects, against their bars.

    python benchmarks/robustness.py [--part fooling|level-sets|transfer|attributes]

Everything runs on networks that are bundled or trained here in seconds; level sets and fooling
images on EfficientNet-Lite0 too, where it is installed. PATCHCLAMP_IMAGENET20 is a folder of
`imagenet_NN_LABEL.jpg`, as the foolbox wheel ships them in `foolbox/data`; without it that part
is left out and the figures say so. Times are CPU-seconds on one thread. Parts that were run are
written to results/robustness.json, the others stay there as they are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from paired import RESULTS, write
from PIL import Image
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import SourceError
from patchclamp.data import load_data
from patchclamp.methods.robustness.attacks.balls import Ball, Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attributes import AttributeBench, standard_edits
from patchclamp.methods.robustness.confidence import log_odds
from patchclamp.methods.robustness.feature_transfer import FeatureAttack, TransferBench
from patchclamp.methods.robustness.fooling import (
    Encoding,
    FoolByEvolution,
    FoolByGradient,
    Fooled,
)
from patchclamp.methods.robustness.level_sets import LevelSetTraversal, Traversed, triangle
from patchclamp.methods.robustness.recognition import RecognitionCheck
from patchclamp.methods.scoring import Passes
from patchclamp.model.preprocessing import prepared
from patchclamp.specimens import build
from patchclamp.truth.attributes import planted_scenes, trained
from patchclamp.truth.attribution.fitting import Recipe, fitted

VARIABLE = "PATCHCLAMP_IMAGENET20"
IMAGENET = "efficientnet-lite0"
FILE = "robustness"
LIMITS = (0.0, 1.0)
NUM_PAIRS = 60
NUM_STARTS = 4

Figures = dict[str, object]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    data = load_data("digits", split=split)
    if data.labels is None:
        sys.exit("the digits have no labels")
    return data.inputs, data.labels


def opened(module: str | nn.Module, x: Tensor, within: tuple[float, float] = LIMITS) -> Classifier:
    """A network on some rows."""
    net = patchclamp.open(module) if isinstance(module, str) else patchclamp.open(module, x[:2])
    return Classifier.open(net, x, within=within)


def imagenet() -> tuple[Tensor, Tensor, tuple[float, float]] | str:
    """Images as EfficientNet-Lite0 takes them, their labels, its limits; or why there are none."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return f"{VARIABLE} is not set"
    try:
        how = patchclamp.open(IMAGENET).loaded.preprocessing
    except SourceError as error:
        return str(error)
    paths = sorted(Path(folder).glob("imagenet_*.jpg"))
    if how is None or not paths:
        return f"{VARIABLE} holds no imagenet_*.jpg"
    made = []
    for path in paths:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        side = min(image.shape[1:])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[None, :, top : top + side, left : left + side].float() / 255
        made.append(prepared(square, how))
    labels = torch.tensor([int(path.stem.split("_")[-1]) for path in paths])
    return torch.cat(made), labels, (-127 / 128, 1.0)


# ---- fooling images ---------------------------------------------------------


def fooling() -> Figures:
    """Every class of two networks of digits, and five of ImageNet's."""
    x, labels = digits("train")
    real, real_labels = digits("test")
    names = ("digits-cnn", "digits-mlp")
    networks = {name: opened(name, x) for name in names}
    figures: Figures = {}
    for name, other in (names, names[::-1]):
        network, classes = networks[name], torch.arange(10)
        logits = network.answers(real, torch.zeros(len(real), dtype=torch.long))
        own = logits.double().softmax(1).gather(1, real_labels[:, None])
        found = {
            "gradient": _gradient(network, classes, penalty=0.0),
            "gradient, penalised": _gradient(network, classes, penalty=100.0),
            "direct": _evolution(network, classes, Encoding.DIRECT),
            "indirect": _evolution(network, classes, Encoding.INDIRECT),
        }
        rows: Figures = {"surest real image": float(own.max())}
        for how, fooled in found.items():
            seen = RecognitionCheck().run(
                networks[other],
                fooled.points,
                classes,
                examples=x,
                labels=labels,
                real=real,
                real_labels=real_labels,
            )
            line = _confidences(fooled)
            line |= {
                "unrecognisable": seen.unrecognisable,
                "fooled and unrecognisable": int(
                    (fooled.is_fooled & ~seen.images.is_recognised).sum()
                ),
                "alike": int(seen.images.is_alike.sum()),
                "second network agrees": int(seen.images.is_agreed.sum()),
                "controls": [seen.real.recognised, seen.wrong.recognised, seen.noise.recognised],
                "no verdict because": seen.reason,
            }
            rows[how] = line
            print(f"  {name}, {how}: {json.dumps(line)}", flush=True)
        figures[name] = rows
    figures[IMAGENET] = _imagenet_fooling()
    return figures


def _surest(tries: list[Fooled]) -> Fooled:
    """For each class the surest image of several searches; passes of all of them."""
    confidences = torch.stack([found.confidences for found in tries])
    best, at = confidences.argmax(0), torch.arange(confidences.shape[1])
    return dataclasses.replace(
        tries[0],
        points=torch.stack([found.points for found in tries])[best, at],
        confidences=confidences[best, at],
        passes=Passes(
            sum(found.passes.forwards for found in tries),
            sum(found.passes.backwards for found in tries),
        ),
    )


def _gradient(network: Classifier, classes: Tensor, *, penalty: float) -> Fooled:
    """Climbs from noise."""
    tries = []
    for seed in range(NUM_STARTS):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand((len(classes), *network.points.shape[1:]), generator=generator)
        method = FoolByGradient(penalty=penalty)
        tries.append(method.run(network, classes, starts=noise))
    return _surest(tries)


def _evolution(network: Classifier, classes: Tensor, encoding: Encoding) -> Fooled:
    """Two runs."""
    methods = (FoolByEvolution(encoding=encoding, num_rounds=3000, seed=seed) for seed in (0, 1))
    return _surest([method.run(network, classes) for method in methods])


def _confidences(fooled: Fooled) -> Figures:
    own = fooled.confidences
    return {
        "median": float(own.median()),
        "lowest": float(own.min()),
        "reached": int(fooled.is_fooled.sum()),
        "classes": len(own),
        "forwards": fooled.passes.forwards,
        "backwards": fooled.passes.backwards,
    }


def _imagenet_fooling() -> Figures:
    given = imagenet()
    if isinstance(given, str):
        return {"left out": given}
    x, _, within = given
    network = opened(IMAGENET, x[:2], within)
    classes = torch.tensor([1, 207, 291, 504, 954])
    generator = torch.Generator().manual_seed(0)
    noise = (0.25 * torch.randn((5, *x.shape[1:]), generator=generator)).clamp(*within)
    began = time.process_time()
    found = FoolByGradient(num_steps=60, step=0.02).run(network, classes, starts=noise)
    line = _confidences(found) | {"cpu_seconds": time.process_time() - began}
    flat = torch.cat([found.points, noise, x]).double().flatten(1)
    alike = torch.corrcoef(flat)[:5]
    line["likeness to its start"] = float(alike[:, 5:10].diagonal().mean())
    line["largest likeness to any of the images"] = float(alike[:, 10:].max())
    print(f"  {IMAGENET}, gradient: {json.dumps(line)}", flush=True)
    return line


# ---- level sets -------------------------------------------------------------


def level_sets() -> Figures:
    """Random pairs of digits that differ in class; neighbours of ImageNet's."""
    x, labels = digits("test")
    figures: Figures = {}
    for name in ("digits-cnn", "digits-mlp"):
        network = opened(name, x)
        likely, answers = network.answers(x, torch.arange(len(x))).softmax(1).max(1)
        sure = ((likely > 0.9) & (answers == labels)).nonzero().flatten()
        generator = torch.Generator().manual_seed(0)
        drawn = sure[torch.randint(len(sure), (2, 2 * NUM_PAIRS), generator=generator)]
        first, second = drawn[:, labels[drawn[0]] != labels[drawn[1]]][:, :NUM_PAIRS]
        sources, targets = opened(name, x[first]), x[second]
        figures[name] = _walked(name, sources, targets) | _nearest(sources, targets)
        print(f"  {name}: {figures[name]}", flush=True)
    given = imagenet()
    if isinstance(given, str):
        return figures | {IMAGENET: {"left out": given}}
    x, labels, within = given
    network = opened(IMAGENET, x, within)
    logits = network.answers(x, torch.arange(len(x)))
    sure = ((logits.argmax(1) == labels) & (logits.softmax(1).amax(1) > 0.4)).nonzero().flatten()
    second = sure.roll(-1)
    apart = labels[sure] != labels[second]
    sources = opened(IMAGENET, x[sure[apart]], within)
    return figures | {IMAGENET: _walked(IMAGENET, sources, x[second[apart]])}


def _nearest(sources: Classifier, targets: Tensor) -> Figures:
    """What any walk could reach: attacks from the targets, at ever larger radii, to where the
    network is as sure of the source's class as a walk must stay."""
    rows, num = torch.arange(len(targets)), math.sqrt(targets[0].numel())
    answers = sources.answers(sources.points, rows)
    classes = answers.argmax(1)
    kept = torch.sigmoid(log_odds(answers, classes)) - LevelSetTraversal().drop
    best = torch.full((len(targets),), torch.inf, dtype=torch.float64)
    for rmse in torch.arange(0.03, 0.26, 0.005).tolist():
        ball = Ball.of(Norm.L2, targets, rmse * num, sources.within)
        for seed in range(NUM_STARTS):
            x = ball.drawn(torch.Generator().manual_seed(seed))
            for number in range(60):
                slopes = sources.slopes(x, rows, Loss.MARGIN, classes, classes).slopes
                size = torch.full((len(x),), 0.3 * (1 - number / 60), dtype=torch.float64)
                x = ball.step(x, slopes, size)
            sure = torch.sigmoid(log_odds(sources.answers(x, rows), classes)) >= kept
            best[sure] = best[sure].clamp(max=rmse)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return {
        "attack from the target: rmse quartiles": best.quantile(quartiles).tolist(),
        "attack from the target: reached": int((best <= LevelSetTraversal().near).sum()),
    }


def _walked(name: str, sources: Classifier, targets: Tensor) -> Figures:
    began = time.process_time()
    found: Traversed = LevelSetTraversal().run(sources, sources.points, targets)
    seconds = time.process_time() - began
    # two places found from one source: the same source once more, to its neighbour's target
    again = LevelSetTraversal().run(sources, sources.points[:1], targets[1:2])
    inside = triangle(sources, sources.points[0], found.points[0], again.points[0])
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    line: Figures = {
        "pairs": len(targets),
        "reached": int(found.is_reached.sum()),
        "rmse quartiles": found.rmse.quantile(quartiles).tolist(),
        "rmse, least and most": [float(found.rmse.min()), float(found.rmse.max())],
        "rmse of source and target, median": float(found.start_rmse.median()),
        "largest fall along the line": float(found.falls.max()),
        "steps, median": float(found.num_steps.double().median()),
        "steps, most": int(found.num_steps.max()),
        "triangle: share within the drop": inside.share,
        "triangle: fall": inside.fall,
        "cpu_seconds": seconds,
    }
    print(f"  {name}: {json.dumps(line)}", flush=True)
    return line


# ---- transfer ---------------------------------------------------------------


def transfer() -> Figures:
    """A small ViT pretrained on 0 to 4, fine-tuned whole on 5 to 9."""
    x, labels = digits("train")
    pairs = zip(digits("test"), digits("validation"), strict=True)
    test, test_labels = (torch.cat(pair) for pair in pairs)
    low, high = labels < 5, test_labels >= 5

    def vit(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        return build("vit", num_classes=num_classes)

    pretrained = fitted(vit, x[low], labels[low], 5, Recipe(epochs=30, rows=64), seed=0)

    def tuned(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        module = copy.deepcopy(pretrained).requires_grad_(True)
        module.head = nn.Linear(32, num_classes)
        return module

    short = Recipe(epochs=10, rate=1e-3, rows=64)
    downstream = fitted(tuned, x[~low], labels[~low] - 5, 5, short, seed=1)
    long = Recipe(epochs=30, rows=64)
    stranger = fitted(vit, x[~low], labels[~low] - 5, 5, long, seed=7)
    points, aims = test[high], test_labels[high] - 5
    figures: Figures = {"rows": len(points)}
    networks = [opened(module, points) for module in (pretrained, downstream, stranger)]
    for radius in (0.05, 0.1, 0.15):
        for token in (None, 0):
            sites = ("blocks.0", "blocks.1")
            bench = TransferBench(attack=FeatureAttack(sites=sites, token=token))
            found = bench.run(networks[0], networks[1], points, aims, radius, stranger=networks[2])
            line: Figures = {
                f"{row.maker} on {row.network}": round(row.success, 3) for row in found.table
            }
            controls = {
                "noise": found.over_noise,
                "logits": found.over_logits,
                "stranger": found.over_stranger,
            }
            for control, over in controls.items():
                if over is not None:
                    line[f"over {control}"] = [over[0], over[1].low, over[1].high]
            line |= {"layers": list(found.features.sites), "is_shown": found.is_shown}
            key = f"radius {radius:g}, {'all tokens' if token is None else 'class token'}"
            figures[key] = line
            print(f"  {key}: {json.dumps(line)}", flush=True)
    return figures


# ---- attributes -------------------------------------------------------------


def attributes() -> Figures:
    """Two networks, one trained where backgrounds tell the class and one where they do not."""
    figures: Figures = {}
    for shortcut in (True, False):
        scenes, labels = planted_scenes(200, shortcut=shortcut, seed=9)
        network = opened(trained(shortcut=shortcut, seed=0), scenes.images)
        table = AttributeBench(edits=standard_edits()).run(network, scenes, labels)
        rows: Figures = {"plain": table.plain.share}
        for drop in table.drops:
            rows[drop.name] = {
                "null": drop.null.share,
                "edited": drop.edited.share,
                "drop": drop.drop,
                "interval": [drop.interval.low, drop.interval.high],
                "found": drop.is_found,
            }
        name = "with a shortcut" if shortcut else "without"
        figures[name] = rows
        print(f"  {name}: {json.dumps(rows)}", flush=True)
    return figures


PARTS = {
    "fooling": fooling,
    "level-sets": level_sets,
    "transfer": transfer,
    "attributes": attributes,
}


def main() -> None:
    """Run the parts and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    torch.set_num_threads(1)
    given = parser.parse_args()
    path = RESULTS / f"{FILE}.json"
    figures = json.loads(path.read_text())["parts"] if path.exists() else {}
    for name in given.part or PARTS:
        print(name, flush=True)
        figures[name] = PARTS[name]()
    write(FILE, {"parts": figures})


if __name__ == "__main__":
    main()

"""Exact sweeps beside TransformerLens's and nnsight's own: residual stream and heads of one GPT-2.

The peers go into an environment of their own, because they pin what they need:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1 xarray beartype
    OMP_NUM_THREADS=1 PYTHONPATH=src:benchmarks peers/bin/python benchmarks/sweep_peers.py

The network is shaped like GPT-2 small (12 layers, 12 heads, width 768, 50257 classes), with
random weights, built here; no hub. TransformerLens makes attention eager, as it must for its
hooks; the others run the fused attention that transformers takes by itself. Cells are the
same for all: every layer and position of the residual stream, every head's z at all positions,
clean values in the corrupt run, logit difference at the last position. TransformerLens is
driven through its patching module, nnsight through one trace per cell, as each documents.
Ours runs without skipping and with it (cells that change nothing, which the peers run as
well). Times are CPU-seconds on one thread; ours after one unmeasured sweep. A peer that cannot
be imported is listed under "missing" with the reason. Writes results/sweep_peers.json.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import transformers
import xarray
from paired import RESULTS, _processor
from torch import Tensor

import patchclamp

NUM_TOKENS, CHANGED, HEAD = 15, 10, 64
RIGHT, WRONG = 11, 222
ROUNDS = 3
KINDS = ("residual stream", "heads")


@dataclass(frozen=True)
class Difference:
    """Logit of one class minus that of another, at the last position."""

    name: str = "logit difference"
    position: int | None = -1

    @property
    def reads(self) -> Tensor:
        """The classes that it reads."""
        return torch.tensor([RIGHT, WRONG])

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output[:, RIGHT] - output[:, WRONG]


def built() -> torch.nn.Module:
    """The network."""
    torch.manual_seed(0)
    config = transformers.GPT2Config()
    config.architectures = ["GPT2LMHeadModel"]
    return transformers.GPT2LMHeadModel(config).eval()


def timed(job: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """Median CPU-seconds, and what the job gave."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        made = job()
        taken.append(time.process_time() - began)
    return statistics.median(taken), made


Sweeps = dict[str, Callable[[], Tensor]]


def ours(model: torch.nn.Module, clean: Tensor, corrupt: Tensor, *, skip: bool) -> Sweeps:
    """Both sweeps of this package."""
    net = patchclamp.open(model, clean)

    def swept(over: str) -> Tensor:
        made: xarray.DataArray = net.sweep(clean, corrupt, Difference(), over=over, skip=skip)
        return torch.from_numpy(made.values)

    return {
        kind: lambda over=over: swept(over)
        for kind, over in zip(KINDS, ("resid_pre", "heads"), strict=True)
    }


def lens(model: torch.nn.Module, clean: Tensor, corrupt: Tensor) -> Sweeps:
    """TransformerLens's patching module."""
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

    def swept(patch: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
            return patch(bridge, corrupt, cache, metric)

    with torch.no_grad():
        bridge(corrupt)
    return {
        KINDS[0]: lambda: swept(patching.get_act_patch_resid_pre),
        KINDS[1]: lambda: swept(patching.get_act_patch_attn_head_out_all_pos),
    }


def traced(model: torch.nn.Module, clean: Tensor, corrupt: Tensor) -> Sweeps:
    """nnsight, one trace per cell."""
    from nnsight import NNsight, save

    net = NNsight(model)
    layers, heads = model.config.n_layer, model.config.n_head

    def residual() -> Tensor:
        found = torch.zeros(layers, NUM_TOKENS)
        with torch.no_grad():
            with net.trace(clean):
                held = save([net.transformer.h[n].input for n in range(layers)])
            for n in range(layers):
                for at in range(NUM_TOKENS):
                    with net.trace(corrupt):
                        value = net.transformer.h[n].input.clone()
                        value[:, at] = held[n][:, at]
                        net.transformer.h[n].input = value
                        out = net.lm_head.output[0, -1].save()
                    found[n, at] = out[RIGHT] - out[WRONG]
        return found

    def every_head() -> Tensor:
        found = torch.zeros(layers, heads)
        with torch.no_grad():
            with net.trace(clean):
                held = save([net.transformer.h[n].attn.c_proj.input for n in range(layers)])
            for n in range(layers):
                for head in range(heads):
                    part = slice(head * HEAD, (head + 1) * HEAD)
                    with net.trace(corrupt):
                        value = net.transformer.h[n].attn.c_proj.input.clone()
                        value[..., part] = held[n][..., part]
                        net.transformer.h[n].attn.c_proj.input = value
                        out = net.lm_head.output[0, -1].save()
                    found[n, head] = out[RIGHT] - out[WRONG]
        return found

    return dict(zip(KINDS, (residual, every_head), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = built()
    clean = torch.randint(300, 50000, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[0, CHANGED] = 17
    contenders: dict[str, Sweeps] = {
        "patchclamp": ours(copy.deepcopy(model), clean, corrupt, skip=False),
        "patchclamp, skipping": ours(copy.deepcopy(model), clean, corrupt, skip=True),
    }
    missing: dict[str, str] = {}
    for name, make in (("transformer-lens", lens), ("nnsight", traced)):
        try:
            contenders[name] = make(copy.deepcopy(model), clean, corrupt)
        except ImportError as e:
            missing[name] = str(e)
            print(f"{name} is left out: {e}")
    taken: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    errors: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        found = {}
        for name, sweeps in contenders.items():
            if name.startswith("patchclamp"):
                sweeps[kind]()  # finds its rules and plans
            rounds = ROUNDS if name.startswith("patchclamp") else 1
            taken[kind][name], found[name] = timed(sweeps[kind], rounds)
        for name, value in found.items():
            errors[kind][name] = float((value - found["patchclamp"]).abs().max())
            over = taken[kind][name] / taken[kind]["patchclamp"]
            print(
                f"{kind:<16}{name:<24}{taken[kind][name]:8.2f} s{over:7.2f} x ours"
                f"   largest difference {errors[kind][name]:.1e}"
            )
    data = {
        "model": "GPT-2 small's shape, random weights",
        "tokens": NUM_TOKENS,
        "changed_token": CHANGED,
        "cells": {KINDS[0]: 12 * NUM_TOKENS, KINDS[1]: 144},
        "cpu_seconds": taken,
        "ratio_to_ours": {
            kind: {name: t / taken[kind]["patchclamp"] for name, t in taken[kind].items()}
            for kind in KINDS
        },
        "largest_difference_to_ours": errors,
        "missing": missing,
        "rounds": {"patchclamp": ROUNDS, "peers": 1},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {
            n: version(n)
            for n in ("torch", "transformers", "transformer-lens", "nnsight")
            if n not in missing
        },
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "sweep_peers.json"
    fresh = path.with_suffix(".json.tmp")
    fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


if __name__ == "__main__":
    main()

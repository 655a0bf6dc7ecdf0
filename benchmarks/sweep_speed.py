"""What exact sweeps cost: every residual cell, head and MLP of a language model, one prompt pair.

    python benchmarks/sweep_speed.py [--check] [--rounds 3]

Compared are CPU-seconds on one thread of the whole call `net.sweep` (both baseline runs and all
planning included) with a loop of one full forward pass per cell (`net.run` with one
patch), and, for the residual stream, with the same loop in batches. The loops are timed on a
sample of their cells, spread over layers and positions, and multiplied; with skipping
they are granted the cells that differ for nothing. Bars: residual stream without skipping at
least 14 times the loop and 3 times the batched loop; with skipping at least 30 times the
loop that skips too; heads 14 times, MLPs 10 times; error under 1e-4. Beside the times
stands what the machine can do: the speed of a matrix product of the sweep's shape.

What the arithmetic allows (SmolLM2: 30 layers of 3.54 million weights, 15 tokens of which the
eleventh differs): what cannot be left out of the 450 residual cells is 374 GFLOP of products,
4.0 s at the 94 GFLOP/s that the largest products reach where this was written; a loop that
takes 56 to 63 s there can gain 14 to 16 times at most. The 146 cells that differ are 45 GFLOP
and the MLPs 15, and both need the clean and the corrupt run first, 0.1 s because all weights
are read for 20 rows. At the same speed that is 0.58 s for the sweep that skips, 31 times less
than its loop, and 0.26 s for the MLPs; but products of 5 to 300 rows reach 20 to 80 GFLOP/s.
Writes results/sweep_speed.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
import xarray
from paired import RESULTS, _processor, options

import patchclamp
from patchclamp import edits
from patchclamp.core.edits import Edit
from patchclamp.net import Net

CLEAN = "When Mary and John went to the big store, John gave a drink to"
CORRUPT = "When Mary and John went to the big store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
NUM_SAMPLED = 24
BARS = {
    "residual, no skipping, over one pass per cell": 14.0,
    "residual, no skipping, over batches": 3.0,
    "residual, skipping, over one pass per cell that differs": 30.0,
    "heads, over one pass per cell": 14.0,
    "MLPs, over one pass per cell": 10.0,
}
ERROR = 1e-4


@dataclass(frozen=True)
class Difference:
    """Logit of the right name minus that of the other, at the last position."""

    right: int
    wrong: int
    name: str = "logit difference"
    position: int | None = -1

    @property
    def reads(self) -> torch.Tensor:
        """The classes that it reads, so that no other is computed in a sweep."""
        return torch.tensor([self.right, self.wrong])

    def __call__(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return output[:, self.right] - output[:, self.wrong]


def seconds(job: Callable[[], object], rounds: int) -> tuple[float, object]:
    """Median CPU-seconds, and what the job gave."""
    made = job()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        made = job()
        taken.append(time.process_time() - began)
    return statistics.median(taken), made


class Loop:
    """The naive sweep: one forward pass for each cell."""

    def __init__(self, net: Net, metric: Difference, labels: Sequence[str]) -> None:
        self.net, self.metric = net, metric
        self.acts = net.record([CLEAN], labels)

    def value(self, label: str, **where: int) -> float:
        edit: Edit = edits.patch(label, self.acts.tensor(label), **where)
        output = self.net.run([CORRUPT], edits=edit).output
        return float(self.metric(output[:, -1], torch.zeros(1, dtype=torch.long)))

    def sampled(self, swept: xarray.DataArray, name: str) -> tuple[float, float]:
        """CPU-seconds of one cell (median), and the largest difference to the sweep."""
        grid = [dict(zip(swept.dims, at, strict=True)) for at in _places(swept)]
        step = max(1, len(grid) // NUM_SAMPLED)
        taken, worst = [], 0.0
        for at in grid[::step]:
            where = {str(k): v for k, v in at.items() if k != "layer"}
            began = time.process_time()
            got = self.value(name.format(n=at["layer"]), **where)
            taken.append(time.process_time() - began)
            worst = max(worst, abs(got - float(swept.isel(at))))
        return statistics.median(taken), worst

    def batched(self, size: int) -> float:
        """CPU-seconds of one cell of the residual stream in a batch of cells of one layer."""
        call = self.net.call([CORRUPT])
        wide = call.mapped([call.tensors()[0].repeat(size, 1)])
        taken = []
        for layer in (3, 14, 26):
            source = self.acts.tensor(f"resid_pre.{layer}")
            address = self.net.taps(f"resid_pre.{layer}")[0].site.address

            def change(raw: torch.Tensor, source: torch.Tensor = source) -> torch.Tensor:
                raw = raw.clone()
                for k in range(size):
                    position = k % source.shape[1]
                    raw[k, position] = source[0, position]
                return raw

            began = time.process_time()
            with torch.no_grad():
                self.net.hooks.run(wide, transforms={address: change})
            taken.append((time.process_time() - began) / size)
        return statistics.median(taken)


def _places(swept: xarray.DataArray) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for size in swept.shape:
        places = [(*p, i) for p in places for i in range(size)]
    return places


def product_speed() -> float:
    """GFLOP/s of a matrix product with 300 rows, which is a usual one in these sweeps."""
    x, w = torch.randn(300, 576), torch.randn(1536, 576)

    def job() -> None:
        for _ in range(50):
            torch.nn.functional.linear(x, w)

    return 50 * 2 * 300 * 576 * 1536 / seconds(job, 9)[0] / 1e9


def main() -> None:
    given = options(__doc__ or "")
    rounds = min(given.rounds, 3)
    torch.set_num_threads(1)
    net = patchclamp.open(given.model)
    assert net.tokenizer is not None
    words = [int(net.tokenizer.encode([w], max_length=None)["input_ids"][0, 0]) for w in ANSWERS]
    metric = Difference(*words)
    net.sites  # noqa: B018  (captures the network, once for all that follows)
    loop = Loop(net, metric, ["resid_pre.*", "attn.*.z", "mlp.*.out"])

    def swept(over: str, *, skip: bool, by: Sequence[str] | None = None) -> Callable[[], object]:
        return lambda: net.sweep([CLEAN], [CORRUPT], metric, over=over, by=by, skip=skip)

    jobs = {
        "residual, no skipping": (swept("resid_pre", skip=False), "resid_pre.{n}"),
        "residual, skipping": (swept("resid_pre", skip=True), "resid_pre.{n}"),
        "heads, no skipping": (swept("heads", skip=False), "attn.{n}.z"),
        "heads": (swept("heads", skip=True), "attn.{n}.z"),
        "MLPs, no skipping": (swept("mlp_out", skip=False, by=()), "mlp.{n}.out"),
        "MLPs": (swept("mlp_out", skip=True, by=()), "mlp.{n}.out"),
    }
    taken, cells, errors = {}, {}, {}
    loops = {}
    loop.value("resid_pre.0", position=0)
    for name, (job, site) in jobs.items():
        taken[name], made = seconds(job, rounds)
        assert isinstance(made, xarray.DataArray)
        each, errors[name] = loop.sampled(made, site)
        num = int(made.attrs["num_cells"]) - int(made.attrs["num_skipped"])
        cells[name] = num
        loops[name] = each * num
        print(
            f"{name:<26}{taken[name]:8.3f} s{loops[name]:9.2f} s for {num} passes"
            f"{loops[name] / taken[name]:7.1f} x   error {errors[name]:.1e}"
        )
    batches = {str(size): loop.batched(size) * 450 for size in (15, 30, 60)}
    print("batched:", batches)
    ratios = {
        "residual, no skipping, over one pass per cell": loops["residual, no skipping"]
        / taken["residual, no skipping"],
        "residual, no skipping, over batches": min(batches.values())
        / taken["residual, no skipping"],
        "residual, skipping, over one pass per cell that differs": loops["residual, skipping"]
        / taken["residual, skipping"],
        "heads, over one pass per cell": loops["heads"] / taken["heads"],
        "MLPs, over one pass per cell": loops["MLPs"] / taken["MLPs"],
    }
    missed = [name for name, bar in BARS.items() if ratios[name] < bar]
    missed += [f"error, {name}" for name, error in errors.items() if error >= ERROR]
    speed = product_speed()
    tokens = net.call([CLEAN]).tensors()[0].shape[1]
    data = {
        "model": net.name,
        "tokens": tokens,
        "cpu_seconds_median": taken,
        "passes_of_the_loop": cells,
        "cpu_seconds_of_the_loop_from_a_sample": loops,
        "sampled_cells": NUM_SAMPLED,
        "cpu_seconds_of_the_batched_loop_from_a_sample": batches,
        "ratio": ratios,
        "bars": BARS,
        "missed": missed,
        "largest_error_on_the_sample": errors,
        "product_gflops_per_second": speed,
        "rounds": rounds,
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {n: version(n) for n in ("torch", "transformers", "numpy")},
        "python": platform.python_version(),
    }
    for name, value in ratios.items():
        print(f"{name:<60}{value:7.1f} x  (bar {BARS[name]:.0f})")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "sweep_speed.json"
    fresh = path.with_suffix(".json.tmp")
    fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)
    if given.check and missed:
        sys.exit(f"bar missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

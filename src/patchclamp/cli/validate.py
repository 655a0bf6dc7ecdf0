"""`patchclamp validate`: may the maps of an attribution method be believed, on this network?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from patchclamp.cli import terminal
from patchclamp.cli.options import AllowPickle, AsJson
from patchclamp.cli.progress import watch
from patchclamp.cli.values import at_least
from patchclamp.core.errors import DataError, OptionError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from patchclamp.core.findings import Json
    from patchclamp.methods.material import Material
    from patchclamp.net import Net
    from patchclamp.truth.attribution.base import PlantedMaps
    from patchclamp.truth.attribution.validation import Trial, Validation

ALL = "all"
OWN = "own"
"""The bench of glyphs with the model's own architecture, trained anew."""
LENGTH = 32
"""Tokens of a text that are looked at, at most."""


def validate(
    method: str,
    *,
    model: str,
    data: str | None = None,
    bench: str = "glyphs",
    num: int = 16,
    at: str | None = None,
    seed: int = 0,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> int:
    """Ask an attribution method for maps whose truth is known, and controls for the same.

    Three questions: do its maps show what was planted; do they follow what the network
    learnt; does the score fall where they say. There is no verdict where a control, which
    knows nothing of the network, does as well. Exits with 1 unless the method holds.

    Args:
        method: a method, or "all"; an unknown name lists them.
        model: a name that `patchclamp models` lists, a folder or a file.
        data: what maps are made of: a name that `patchclamp data` lists, or a file; without
            it, bundled data that fits.
        bench: what is planted: glyphs, blocks, bright_region or lesions, in a small network,
            or own: glyphs, in the model's own architecture trained anew; several with commas.
        num: rows of the data.
        at: the site of the maps; by default what suits the method.
        seed: of networks, controls and noise.
        allow_pickle: read pickled files, which can run any code that is in them.
        as_json: print every score with its interval as JSON.
    """
    at_least("--num", num, 2)
    at_least("--seed", seed, 0)
    import torch

    import patchclamp
    from patchclamp.audit.intake import intake
    from patchclamp.core.findings import Verdict
    from patchclamp.methods.attribution import METHODS
    from patchclamp.methods.attribution import method as method_of
    from patchclamp.truth.attribution.validation import Validate

    chosen = [method_of(n)() for n in (METHODS if method == ALL else [method])]
    found: list[Validation] = []
    refused: dict[str, str] = {}
    with watch() as progress:
        net = patchclamp.open(model, allow_pickle=allow_pickle, progress=progress)
        material = intake(net, data, length=min(LENGTH, net.loaded.context or LENGTH))
        material = material.rows(net, torch.arange(min(num, material.num)))
        target = _classes(net, material)
        planted = _planted(net, bench, seed)
        for each in chosen:
            try:
                made = Validate(seed=seed).run(
                    each, net, material.call, target, at=at, planted=planted, progress=progress
                )
            except patchclamp.PatchclampError as e:
                if method != ALL:
                    raise
                refused[each.name] = str(e)
                continue
            found.append(made)
    if as_json:
        terminal.data_json(
            {
                "model": net.name,
                "model_hash": net.hash,
                "data": material.name,
                "validations": [_plain(v) for v in found],
                "refused": dict(refused),
            }
        )
    else:
        _show(found, refused)
    return 0 if found and all(v.verdict is Verdict.HOLDS for v in found) else 1


def _planted(net: Net, names: str, seed: int) -> dict[str, PlantedMaps]:
    from patchclamp.truth.attribution import Blocks, BrightRegion, Glyphs, Lesions
    from patchclamp.truth.attribution.likeness import glyphs_for

    benches = {
        "glyphs": Glyphs,
        "blocks": Blocks,
        "bright_region": BrightRegion,
        "lesions": Lesions,
    }
    made = {}
    for name in names.split(","):
        if name != OWN and name not in benches:
            raise OptionError(
                f"no bench '{name}'",
                expected=f"one of {', '.join((*benches, OWN))}",
                nearest=nearest(name, (*benches, OWN)),
            )
        chosen = glyphs_for(net, seed=seed) if name == OWN else benches[name](seed=seed)
        made[name] = chosen.run()
    return made


def _classes(net: Net, material: Material) -> Tensor:
    """The class that the network gives each row; of a language model, the next token."""
    import torch

    from patchclamp.model.inputs import principal

    with torch.no_grad():
        output = principal(net.hooks.run(material.call)[0])
    if output.ndim not in (2, 3):
        raise DataError(
            f"{net.name} gives no classes",
            got=f"an output of shape {tuple(output.shape)}",
            hint="in Python a target may be any function of the output",
        )
    last = output[:, -1] if output.ndim == 3 else output
    classes: Tensor = last.argmax(1)
    return classes


def _show(found: list[Validation], refused: dict[str, str]) -> None:
    rows = [
        (
            v.method,
            t.bench,
            f"{t.method.mean:.3f}",
            f"{t.method.interval.low:.3f} to {t.method.interval.high:.3f}",
            f"{t.nearest.name} {t.nearest.score.mean:.3f}",
            str(t.verdict),
            t.reason,
        )
        for v in found
        for t in v.trials
    ]
    heads = ("method", "asked on", "score", "95%", "nearest control", "verdict", "because")
    terminal.table(sys.stdout, heads, rows)
    for v in found:
        terminal.data(f"{v.method} on {v.network}: {v.verdict}")
        for bench, why in v.refused.items():
            terminal.message(f"{v.method} was not asked on {bench}: {why}")
    for name, why in refused.items():
        terminal.message(f"{name} was not asked: {why}")


def _plain(v: Validation) -> dict[str, Json]:
    return {
        "method": v.method,
        "verdict": str(v.verdict),
        "trials": [_plain_trial(t) for t in v.trials],
        "refused": dict(v.refused),
    }


def _plain_trial(t: Trial) -> dict[str, Json]:
    interval = t.method.interval
    return {
        "question": str(t.question),
        "bench": t.bench,
        "network": t.network,
        "measure": t.measure,
        "score": t.method.mean,
        "low": interval.low,
        "high": interval.high,
        "chance": t.method.chance,
        "verdict": str(t.verdict),
        "reason": t.reason,
        "controls": {
            r.name: {
                "score": r.score.mean,
                "lead_low": r.lead.low,
                "lead_high": r.lead.high,
            }
            for r in t.rivals
        },
    }

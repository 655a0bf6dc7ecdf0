"""Transformers whose circuits are known because they were compiled from programs.

A program in a small RASP-like language (`language`, `programs`) is compiled exactly into
the weights of a plain transformer (`compiler`, `transformer`). Its edges follow from the
weights and from brute-force patching (`edges`), its inputs and metric from the program
(`planting`). `hard` hides the same circuits: rotated, rescaled, among decoys, under noise.

Sources: Weiss et al. 2021 (RASP); Lindner et al. 2023 (compiling it into transformers).
"""

from patchclamp.truth.rasp.hard import Variant, hard_variant, hard_variants
from patchclamp.truth.rasp.planting import Program, plant
from patchclamp.truth.rasp.programs import PROGRAMS, compiled

__all__ = [
    "PROGRAMS",
    "Program",
    "Variant",
    "compiled",
    "hard_variant",
    "hard_variants",
    "plant",
]

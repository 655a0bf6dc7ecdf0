"""What something perturbed may be: boxes, balls, patches, half-spaces, words.

A set knows a box around itself and a lower bound of a linear function over it. N sets of one
shape lie side by side, one for each example.
"""

from patchclamp.bounding.sets.around import Around
from patchclamp.bounding.sets.ball import Ball
from patchclamp.bounding.sets.base import PerturbedSet, Shaped
from patchclamp.bounding.sets.box import Box
from patchclamp.bounding.sets.half_spaces import HalfSpaces
from patchclamp.bounding.sets.patches import Patches
from patchclamp.bounding.sets.substitutions import Substitutions

__all__ = [
    "Around",
    "Ball",
    "Box",
    "HalfSpaces",
    "Patches",
    "PerturbedSet",
    "Shaped",
    "Substitutions",
]

"""Benches with planted truth for attribution, controls, and networks with exact answers.

`Blocks`, `Glyphs`, `Slabs`, `BrightRegion` and `Lesions` train a network of which it is known
what it reads (`PlantedMaps`); `PlantedMaps.scores` says how well a map shows it. `controls_of`
gives what a method has to beat. `DiffRoar` retrains on what maps mark, `RandomiseLayers`
destroys what was learnt, and `exact_network` has answers in closed form.
"""

from patchclamp.truth.attribution.base import Build, Gate, MapScores, PlantedMaps, Score, Share
from patchclamp.truth.attribution.blocks import Blocks, Variant
from patchclamp.truth.attribution.controls import (
    AbsoluteValue,
    AnotherImage,
    CentreBias,
    Control,
    Edges,
    GivenMaps,
    RandomMap,
    RandomWeights,
    UniformMap,
    controls_of,
)
from patchclamp.truth.attribution.diffroar import DiffRoar, PredictivePower
from patchclamp.truth.attribution.exact import (
    ExactNetwork,
    Kind,
    OneLayer,
    Quantity,
    exact_network,
)
from patchclamp.truth.attribution.fitting import Recipe, anywhere, convolutional, perceptron
from patchclamp.truth.attribution.glyphs import Glyphs
from patchclamp.truth.attribution.randomising import Order, Randomised, RandomiseLayers, Step
from patchclamp.truth.attribution.regions import BrightRegion, Lesions
from patchclamp.truth.attribution.slabs import SlabMaps, Slabs

__all__ = [
    "AbsoluteValue",
    "AnotherImage",
    "Blocks",
    "BrightRegion",
    "Build",
    "CentreBias",
    "Control",
    "DiffRoar",
    "Edges",
    "ExactNetwork",
    "Gate",
    "GivenMaps",
    "Glyphs",
    "Kind",
    "Lesions",
    "MapScores",
    "OneLayer",
    "Order",
    "PlantedMaps",
    "PredictivePower",
    "Quantity",
    "RandomMap",
    "RandomWeights",
    "RandomiseLayers",
    "Randomised",
    "Recipe",
    "Score",
    "Share",
    "SlabMaps",
    "Slabs",
    "Step",
    "UniformMap",
    "Variant",
    "anywhere",
    "controls_of",
    "convolutional",
    "exact_network",
    "perceptron",
]

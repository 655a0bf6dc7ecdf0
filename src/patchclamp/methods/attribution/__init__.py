"""What a score is laid to: maps over inputs, layers, channels, units and heads."""

from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.methods.attribution.catalogue import METHODS, attribute, method

__all__ = ["METHODS", "Attribution", "Explainer", "attribute", "method"]

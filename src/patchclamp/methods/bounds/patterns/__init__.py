"""Neural activation patterns as specifications: mined, verified, compared with balls."""

from patchclamp.methods.bounds.patterns.ambiguity import PatternsApart
from patchclamp.methods.bounds.patterns.attack import PatternAttack
from patchclamp.methods.bounds.patterns.mining import MinedPattern, MinePatterns, Share
from patchclamp.methods.bounds.patterns.network import Domain
from patchclamp.methods.bounds.patterns.pattern import Pattern, active_units, relu_sites
from patchclamp.methods.bounds.patterns.regions import CompareRegions, Reach, Regions
from patchclamp.methods.bounds.patterns.verification import (
    Decision,
    Outcome,
    Prover,
    Verification,
    VerifyPattern,
)

__all__ = [
    "CompareRegions",
    "Decision",
    "Domain",
    "MinePatterns",
    "MinedPattern",
    "Outcome",
    "Pattern",
    "PatternAttack",
    "PatternsApart",
    "Prover",
    "Reach",
    "Regions",
    "Share",
    "Verification",
    "VerifyPattern",
    "active_units",
    "relu_sites",
]

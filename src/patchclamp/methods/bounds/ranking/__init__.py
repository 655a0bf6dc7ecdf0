"""Certified top-K robustness of a ranker under word substitution, by randomised smoothing."""

from patchclamp.methods.bounds.ranking.attack import GreedyPromotion
from patchclamp.methods.bounds.ranking.certificate import CertifiedTopK, RankingCertificate
from patchclamp.methods.bounds.ranking.overlap import ceiling
from patchclamp.methods.bounds.ranking.smoothing import Clip, SmoothedRanker, Vote
from patchclamp.methods.bounds.ranking.substitutions import Substitutions
from patchclamp.methods.bounds.ranking.words import FUNCTION_WORDS

__all__ = [
    "FUNCTION_WORDS",
    "CertifiedTopK",
    "Clip",
    "GreedyPromotion",
    "RankingCertificate",
    "SmoothedRanker",
    "Substitutions",
    "Vote",
    "ceiling",
]

"""Which clients take part in a round.

A sampler's ``cohort(round)`` is a function of its seed and the round alone: algorithms that are
compared see the same cohorts, and a run that resumes goes on with them. Within a round a client
takes part once, unless the sampler draws with replacement; in the next round it may be back.
"""

from featherweight.federated.sampling.always import (
    BySize,
    Everyone,
    Poisson,
    Uniform,
    WithReplacement,
)
from featherweight.federated.sampling.availability import Diurnal, Markov
from featherweight.federated.sampling.base import SAMPLERS, Sampler, participation
from featherweight.federated.sampling.over_selection import OverSelection

__all__ = [
    "SAMPLERS",
    "BySize",
    "Diurnal",
    "Everyone",
    "Markov",
    "OverSelection",
    "Poisson",
    "Sampler",
    "Uniform",
    "WithReplacement",
    "participation",
]

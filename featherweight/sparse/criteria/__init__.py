"""What a weight is worth: one criterion a file, each a function from weights to scores."""

from featherweight.sparse.criteria.magnitude import magnitude
from featherweight.sparse.criteria.norm_magnitude import folded_magnitude, norm_magnitude
from featherweight.sparse.criteria.random import random
from featherweight.sparse.criteria.registry import CRITERIA, Scores, score

__all__ = [
    "CRITERIA",
    "Scores",
    "folded_magnitude",
    "magnitude",
    "norm_magnitude",
    "random",
    "score",
]

"""What a weight is worth: one criterion a file, each a function from weights to scores."""

from featherweight.sparse.criteria.grasp import grasp
from featherweight.sparse.criteria.magnitude import magnitude
from featherweight.sparse.criteria.norm_magnitude import folded_magnitude, norm_magnitude
from featherweight.sparse.criteria.prospr import prospr
from featherweight.sparse.criteria.random import random
from featherweight.sparse.criteria.registry import CRITERIA, Scores, score
from featherweight.sparse.criteria.snip import snip
from featherweight.sparse.criteria.synflow import synflow

__all__ = [
    "CRITERIA",
    "Scores",
    "folded_magnitude",
    "grasp",
    "magnitude",
    "norm_magnitude",
    "prospr",
    "random",
    "score",
    "snip",
    "synflow",
]

"""How many weights each layer keeps.

A density rule is a function of the layers' shapes and the overall density; it returns the fraction
that each layer keeps. One rule, one file. Every rule meets the overall density exactly; what a
full layer can't take goes to the others.
"""

from featherweight.sparse.density.allocate import allocate, kept_counts
from featherweight.sparse.density.balanced import balanced, balanced_sequential
from featherweight.sparse.density.erdos_renyi import er, erk
from featherweight.sparse.density.pyramidal import pyramidal
from featherweight.sparse.density.registry import DENSITIES, Shapes
from featherweight.sparse.density.solve import waterfill
from featherweight.sparse.density.uniform import uniform

__all__ = [
    "DENSITIES",
    "Shapes",
    "allocate",
    "balanced",
    "balanced_sequential",
    "er",
    "erk",
    "kept_counts",
    "pyramidal",
    "uniform",
    "waterfill",
]

"""Sparse training: which weights exist.

Four independent choices and a loop. A **criterion** says what a weight is worth, a **density** rule
how many each layer keeps, the **schedule** when and how much is pruned, the **loop** runs them on
the user's own training. `Masks` are the data they pass around, `hold` keeps them in force.
"""

from featherweight.sparse import tickets
from featherweight.sparse.criteria import CRITERIA, score
from featherweight.sparse.density import DENSITIES, allocate, kept_counts
from featherweight.sparse.flow import Health, Repair, health, on_path, repair
from featherweight.sparse.hold import Hold, hold
from featherweight.sparse.loops import (
    LOOPS,
    RESETS,
    Level,
    Resume,
    imp,
    iterate,
    level_counts,
    lrr,
    signs_from,
    snapshot,
    wr,
)
from featherweight.sparse.masks import Masks, Overlap, SignFlips
from featherweight.sparse.packed import load_packed, save_packed
from featherweight.sparse.prune import magnitude, prune, random
from featherweight.sparse.reparam import edge_popup, fold
from featherweight.sparse.select import select, top_k
from featherweight.sparse.signs import hold_signs, perturb_signs_, train_only_norms_

__all__ = [
    # masks as data
    "Masks",  # parameter name -> bool tensor: combine, compare, save, load, apply
    "Overlap",  # how far two masks agree
    "SignFlips",  # how many kept weights changed sign
    "save_packed",  # a model as small as its kept weights
    "load_packed",
    # one-line masks
    "random",  # random masks with a density rule
    "magnitude",  # the largest weights
    "prune",  # any registered criterion
    # keeping them in force
    "hold",  # masked weights stay zero through training
    "Hold",
    # loops around the user's own training
    "imp",  # iterative magnitude pruning
    "wr",  # weight rewinding
    "lrr",  # learning rate rewinding
    "iterate",  # the driver, every option
    "Level",
    "Resume",
    "level_counts",
    "snapshot",
    "signs_from",
    # strong tickets
    "edge_popup",  # frozen weights, trained scores
    "fold",  # back to a plain model
    "tickets",  # constructions: networks found inside random ones
    # pieces
    "score",  # weights -> scores
    "select",  # scores -> masks
    "top_k",
    "allocate",  # shapes -> densities
    "kept_counts",  # densities -> exact counts
    # does signal pass
    "health",
    "Health",
    "repair",
    "Repair",
    "on_path",
    # signs
    "perturb_signs_",
    "hold_signs",
    "train_only_norms_",
    # registries
    "CRITERIA",
    "DENSITIES",
    "LOOPS",
    "RESETS",
]

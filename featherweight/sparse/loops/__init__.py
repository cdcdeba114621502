"""Iterative pruning as generators: they yield a level, the user trains it, they prune.

All loops share one driver; they differ in what they reset after pruning.
"""

from featherweight.sparse.loops.driver import Level, Resume, iterate, level_counts
from featherweight.sparse.loops.imp import imp
from featherweight.sparse.loops.lrr import lrr
from featherweight.sparse.loops.registry import LOOPS
from featherweight.sparse.loops.reset import RESETS, Rewind, signs_from, snapshot
from featherweight.sparse.loops.wr import wr

__all__ = [
    "LOOPS",
    "RESETS",
    "Level",
    "Resume",
    "Rewind",
    "imp",
    "iterate",
    "level_counts",
    "lrr",
    "signs_from",
    "snapshot",
    "wr",
]

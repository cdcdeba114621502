"""Iterative training as generators: they yield a level, the user trains it, they prune.

All loops share one driver; they differ in how many weights each level keeps and in what they reset
after pruning.
"""

from featherweight.sparse.loops.cycles import STRATEGIES, Ledger, cycle_lengths, ledger
from featherweight.sparse.loops.cyclic import cyclic
from featherweight.sparse.loops.driver import iterate
from featherweight.sparse.loops.imp import imp
from featherweight.sparse.loops.level import Level, Resume, level_counts
from featherweight.sparse.loops.lrr import lrr
from featherweight.sparse.loops.registry import LOOPS
from featherweight.sparse.loops.reset import RESETS, Rewind, signs_from, snapshot
from featherweight.sparse.loops.sculpt import sculpt
from featherweight.sparse.loops.wr import wr

__all__ = [
    "LOOPS",
    "RESETS",
    "STRATEGIES",
    "Ledger",
    "Level",
    "Resume",
    "Rewind",
    "cycle_lengths",
    "cyclic",
    "imp",
    "iterate",
    "ledger",
    "level_counts",
    "lrr",
    "sculpt",
    "signs_from",
    "snapshot",
    "wr",
]

"""Subset sums by trying every subset with exact fractions, one problem at a time."""

import itertools
from fractions import Fraction


def best(candidates, target, sizes=None):
    """Return (error, size): the smallest distance of any subset, of the fewest members for it.

    Args:
        candidates: list of floats.
        target: float.
        sizes: allowed sizes; None: all.
    """
    numbers = [Fraction(c) for c in candidates]
    goal = Fraction(target)
    found = [
        (abs(sum(subset, Fraction(0)) - goal), size)
        for size in (range(len(numbers) + 1) if sizes is None else sizes)
        for subset in itertools.combinations(numbers, size)
    ]
    error, size = min(found)
    return float(error), size


def smallest_within(candidates, target, tolerance, sizes=None):
    """Return (error, size) of the nearest subset of the smallest size within a tolerance.

    Without one within the tolerance, of the nearest of all.
    """
    for size in range(len(candidates) + 1) if sizes is None else sizes:
        error, _ = best(candidates, target, [size])
        if error <= tolerance:
            return error, size
    return best(candidates, target, sizes)

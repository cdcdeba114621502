"""Iterative magnitude pruning by plain sorting of all weights."""


def slow_levels(weights, per_level, levels):
    """Return the sets of kept positions of each level when weights never change.

    Args:
        weights: list of numbers.
        per_level: fraction removed from the kept ones at each pruning.
        levels: number of prunings.
    """
    order = sorted(range(len(weights)), key=lambda i: (-abs(weights[i]), i))
    return [set(order[: round((1 - per_level) ** t * len(weights))]) for t in range(levels + 1)]

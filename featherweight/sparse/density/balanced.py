"""Balanced densities: every layer keeps the same number of weights, as far as it has them."""

from math import prod

from featherweight.sparse.density.registry import DENSITIES, Shapes
from featherweight.sparse.density.solve import waterfill

PAPER = "Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412"


@DENSITIES.register("balanced", "the same number of weights in every layer", PAPER)
def balanced(shapes: Shapes, density: float, *, legacy: bool = False) -> dict[str, float]:
    """Keep the same number of weights in every layer; small layers are kept whole.

    Args:
        shapes: parameter name to shape.
        density: overall kept fraction, in (0, 1].
        legacy: ``min(1, share / size)`` without handing on what small layers can't take, as the
            paper's code does; the overall density is then missed.

    Source: Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    if legacy:
        return {name: min(1.0, budget / len(sizes) / size) for name, size in sizes.items()}
    kept = waterfill({name: 1.0 / size for name, size in sizes.items()}, sizes, budget)
    return {name: kept[name] / size for name, size in sizes.items()}


def balanced_sequential(shapes: Shapes, density: float) -> dict[str, float]:
    """Reproduce the one-pass form of balanced densities found in later public code.

    What a full layer can't take goes in equal parts to the layers after it only, and the divisor
    still counts the full layer, so the overall density is missed. For comparisons alone.

    Args:
        shapes: parameter name to shape, in forward order.
        density: wished-for overall kept fraction, in (0, 1].
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    share = density * sum(sizes.values()) / len(sizes)
    densities: dict[str, float] = {}
    for position, (name, size) in enumerate(sizes.items()):
        densities[name] = min(1.0, share / size)
        if share > size:
            share += (share - size) / (len(sizes) - position)
    return densities

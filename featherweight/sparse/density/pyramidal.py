"""Pyramidal densities: each layer is sparser than the one before by the same factor."""

from math import prod

from featherweight.sparse.density.registry import DENSITIES, Shapes

PAPER = "Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412"


@DENSITIES.register("pyramidal", "layer l keeps r^l: ever sparser with depth", PAPER)
def pyramidal(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep ``r**l`` of layer ``l = 1, 2, ...`` with the one ``r`` that meets the overall density.

    Deep layers, the classifier among them, can starve: at low densities exclude the classifier or
    use `featherweight.sparse.repair`.

    Args:
        shapes: parameter name to shape, in forward order.
        density: overall kept fraction, in (0, 1].

    Source: Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412.
    """
    sizes = [prod(shape) for shape in shapes.values()]
    budget = density * sum(sizes)
    low, high = 0.0, 1.0
    # The total is strictly increasing in r; bisect until the interval can't shrink any more.
    while low < (middle := (low + high) / 2) < high:
        if sum(size * middle ** (i + 1) for i, size in enumerate(sizes)) < budget:
            low = middle
        else:
            high = middle
    return {name: high ** (i + 1) for i, name in enumerate(shapes)}

"""The same density in every layer."""

from featherweight.sparse.density.registry import DENSITIES, Shapes


@DENSITIES.register("uniform", "the same density in every layer")
def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep the same fraction of every layer.

    Args:
        shapes: parameter name to shape.
        density: overall kept fraction, in (0, 1].
    """
    return dict.fromkeys(shapes, density)

"""Erdos-Renyi densities: layers with many units for their size keep more."""

from math import prod

from featherweight.sparse.density.registry import DENSITIES, Shapes
from featherweight.sparse.density.solve import waterfill

SET = "Mocanu et al. 2018, arXiv:1707.04780"
RIGL = "Evci et al. 2020, arXiv:1911.11134"


@DENSITIES.register("er", "proportional to (inputs + outputs) / (inputs * outputs)", SET)
def er(shapes: Shapes, density: float, *, legacy: bool = False) -> dict[str, float]:
    """Give each layer a density proportional to ``(inputs + outputs) / (inputs * outputs)``.

    The kernel size of convolutions plays no role; see `erk` for the form where it does.

    Args:
        shapes: parameter name to shape, ``[outputs, inputs, *kernel]``.
        density: overall kept fraction, in (0, 1].
        legacy: clamp at 1 without handing the clipped mass to other layers, as published code
            does; the overall density is then missed.

    Source: Mocanu et al. 2018, arXiv:1707.04780.
    """
    ratios = {name: sum(shape[:2]) / prod(shape[:2]) for name, shape in shapes.items()}
    return _proportional(ratios, shapes, density, legacy)


@DENSITIES.register("erk", "as er, with the kernel: sum(shape) / prod(shape)", RIGL)
def erk(
    shapes: Shapes, density: float, *, power: float = 1.0, legacy: bool = False
) -> dict[str, float]:
    """Give each layer a density proportional to ``(sum(shape) / prod(shape)) ** power``.

    Args:
        shapes: parameter name to shape, ``[outputs, inputs, *kernel]``.
        density: overall kept fraction, in (0, 1].
        power: 1 is the published rule, 0 is uniform.
        legacy: clamp at 1 without handing the clipped mass to other layers, as published code
            does; the overall density is then missed.

    Source: Evci et al. 2020, arXiv:1911.11134; the legacy form is the one used with Gadhikar,
    Mukherjee & Burkholz 2023, arXiv:2210.02412.
    """
    ratios = {name: (sum(shape) / prod(shape)) ** power for name, shape in shapes.items()}
    return _proportional(ratios, shapes, density, legacy)


def _proportional(
    ratios: dict[str, float], shapes: Shapes, density: float, legacy: bool
) -> dict[str, float]:
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    if legacy:
        scale = budget / sum(ratios[name] * size for name, size in sizes.items())
        return {name: min(1.0, scale * ratio) for name, ratio in ratios.items()}
    kept = waterfill(ratios, sizes, budget)
    return {name: kept[name] / size for name, size in sizes.items()}

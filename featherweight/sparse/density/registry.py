"""The table of density rules."""

from collections.abc import Callable, Mapping, Sequence

from featherweight.common import Registry

Shapes = Mapping[str, Sequence[int]]
"""Parameter name to shape, in forward order."""

DensityRule = Callable[[Shapes, float], dict[str, float]]
"""A rule: shapes and the overall density to the kept fraction of each layer."""

DENSITIES: Registry[Callable[..., dict[str, float]]] = Registry("density rule")
"""How many weights each layer keeps: functions of shapes and overall density, by name."""

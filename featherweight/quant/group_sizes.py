"""Which group size each layer gets: the one asked for, or a half of it that divides its rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from featherweight.quant.decoder import Decoder
from featherweight.quant.experts import expert_sizes
from featherweight.quant.grid import Grid


def layer_grids(decoder: Decoder, grid: Grid) -> dict[str, Grid]:
    """Return the grid of each layer: with the group size, or a half of it that divides its rows.

    Raises:
        ValueError: none does for some layer.
    """
    found = {}
    for name, columns in _columns(decoder):
        try:
            found[name] = grid.fitting(columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def _columns(decoder: Decoder) -> Iterator[tuple[str, int]]:
    """Yield name and columns of all that is quantised."""
    for block in decoder.blocks:
        for name in (name for stage in block.stages() for name in stage):
            yield name, decoder.model.get_submodule(name).in_features  # type: ignore[misc]
        if block.experts:
            sizes = expert_sizes(decoder.model.get_submodule(block.experts))
            yield from ((f"{block.experts}.{name}", size) for name, size in sizes.items())


def warn_of_smaller_groups(grid: Grid, grids: Mapping[str, Grid]) -> None:
    """Say in one line where the group size asked for does not divide rows."""
    found_sizes = (one.group_size or 0 for one in grids.values())
    sizes = [size for size in found_sizes if size != (grid.group_size or 0)]
    if sizes:
        found = ", ".join(f"{size} in {sizes.count(size)} layers" for size in sorted(set(sizes)))
        warnings.warn(
            f"group_size {grid.group_size} does not divide all rows; groups are of {found}",
            stacklevel=4,
        )

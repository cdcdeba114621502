"""Round to nearest: every weight goes to the nearest point of its group's grid. No data."""

from __future__ import annotations

from torch import Tensor

from featherweight.quant.grid import Grid, Quantized, encode, fit_groups, pack_codes


def round_to_nearest(weight: Tensor, grid: Grid) -> Quantized:
    """Quantise a matrix by rounding.

    Args:
        weight: ``[rows, columns]``, floating.
        grid: the grid.

    Raises:
        ValueError: groups do not divide the row.
    """
    scale, zero = fit_groups(weight, grid)
    size = weight.shape[1] // scale.shape[1]
    groups = weight.float().unflatten(1, (-1, size))
    codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(1)
    return Quantized(pack_codes(codes, grid), scale, zero, grid)

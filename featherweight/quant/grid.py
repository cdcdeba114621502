"""The uniform grid: integer codes with a scale and a zero point for each group of a row.

``w ~ scale * (code - zero)`` with codes in ``[0, 2^bits - 1]``. Zero is always on the grid, so a
pruned weight stays zero. Symmetric grids have their zero point fixed at ``2^(bits - 1)`` and the
scale ``absmax / ((2^bits - 1) / 2)``, as GPTQ and compressed-tensors have it; QuaRot divides by
``2^(bits - 1) - 1``: figures of the two can't be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_NORM = 2.4  # exponent of the clipping search's error, as in GPTQ's code
_SHRINKS = 50  # steps of 1 % by which the range is tried smaller
_LEAST_GROUP = 32  # that a group is halved to where the size asked for does not divide a row


@dataclass(frozen=True)
class Grid:
    """How weights are rounded.

    Attributes:
        bits: of a code, 2 to 8; 16 for tests, where rounding must vanish.
        group_size: consecutive weights of a row that share scale and zero; None for the whole row.
        symmetric: fix the zero point in the middle.
        clip: search each group's range for the least ``|error|^2.4``, down to half of it. It is
            worth as much as a rotation, so compare rotations at equal settings.
        scale_dtype: scales are rounded to it before they are used, so that a file that stores
            them so holds the very same weights.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    clip: bool = True
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), 16):
            raise ValueError(f"bits must lie in 2..8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive or None, got {self.group_size}")
        if not self.scale_dtype.is_floating_point:
            raise ValueError(f"scale_dtype must be floating, got {self.scale_dtype}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def size(self, columns: int) -> int:
        """Return the group size for rows of so many columns.

        Raises:
            ValueError: groups do not divide the row.
        """
        size = self.group_size or columns
        if columns % size:
            fits = [s for s in (256, 128, 64, 32, 16) if columns % s == 0]
            raise ValueError(
                f"group_size {size} does not divide {columns} columns; of the usual sizes "
                f"{', '.join(map(str, fits)) or 'none'} do, and None is the whole row"
            )
        return size

    def fitting(self, columns: int) -> Grid:
        """Return this grid with groups that divide rows of so many columns.

        The group size is halved until it does, down to 32: 128 becomes 64 for rows of 576.

        Raises:
            ValueError: no half of the group size divides the row.
        """
        size = self.group_size
        while size and columns % size and size % 2 == 0 and size > _LEAST_GROUP:
            size //= 2
        if size and columns % size:
            self.size(columns)  # says which sizes do
        return replace(self, group_size=size)

    def bits_per_weight(self, columns: int) -> float:
        """Return bits with scales of 16 bits and zero points counted in."""
        shared = 16 + (0 if self.symmetric else self.bits)
        return self.bits + shared / self.size(columns)


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes.

    Attributes:
        codes: uint8 (int32 at 16 bits), ``[rows, columns]``, in ``[0, 2^bits - 1]``.
        scale: ``[rows, groups]``, positive.
        zero: int32, ``[rows, groups]``, in ``[0, 2^bits - 1]``.
        grid: that it was rounded to.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``scale * (code - zero)``, computed in float32, ``[rows, columns]``."""
        size = self.codes.shape[1] // self.scale.shape[1]
        codes = self.codes.int().unflatten(1, (-1, size)) - self.zero[..., None]
        weight: Tensor = codes.float() * self.scale.float()[..., None]
        return weight.flatten(1).to(dtype)


def fit(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of each row, one group wide.

    Args:
        weight: ``[rows, n]``, floating: one group a row.
        grid: its ``group_size`` does not matter here.

    Returns:
        Scale in float32, rounded to ``scale_dtype``, and zero point, int32; both ``[rows]``.
    """
    weight = weight.float()
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _parameters(low, high, grid)
    if not grid.clip:
        return scale, zero
    best = _error(weight, scale, zero, grid)
    for step in range(1, _SHRINKS + 1):
        shrink = 1 - step / 100
        candidate = _parameters(low * shrink, high * shrink, grid)
        error = _error(weight, *candidate, grid)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate[0], scale)
        zero = torch.where(better, candidate[1], zero)
    return scale, zero


def _parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    scale = (high - low) / grid.top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = scale.to(grid.scale_dtype).float()
    scale = torch.where(rounded > 0, rounded, torch.finfo(grid.scale_dtype).tiny)
    if grid.symmetric:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.int32)
    return scale, (-low / scale).round().clamp(0, grid.top).int()


def _error(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    rounded = snap(weight, scale[:, None], zero[:, None], grid)
    return rounded.sub_(weight).abs_().pow_(_NORM).sum(1)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return codes as floats: ``clamp(round(w / scale) + zero, 0, 2^bits - 1)``, half to even."""
    return (weight / scale).round_().add_(zero).clamp_(0, grid.top)


def snap(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the nearest grid points; shapes of scale and zero broadcast."""
    return encode(weight, scale, zero, grid).sub_(zero).mul_(scale)


def fit_groups(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of every group of ``[rows, columns]``: two ``[rows, groups]``.

    Raises:
        ValueError: groups do not divide the row.
    """
    size = grid.size(weight.shape[1])
    parts = [fit(part, grid) for part in _row_chunks(weight.reshape(-1, size))]
    scale, zero = (torch.cat(each) for each in zip(*parts, strict=True))
    return scale.view(len(weight), -1), zero.view(len(weight), -1)


def _row_chunks(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(1, 2**22 // rows.shape[1]))  # 16 MB of float32 at a time


def pack_codes(codes: Tensor, grid: Grid) -> Tensor:
    """Store codes in the smallest integer type."""
    return codes.to(torch.uint8 if grid.bits <= 8 else torch.int32)

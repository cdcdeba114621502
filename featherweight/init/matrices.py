"""Orthogonal matrices, looks-linear matrices, and convolutions that act as matrices on pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featherweight.common import Generator, as_generator


def haar(
    rows: int, columns: int, *, seed: int | None = None, generator: Generator | None = None
) -> Tensor:
    """Draw a matrix uniformly from those with orthonormal columns, or rows if there are fewer.

    Args:
        rows, columns: of the matrix, each at least 1.
        seed, generator: exactly one of the two.

    Returns:
        [rows, columns] in float64; square: uniform on the orthogonal group.

    Source: Mezzadri 2007, arXiv:math-ph/0609050: QR with the signs of R's diagonal.
    """
    drawn = torch.randn(
        max(rows, columns),
        min(rows, columns),
        dtype=torch.float64,
        generator=as_generator(seed, generator),
    )
    q, r = torch.linalg.qr(drawn)
    q = torch.mul(q, r.diagonal().sign())
    return q if rows >= columns else q.mT.contiguous()


def looks_linear_matrix(matrix: Tensor) -> Tensor:
    """Return ``[[U, -U], [-U, U]]`` [2r, 2c], which acts as U [r, c] on pairs through ReLUs.

    A state ``[relu(d), relu(-d)]`` carries d. One layer maps it to ``[U d, -U d]``, whose ReLU is
    the state that carries ``U d``.

    Source: Balduzzi et al. 2017, arXiv:1702.08591, section 4.1.
    """
    return torch.cat([looks_linear_last(matrix), looks_linear_last(-matrix)])


def looks_linear_first(matrix: Tensor) -> Tensor:
    """Return ``[U; -U]`` [2r, c]: what makes pairs from an input."""
    return torch.cat([matrix, -matrix])


def looks_linear_last(matrix: Tensor) -> Tensor:
    """Return ``[U, -U]`` [r, 2c]: what reads pairs."""
    return torch.cat([matrix, -matrix], dim=1)


def centre_tap(weight: Tensor) -> Tensor:
    """Return a view [rows, columns] of the middle of every kernel; a matrix is its own middle.

    Args:
        weight: [rows, columns, *kernel], kernel sizes odd.
    """
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    return weight


def delta(matrix: Tensor, kernel: Sequence[int] = ()) -> Tensor:
    """Return a convolution weight that multiplies every pixel by a matrix.

    Args:
        matrix: [rows, columns].
        kernel: odd sizes; none for a linear layer.

    Returns:
        [rows, columns, *kernel]: the matrix in the middle of the kernels, zeros around it.

    Source: Xiao et al. 2018, arXiv:1806.05393, definition 1 (delta-orthogonal for orthogonal U).
    """
    weight = matrix.new_zeros(*matrix.shape, *kernel)
    centre_tap(weight).copy_(matrix)
    return weight


def interleave(halves: Tensor, dim: int = 0) -> Tensor:
    """Reorder channels from halves (pair i, i + h) to neighbours (pair 2i, 2i + 1).

    Args:
        halves: any tensor with an even size along ``dim``.
        dim: where the channels are.
    """
    return torch.stack(halves.chunk(2, dim), dim + 1).flatten(dim, dim + 1)

"""Backend ``masked``: a dense weight that is zero outside the pattern.

The one that runs everywhere and differentiates any number of times.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute.pattern import SparsePattern


def prepare(pattern: SparsePattern) -> Tensor:
    """Return where each value stands in the flattened weight; kept with the pattern."""
    return pattern.derive("masked", lambda p: (p.flat(),))[0]


def scatter(values: Tensor, pattern: SparsePattern) -> Tensor:
    """Return values (nnz,) as a dense weight; positions are kept for the next time."""
    zeros = values.new_zeros(pattern.rows * pattern.cols)
    return zeros.scatter(0, prepare(pattern), values).view(pattern.shape)


def linear(x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None) -> Tensor:
    """Apply the weight as `torch.nn.functional.linear` does.

    Args:
        x: (..., columns).
        values: (nnz,).
        pattern: of a matrix.
        bias: (rows,) or None.

    Returns:
        (..., rows).
    """
    return functional.linear(x, scatter(values, pattern), bias)

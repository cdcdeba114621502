"""Backend ``shrunk``: dead rows and columns are left out, what remains is a small dense weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute.pattern import SparsePattern


def block(pattern: SparsePattern) -> tuple[Tensor, ...]:
    """Return the rows and columns that hold a value, and where values stand among them.

    Returns:
        Indices of rows (r,) and of columns (c,), and positions (nnz,) in the flattened (r, c)
        block; int64.
    """
    alive, alive_t = pattern.crow.diff() > 0, pattern.crow_t.diff() > 0
    row, col = pattern.flat() // pattern.cols, pattern.col.long()
    place, place_t = alive.cumsum(0) - 1, alive_t.cumsum(0) - 1
    position = place[row] * alive_t.count_nonzero() + place_t[col]
    return alive.nonzero().flatten(), alive_t.nonzero().flatten(), position


def prepare(pattern: SparsePattern) -> tuple[Tensor, ...]:
    """Return the same as `block`; kept with the pattern."""
    return pattern.derive("shrunk", block)


def living(pattern: SparsePattern) -> tuple[int, int]:
    """Return how many rows and columns hold a value."""
    rows, cols = (offsets.diff().count_nonzero() for offsets in (pattern.crow, pattern.crow_t))
    return int(rows), int(cols)


def linear(x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None) -> Tensor:
    """Apply the weight as `masked.linear` does."""
    rows, cols, position = prepare(pattern)
    weight = values.new_zeros(len(rows) * len(cols)).scatter(0, position, values)
    weight = weight.view(len(rows), len(cols))
    inputs = x if len(cols) == pattern.cols else x.index_select(-1, cols)
    if len(rows) == pattern.rows:
        return functional.linear(inputs, weight, bias)
    small = functional.linear(inputs, weight)
    y = small.new_zeros(*x.shape[:-1], pattern.rows).index_copy(-1, rows, small)
    return y if bias is None else y + bias

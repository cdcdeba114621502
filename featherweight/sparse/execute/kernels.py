# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
"""Products at the kept entries only, compiled; importing this needs numba."""

import numpy as np
from numba import njit


@njit(nogil=True, fastmath=True, cache=True, error_model="numpy")
def sample(crow, col, left, right, begin, end, out):
    """Write the entries of ``left @ right.T`` at the places of rows ``begin`` to ``end``.

    Four products at a time share what they read of ``left``. Each entry is computed on its own,
    so that it does not matter how rows are shared among threads.

    Args:
        crow: (R + 1,), int32.
        col: (nnz,), uint32: a signed index would be tested for being negative.
        left, right: (R, B) and (C, B), of one dtype.
        begin, end: rows.
        out: (nnz,).
    """
    batch, zero = np.uint64(left.shape[1]), left.dtype.type(0)
    for row in range(begin, end):
        r, stop = np.uint64(row), crow[row + 1]
        fours = stop - (stop - crow[row]) % 4
        for j in range(crow[row], fours, 4):
            c0, c1, c2, c3 = col[j], col[j + 1], col[j + 2], col[j + 3]
            s0 = s1 = s2 = s3 = zero
            for k in range(batch):
                g = left[r, k]
                s0 += g * right[c0, k]
                s1 += g * right[c1, k]
                s2 += g * right[c2, k]
                s3 += g * right[c3, k]
            out[j], out[j + 1], out[j + 2], out[j + 3] = s0, s1, s2, s3
        for j in range(fours, stop):
            s0 = zero
            for k in range(batch):
                s0 += left[r, k] * right[col[j], k]
            out[j] = s0

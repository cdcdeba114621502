"""Backend ``bag``: a CSR matrix times a dense one is a weighted sum of table rows.

That is what `torch.nn.functional.embedding_bag` computes, with a kernel that keeps its sums in
registers. Every row is summed by one thread in the order of its entries, so that the result does
not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute import csr

SMALL_BATCH = 16  # below it torch's CSR product is faster
CACHE = 1 << 20  # bytes; a larger table is read from memory again and again
SLAB = 64  # columns of a table that are worked on at a time, so that they stay in the cache
REUSE = 32  # products for each entry that is copied, from where the copy is paid back


def multiply(crow: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Multiply a CSR matrix by a dense one, as `csr.multiply` does."""
    batch = table.shape[1]
    if batch < SMALL_BATCH or not len(col):
        return csr.multiply(crow, col, values, table)
    copied = table.shape[0] + len(crow) - 1
    if batch <= SLAB or table.nbytes <= CACHE or len(col) < REUSE * copied:
        return _bag(crow, col, values, table)
    slabs = [_bag(crow, col, values, part.contiguous()) for part in table.split(SLAB, 1)]
    return torch.cat(slabs, 1)


def _bag(crow: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    return functional.embedding_bag(
        col, table, crow, mode="sum", per_sample_weights=values, include_last_offset=True
    )

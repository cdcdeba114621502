"""Backend ``bag-numba``: as ``bag``, with the weights' gradient by a kernel that numba compiles."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from featherweight.sparse.execute import csr

WORTH = 1 << 19  # products that pay for one more thread

DTYPES = (torch.float32, torch.float64)


def available() -> bool:
    """Tell whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def sample(crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute the entries of ``left @ right.T`` at the places of a pattern, as `csr.sample` does.

    One thread or many give the same bits: every entry is computed on its own.
    """
    if left.dtype not in DTYPES:
        return csr.sample(crow, col, left, right)
    kernel: Callable[..., None] = importlib.import_module(
        "featherweight.sparse.execute.kernels"
    ).sample
    out = left.new_empty(len(col))
    arrays = [crow.numpy(), col.numpy().view(np.uint32)]
    arrays += [left.detach().contiguous().numpy(), right.detach().contiguous().numpy()]
    threads = min(torch.get_num_threads(), 1 + len(col) * left.shape[1] // WORTH)
    pieces = _pieces(arrays[0], threads)
    spread([functools.partial(kernel, *arrays, a, b, out.numpy()) for a, b in pieces])
    return out


def _pieces(crow: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Share rows so that all threads have about as many entries."""
    if threads == 1:
        return [(0, len(crow) - 1)]
    wished = np.arange(1, threads) * (int(crow[-1]) / threads)
    edges = [0, *np.searchsorted(crow, wished).tolist(), len(crow) - 1]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def spread(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls, the first on this thread and the others on threads that are kept for them."""
    others = [_pool(len(calls) - 1).submit(call) for call in calls[1:]]
    for call in calls[:1]:
        call()
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# A forked process has the pool's record but not its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)

"""Kernels of torch's own CSR tensors, the fastest for small batches."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def multiply(crow: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Multiply a CSR matrix by a dense one.

    Args:
        crow, col, values: (R + 1,), (nnz,), (nnz,).
        table: (C, B).

    Returns:
        (R, B), contiguous.
    """
    if not len(col):
        return values.new_zeros(len(crow) - 1, table.shape[1])
    if values.dtype not in (torch.float32, torch.float64):
        return multiply(crow, col, values.float(), table.float()).to(values.dtype)
    matrix = _matrix(crow, col, values, table.shape[0])
    product: Tensor = matrix @ table
    return product.contiguous()


def sample(crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute the entries of ``left @ right.T`` at the places of a CSR pattern.

    Args:
        crow, col: (R + 1,), (nnz,).
        left, right: (R, B) and (C, B), of one dtype.

    Returns:
        (nnz,); sums of half precision are taken in float32.
    """
    if not (len(col) and left.shape[1]):
        return left.new_zeros(len(col))
    if left.dtype not in (torch.float32, torch.float64):
        return sample(crow, col, left.float(), right.float()).to(left.dtype)
    pattern = _matrix(crow, col, left.new_zeros(len(col)), right.shape[0])
    found: Tensor = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0)
    return found.values()


def _matrix(crow: Tensor, col: Tensor, values: Tensor, columns: int) -> Tensor:
    _silence()
    shape = (len(crow) - 1, columns)
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


@functools.cache
def _silence() -> None:
    """Let torch warn here, once and unheard, that CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)

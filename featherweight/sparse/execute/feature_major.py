"""A sparse linear map of feature-major activations, with its gradients.

Kernels want the batch innermost: the activations of one feature beside each other. Results are
handed on as transposed views, which elementwise functions keep, so that the next sparse layer
finds its input as it wants it and nothing is copied between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.sparse.execute import products
from featherweight.sparse.execute.pattern import SparsePattern, flat_index


def linear(
    x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None, name: str
) -> Tensor:
    """Apply a sparse weight by a backend of `products.PRODUCTS`.

    Under autocast nothing is cast down: all is computed in the dtype of the values.

    Args:
        x: (..., columns), any strides.
        values: (nnz,).
        pattern: of the weight.
        bias: (rows,) or None.
        name: of the backend.

    Returns:
        (..., rows), the last axis outermost in memory.
    """
    table = x.reshape(-1, pattern.cols).to(values.dtype).t().contiguous()
    index = (pattern.crow, pattern.col, pattern.crow_t, pattern.row_t, pattern.perm)
    y: Tensor = _Linear.apply(table, values, bias, name, *index)  # type: ignore[no-untyped-call]
    return y.t().view(*x.shape[:-1], pattern.rows)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, values: Tensor, bias: Tensor | None, name: str, *index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(table, values, *index)
        ctx.name = name
        y = products.multiply(name, index[0], index[1], values, table)
        return y if bias is None else y.add_(bias.to(y.dtype)[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, values, crow, col, crow_t, row_t, perm = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_table = of_values = of_bias = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            of_table, of_values = _differentiable(gradient, table, values, crow, col)
        else:
            gradient = gradient.contiguous()
            if wanted[0]:
                by_columns = values.index_select(0, perm)
                of_table = products.multiply(ctx.name, crow_t, row_t, by_columns, gradient)
            if wanted[1]:
                of_values = products.sample(ctx.name, crow, col, gradient, table)
        if wanted[2]:
            of_bias = gradient.sum(1)
        return of_table, of_values, of_bias, None, None, None, None, None, None


def _differentiable(
    gradient: Tensor, table: Tensor, values: Tensor, crow: Tensor, col: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gradients through the dense weight, which can be differentiated again."""
    rows, columns = gradient.shape[0], table.shape[0]
    index = flat_index(crow, col, columns)
    dense = values.new_zeros(rows * columns).scatter(0, index, values).view(rows, columns)
    return dense.t() @ gradient, (gradient @ table.t()).flatten().index_select(0, index)

"""The two products that a sparse layer is made of, by the backend that computes them.

Each backend that works on feature-major activations is a pair of functions: ``multiply`` for the
output and the input's gradient, ``sample`` for the gradient of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, library

from featherweight.sparse.execute import bag, compiled, csr


class Products(NamedTuple):
    """What a backend computes with.

    Attributes:
        multiply: of ``(crow, col, values, table)``: the CSR matrix (R, C) times the table (C, B).
        sample: of ``(crow, col, left, right)``: entries of ``left @ right.T`` at the kept places,
            (nnz,), of (R, B) and (C, B).
    """

    multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PRODUCTS: Mapping[str, Products] = {
    "csr": Products(csr.multiply, csr.sample),
    "bag": Products(bag.multiply, csr.sample),
    "bag-numba": Products(bag.multiply, compiled.sample),
}


@library.custom_op("featherweight::sparse_multiply", mutates_args=())
def traced_multiply(crow: Tensor, col: Tensor, values: Tensor, table: Tensor, name: str) -> Tensor:
    """Multiply as one operation of a traced graph."""
    return PRODUCTS[name].multiply(crow, col, values, table)


@traced_multiply.register_fake
def _(crow: Tensor, col: Tensor, values: Tensor, table: Tensor, name: str) -> Tensor:
    return table.new_empty(crow.shape[0] - 1, table.shape[1])


@library.custom_op("featherweight::sparse_sample", mutates_args=())
def traced_sample(crow: Tensor, col: Tensor, left: Tensor, right: Tensor, name: str) -> Tensor:
    """Sample as one operation of a traced graph."""
    return PRODUCTS[name].sample(crow, col, left, right)


@traced_sample.register_fake
def _(crow: Tensor, col: Tensor, left: Tensor, right: Tensor, name: str) -> Tensor:
    return left.new_empty(col.shape[0])


def multiply(name: str, crow: Tensor, col: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Multiply by a backend's function, or as one operation while torch traces."""
    if torch.compiler.is_compiling():
        product: Tensor = traced_multiply(crow, col, values, table, name)
        return product
    return PRODUCTS[name].multiply(crow, col, values, table)


def sample(name: str, crow: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sample by a backend's function, or as one operation while torch traces."""
    if torch.compiler.is_compiling():
        found: Tensor = traced_sample(crow, col, left, right, name)
        return found
    return PRODUCTS[name].sample(crow, col, left, right)

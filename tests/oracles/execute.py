"""Sparse layers written as loops over entries, and pattern updates as dictionaries."""

from itertools import product
from math import prod

import torch


def entries(mask):
    """Return (row, column) of each kept entry, by rows."""
    rows, cols = mask.shape[0], prod(mask.shape[1:])
    flat = mask.reshape(rows, cols).tolist()
    return [(r, c) for r, c in product(range(rows), range(cols)) if flat[r][c]]


def offsets(keys, size):
    """Return how many keys are smaller than 0, 1, ..., size."""
    return [sum(key < edge for key in keys) for edge in range(size + 1)]


def linear(x, values, mask, bias, out_gradient):
    """Return output, and gradients of input, values and bias, of a sparse linear layer.

    Args:
        x: (B, in); out_gradient: (B, out); float64.
    """
    batch, outputs = len(x), mask.shape[0]
    y = torch.zeros(batch, outputs, dtype=torch.float64)
    of_x, of_values = torch.zeros_like(x), torch.zeros_like(values)
    for index, (r, c) in enumerate(entries(mask)):
        for b in range(batch):
            y[b, r] += values[index] * x[b, c]
            of_x[b, c] += values[index] * out_gradient[b, r]
            of_values[index] += out_gradient[b, r] * x[b, c]
    of_bias = torch.tensor([sum(out_gradient[:, r].tolist()) for r in range(outputs)])
    return y + bias, of_x, of_values, of_bias.double()


def moved(tensor, before, after, start=None):
    """Return the tensor of an old mask's entries as that of a new mask's."""
    known = dict(zip(entries(before), tensor.tolist(), strict=True))
    fresh = [0.0] * len(entries(after)) if start is None else start.tolist()
    pairs = zip(entries(after), fresh, strict=True)
    return torch.tensor([known.get(key, new) for key, new in pairs])

"""Backend ``2:4``: two of four neighbours kept, for the sparse tensor cores of NVIDIA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute.masked import scatter
from featherweight.sparse.execute.pattern import SparsePattern


def refusal(pattern: SparsePattern, values: Tensor) -> str | None:
    """Say why a weight cannot be run as 2:4, or return None."""
    if values.device.type != "cuda":
        return f"it needs a CUDA device, the weight is on {values.device}"
    if values.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the weight is {values.dtype}"
    if pattern.cols % 4 or int(pattern.mask().view(-1, 4).sum(1).max()) > 2:
        return "the pattern keeps more than 2 of 4 neighbours in a row"
    return None


def linear(x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None) -> Tensor:
    """Apply the weight as `masked.linear` does; with gradients it is the dense weight that runs."""
    if torch.is_grad_enabled():
        return functional.linear(x, scatter(values, pattern), bias)
    flat = functional.linear(x.reshape(-1, pattern.cols), _compressed(values, pattern), bias)
    return flat.view(*x.shape[:-1], pattern.rows)


def _compressed(values: Tensor, pattern: SparsePattern) -> Tensor:
    """Compress a weight, once for each version of its values."""
    version, weight = getattr(values, "_compressed", (None, None))
    if weight is None or version != values._version:
        weight = torch.sparse.to_sparse_semi_structured(scatter(values, pattern))
        values._compressed = (values._version, weight)  # type: ignore[attr-defined]
    return weight

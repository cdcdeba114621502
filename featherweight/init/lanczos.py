"""The largest eigenvalue of a matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> float:
    """Find the largest eigenvalue of a symmetric matrix, from below, by its products.

    Args:
        product: vector [N] to matrix times vector.
        start: [N].
        iterations: most products to spend.
        tolerance: relative residual to stop at.

    Source: Lanczos 1950, with all vectors kept orthogonal.
    """
    basis = start[None] / start.norm()
    images = torch.empty(0, len(start), dtype=start.dtype, device=start.device)
    value = 0.0
    for _ in range(min(iterations, len(start))):
        images = torch.cat([images, product(basis[-1])[None]])
        small = basis @ images.mT
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        value = float(values[-1])
        residual = vectors[:, -1] @ images - value * (vectors[:, -1] @ basis)
        following = images[-1]
        for _ in range(2):  # once more against the rounding of the first time
            following = following - (following @ basis.mT) @ basis
        length = following.norm()
        if residual.norm() <= tolerance * abs(value) or length <= tolerance * abs(value):
            break
        basis = torch.cat([basis, following[None] / length])
    return max(value, 0.0)

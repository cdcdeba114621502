"""Optimal brain quantisation, column by column, by explicit inverses; rounding by trying all."""

import torch


def brute_force_nearest(weight, scale, zero, top):
    """Return the code in 0..top whose grid point is nearest to each weight, by trying all."""
    codes = torch.arange(top + 1, dtype=torch.float64)
    points = scale.double()[:, None, None] * (codes - zero.double()[:, None, None])
    return (weight.double()[..., None] - points).abs().argmin(-1)


def least_squares_obq(weight, hessian, grid_point, damping):
    """Quantise columns from left to right; after each, solve anew for the best remaining weights.

    ``grid_point(c, column)`` rounds the current values of column c.
    """
    columns = len(hessian)
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(
        columns, dtype=torch.float64
    )
    original, current = weight.double(), weight.double().clone()
    for c in range(columns):
        current[:, c] = grid_point(c, current[:, c])
        if c + 1 == columns:
            break
        # argmin over the free columns F of (w' - w) H (w' - w)^T with the fixed ones given
        fixed, free = slice(0, c + 1), slice(c + 1, columns)
        shift = (current[:, fixed] - original[:, fixed]) @ damped[fixed, free]
        current[:, free] = original[:, free] - shift @ torch.linalg.inv(damped[free, free])
    return current

"""Newton's method for small, strictly convex problems."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def minimise(
    point: Tensor,
    objective: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    tolerance: float,
    steps: int,
) -> Tensor:
    """Minimise a strictly convex function by Newton steps, halved until they descend enough.

    Args:
        point: where to start, shape (d,).
        objective: point to value.
        gradient: point to gradient.
        hessian: point to second derivatives, shape (d, d).
        tolerance: of the largest entry of the gradient.
        steps: most steps to take.

    Raises:
        RuntimeError: the tolerance is not reached.
    """
    for _ in range(steps):
        slope = gradient(point)
        if slope.abs().max() <= tolerance:
            return point
        direction = torch.linalg.solve(hessian(point), slope)
        value, descent, length = objective(point), slope @ direction, 1.0
        # Near the minimum the decrease is below rounding: there the full step is right.
        slack = 1e-14 * value.abs()
        while not objective(point - length * direction) <= value - 1e-4 * length * descent + slack:
            length /= 2
            if length < 1e-16:
                break
        point = point - length * direction
    slope = gradient(point)
    if slope.abs().max() <= tolerance:
        return point
    raise RuntimeError(f"after {steps} Newton steps the residual is {slope.abs().max():.1e}")

"""Fourth powers minimised by Jacobi sweeps: the best angle of two columns in closed form."""

import math

import torch


def best_angle(x, y):
    """Return theta minimising ``sum (x cos + y sin)^4 + (y cos - x sin)^4``."""
    cosine = 0.25 * torch.sum(x**4 + y**4 - 6 * x**2 * y**2).item()
    sine = torch.sum(x * y * (x**2 - y**2)).item()
    return math.atan2(-sine, -cosine) / 4


def sweep(rows):
    """Turn every pair of columns of ``[m, n]`` by its best angle; the objective never rises."""
    rows = rows.clone()
    for i in range(rows.shape[1]):
        for j in range(i + 1, rows.shape[1]):
            x, y = rows[:, i].clone(), rows[:, j].clone()
            theta = best_angle(x, y)
            rows[:, i] = x * math.cos(theta) + y * math.sin(theta)
            rows[:, j] = y * math.cos(theta) - x * math.sin(theta)
    return rows

"""Descent over orthogonal matrices by the Cayley transform, for one matrix or a batch.

A step follows the skew part S of the gradient: ``X <- (I + t/2 S)^-1 (I - t/2 S) X``, which stays
orthogonal for every t (Wen and Yin 2013; Li et al. 2020, arXiv:2002.01113). What remains to choose
is t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from featherweight.common import Generator

_POLAR_EVERY = 100  # steps between re-orthogonalisations
_POWER_ITERATIONS = 6


class StepRule(Protocol):
    """How far a step goes along S, and how much of the last direction it keeps."""

    @property
    def momentum(self) -> float:
        """Share of the last direction that is kept, in [0, 1)."""

    def size(self, skew: Tensor, step: int, steps: int, generator: Generator) -> Tensor:
        """Return t, ``[...]``, for skew matrices ``[..., n, n]``."""


@dataclass(frozen=True)
class Angle:
    """Turn by a given angle: ``t = theta_s / sigma_max(S)``, theta on half a cosine down to 0.

    Attributes:
        theta: largest rotation of the first step, in radians.
        momentum: share of the last direction that is kept, in [0, 1); 0 for none.
    """

    theta: float = 0.3
    momentum: float = 0.5

    def __post_init__(self) -> None:
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise ValueError(f"theta must be positive and finite, got {self.theta}")
        _check_momentum(self.momentum)

    def size(self, skew: Tensor, step: int, steps: int, generator: Generator) -> Tensor:
        """Return t so that no vector turns by more than the angle of this step."""
        theta = self.theta * 0.5 * (1 + math.cos(math.pi * step / steps))
        return theta / spectral_norm(skew, generator).clamp_min(1e-30)


@dataclass(frozen=True)
class Clipped:
    """The rule of SpinQuant's code: ``t = min(lr, 1 / ||S||_1)``.

    With gradients as large as those of a sum of fourth powers the second term always wins: the
    learning rate then does nothing.

    Attributes:
        lr: learning rate.
        momentum: as in :class:`Angle`.
    """

    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        _check_momentum(self.momentum)

    def size(self, skew: Tensor, step: int, steps: int, generator: Generator) -> Tensor:
        """Return the clipped learning rate; 1-norm is the largest column sum of ``|S|``."""
        return (1 / (skew.abs().sum(-2).amax(-1) + 1e-8)).clamp_max(self.lr)


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")


def skew_direction(gradient: Tensor, rotation: Tensor) -> Tensor:
    """Return ``S = (G X^T - X G^T) / 2``, along which ``d/dt f(exp(-tS) X) = -||S||_F^2`` at 0."""
    product = gradient @ rotation.mT
    return (product - product.mT) / 2


def cayley_step(rotation: Tensor, skew: Tensor, size: Tensor) -> Tensor:
    """Return ``(I + t/2 S)^-1 (I - t/2 S) X`` by an exact solve.

    Args:
        rotation: X, ``[..., n, n]``, orthogonal.
        skew: S, ``[..., n, n]``.
        size: t, ``[...]``.
    """
    half = skew * (size / 2)[..., None, None]
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    moved: Tensor = torch.linalg.solve(identity + half, rotation - half @ rotation)
    return moved


def spectral_norm(skew: Tensor, generator: Generator) -> Tensor:
    """Estimate the largest singular value of ``[..., n, n]`` from below, by power iteration."""
    vector = torch.randn(*skew.shape[:-1], 1, generator=generator).to(skew)
    for _ in range(_POWER_ITERATIONS):
        vector = skew @ torch.nn.functional.normalize(vector, dim=-2)
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return norm


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix of one that nearly is, by Newton-Schulz in float64."""
    out = matrix.double()
    for _ in range(4):
        out = 1.5 * out - 0.5 * out @ (out.mT @ out)
    return out.to(matrix.dtype)


Gradient = Callable[[Tensor], tuple[float, Tensor]]
"""Value and gradient of an objective at X, maybe estimated on a sample."""


def descend(
    gradient: Gradient,
    start: Tensor,
    *,
    steps: int,
    rule: StepRule,
    generator: Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Minimise over orthogonal matrices.

    Args:
        gradient: gives value and gradient at X.
        start: X, ``[..., n, n]``, orthogonal, in the dtype to work in.
        steps: how many.
        rule: of the step size and momentum.
        generator: for the power iteration's start.
        on_step: called with the step and the objective's value before it.

    Returns:
        X after the last step, orthogonal to the dtype's rounding.
    """
    rotation, velocity = start, torch.zeros_like(start)
    for step in range(steps):
        value, slope = gradient(rotation)
        if on_step is not None:
            on_step(step, value)
        skew = skew_direction(rule.momentum * velocity + slope, rotation)
        size = rule.size(skew, step, steps, generator)
        velocity = skew @ rotation
        rotation = cayley_step(rotation, skew, size)
        if (step + 1) % _POLAR_EVERY == 0:
            rotation = polar(rotation)
    return polar(rotation)

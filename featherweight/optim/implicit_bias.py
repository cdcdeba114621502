"""Where HAM's training ends: its potential, and the limits of linear regression in closed form.

With plain gradient descent as the base step and η → 0, HAM follows
``dθ = -(1 + α|θ|) ∇f dt - β θ dt``. For β = 0 that is mirror descent with the potential
``R(θ) = Σ [(1 + α|θ|) ln(1 + α|θ|) - α|θ|] / α²``, between ``½‖θ‖²`` (α → 0) and, scaled, ``‖θ‖₁``
(α → ∞).

Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630,
Theorems 4.2 and 4.6 (flow, mirror form). The potential in this form, its conjugate, and the
penalty that β amounts to were derived for this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from featherweight.optim.newton import minimise

SERIES_BELOW = 1e-3  # of α|θ|: there the closed form loses digits, and a series is exact


def potential(theta: Tensor, alpha: float) -> Tensor:
    """Return HAM's potential R of a vector, a scalar tensor.

    Args:
        theta: any shape.
        alpha: HAM's; 0 gives half the squared norm.

    Raises:
        ValueError: alpha is negative.
    """
    _at_least_zero(alpha=alpha)
    size = theta.abs()
    scaled = alpha * size
    # Of the series of R/θ² in α|θ|, as many terms as double precision sees below the bound.
    series = size**2 * (0.5 - scaled / 6 + scaled**2 / 12 - scaled**3 / 20 + scaled**4 / 30)
    if alpha == 0:
        return series.sum()
    exact = ((1 + scaled) * scaled.log1p() - scaled) / alpha**2
    return torch.where(scaled < SERIES_BELOW, series, exact).sum()


def mirror(theta: Tensor, alpha: float) -> Tensor:
    """Return the gradient of the potential, ``sign(θ) ln(1 + α|θ|) / α``.

    Along HAM's flow with β = 0 it moves by minus the integral of the loss's gradient.

    Args:
        theta: any shape.
        alpha: HAM's; 0 gives theta itself.

    Raises:
        ValueError: alpha is negative.
    """
    _at_least_zero(alpha=alpha)
    if alpha == 0:
        return theta.clone()
    return theta.sign() * (alpha * theta.abs()).log1p() / alpha


def inverse_mirror(dual: Tensor, alpha: float) -> Tensor:
    """Return the point of which ``dual`` is the `mirror`: ``sign(p) (exp(α|p|) - 1) / α``.

    Args:
        dual: any shape.
        alpha: HAM's; 0 gives dual itself.

    Raises:
        ValueError: alpha is negative.
    """
    _at_least_zero(alpha=alpha)
    if alpha == 0:
        return dual.clone()
    return dual.sign() * (alpha * dual.abs()).expm1() / alpha


def bregman(theta: Tensor, start: Tensor, alpha: float) -> Tensor:
    """Return the Bregman divergence of the potential, ``R(θ) - R(θ₀) - ⟨∇R(θ₀), θ - θ₀⟩``.

    HAM's flow with β = 0 on underdetermined linear regression ends in the solution that minimises
    it.

    Args:
        theta: any shape.
        start: of the same shape.
        alpha: HAM's; 0 gives half the squared distance.

    Raises:
        ValueError: alpha is negative.
    """
    slope = (mirror(start, alpha) * (theta - start)).sum()
    return potential(theta, alpha) - potential(start, alpha) - slope


def fair_penalty(theta: Tensor, alpha: float) -> Tensor:
    """Return what β penalises, ``Σ [|θ|/α - ln(1 + α|θ|)/α²]``, the robust loss called Fair.

    HAM with β > 0 on a convex loss f minimises ``f + β`` times this, from wherever it starts. It
    is ``½θ²`` for small ``α|θ|`` and ``|θ|/α`` for large; its slope never exceeds ``1/α``.

    Args:
        theta: any shape.
        alpha: HAM's; 0 gives half the squared norm: plain weight decay.

    Raises:
        ValueError: alpha is negative.
    """
    _at_least_zero(alpha=alpha)
    size = theta.abs()
    scaled = alpha * size
    series = size**2 * (0.5 - scaled / 3 + scaled**2 / 4 - scaled**3 / 5 + scaled**4 / 6)
    if alpha == 0:
        return series.sum()
    exact = (scaled - scaled.log1p()) / alpha**2
    return torch.where(scaled < SERIES_BELOW, series, exact).sum()


def closed_form(
    features: Tensor,
    targets: Tensor,
    alpha: float,
    start: Tensor | None = None,
    tolerance: float = 1e-12,
    steps: int = 500,
) -> Tensor:
    """Return the limit of HAM's flow with β = 0 on underdetermined linear regression.

    The solution of ``Zθ = y`` nearest to the start in the `bregman` divergence, found by a damped
    Newton method on the dual problem, which has one unknown a row of Z.

    Args:
        features: Z, shape (n, d) with n <= d and independent rows; use float64.
        targets: y, shape (n,).
        alpha: HAM's; 0 gives the nearest solution. With heavy-ball momentum mu as the base step,
            the limit is that of ``alpha (1 - mu)``.
        start: θ₀, shape (d,); None: zero.
        tolerance: of ``|Zθ - y|``, relative to the larger of 1 and ``|y|``.
        steps: most Newton steps to take.

    Returns:
        θ of shape (d,).

    Raises:
        ValueError: shapes do not fit or alpha is negative.
        RuntimeError: the tolerance is not reached.
    """
    _at_least_zero(alpha=alpha)
    _check_regression(features, targets)
    if features.shape[0] > features.shape[1]:
        raise ValueError(f"features must have no more rows than columns: {tuple(features.shape)}")
    origin = torch.zeros_like(features[0]) if start is None else start
    dual_origin = mirror(origin, alpha)

    def residual(dual: Tensor) -> Tensor:
        return features @ inverse_mirror(dual_origin + features.T @ dual, alpha) - targets

    def hessian(dual: Tensor) -> Tensor:
        slopes = (alpha * (dual_origin + features.T @ dual).abs()).exp()
        return (features * slopes) @ features.T

    def objective(dual: Tensor) -> Tensor:
        return _conjugate(dual_origin + features.T @ dual, alpha) - dual @ targets

    scale = tolerance * max(1.0, float(targets.abs().max()))
    dual = minimise(torch.zeros_like(targets), objective, residual, hessian, scale, steps)
    return inverse_mirror(dual_origin + features.T @ dual, alpha)


def penalised_form(
    features: Tensor,
    targets: Tensor,
    alpha: float,
    beta: float,
    tolerance: float = 1e-10,
    steps: int = 500,
) -> Tensor:
    """Return the limit of HAM's flow with β > 0 on linear regression, from any start.

    Minimises ``½|Zθ - y|²`` plus β times the `fair_penalty` by a damped Newton method.

    Args:
        features: Z, shape (n, d); use float64.
        targets: y, shape (n,).
        alpha: HAM's; 0 gives ridge regression.
        beta: HAM's, above 0.
        tolerance: of the largest entry of the gradient.
        steps: most Newton steps to take.

    Returns:
        θ of shape (d,).

    Raises:
        ValueError: shapes do not fit, alpha is negative or beta not above 0.
        RuntimeError: the tolerance is not reached.
    """
    _at_least_zero(alpha=alpha)
    _check_regression(features, targets)
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}; for 0 see closed_form")

    def objective(theta: Tensor) -> Tensor:
        error = features @ theta - targets
        return error @ error / 2 + beta * fair_penalty(theta, alpha)

    def gradient(theta: Tensor) -> Tensor:
        pull = beta * theta / (1 + alpha * theta.abs())
        return features.T @ (features @ theta - targets) + pull

    def hessian(theta: Tensor) -> Tensor:
        return features.T @ features + torch.diag(beta / (1 + alpha * theta.abs()) ** 2)

    start = torch.zeros_like(features[0])
    return minimise(start, objective, gradient, hessian, tolerance, steps)


def trajectory(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    lr: float,
    alpha: float,
    beta: float = 0.0,
    momentum: float = 0.0,
    sign_at: str = "half",
) -> Iterator[Tensor]:
    """Walk HAM's path on any function, without an optimizer and without a clamp.

    Args:
        gradient: point to gradient.
        start: the point to start from, any shape.
        lr: learning rate η.
        alpha: HAM's.
        beta: HAM's.
        momentum: heavy-ball momentum of the base step.
        sign_at: "half", the sign after the base step (HYP*, as deployed), or "full", the sign
            before it (HYP, as the paper writes it first). Both have the same flow.

    Yields:
        The point after each step, without end.

    Raises:
        ValueError: an argument is out of range.
    """
    _at_least_zero(lr=lr, alpha=alpha, beta=beta, momentum=momentum)
    if sign_at not in ("half", "full"):
        raise ValueError(f"sign_at must be 'half' or 'full', got {sign_at!r}")
    return _walk(gradient, start, lr, alpha, beta, momentum, sign_at == "half")


def _walk(
    gradient: Callable[[Tensor], Tensor],
    theta: Tensor,
    lr: float,
    alpha: float,
    beta: float,
    momentum: float,
    at_half: bool,
) -> Iterator[Tensor]:
    velocity = torch.zeros_like(theta)
    while True:
        slope = gradient(theta)
        velocity = momentum * velocity + slope
        half = theta - lr * velocity
        sign = (half if at_half else theta).sign()
        theta = half * (-lr * (alpha * sign * slope + beta)).exp()
        yield theta


def _conjugate(dual: Tensor, alpha: float) -> Tensor:
    """Return the convex conjugate of the potential; its gradient is `inverse_mirror`."""
    size = dual.abs()
    scaled = alpha * size
    series = size**2 * (0.5 + scaled / 6 + scaled**2 / 24 + scaled**3 / 120 + scaled**4 / 720)
    if alpha == 0:
        return series.sum()
    exact = (scaled.expm1() - scaled) / alpha**2
    return torch.where(scaled < SERIES_BELOW, series, exact).sum()


def _check_regression(features: Tensor, targets: Tensor) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise ValueError(
            "features must have shape (n, d) and targets (n,), got "
            f"{tuple(features.shape)} and {tuple(targets.shape)}"
        )


def _at_least_zero(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")

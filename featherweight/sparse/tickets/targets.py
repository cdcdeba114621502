"""Small networks that solve a problem by construction: tickets to plant and to look for.

Source: J. Fischer and R. Burkholz, ICLR 2022, arXiv:2111.11153. All are float64, of Linear and ReLU
in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def relu_chain(depth: int = 2) -> nn.Sequential:
    """Return ``relu(x)`` as a chain of single neurons, of ``depth`` >= 2 linear layers."""
    _check_depth(depth, 2)
    one, zero = torch.ones(1, 1).double(), torch.zeros(1).double()
    return _network([(one, zero)] * depth)


def piecewise_linear(
    function: Callable[[Tensor], Tensor], knots: Tensor, depth: int = 2
) -> nn.Sequential:
    """Return the network that interpolates a function of one variable linearly between knots.

    It has one hidden neuron ``relu(p_k (x - s_k))`` a knot, of alternating direction p_k, and is
    exact at the knots. Beyond the last one it goes on towards one more knot at the same distance.

    Args:
        function: x (K,) to values (K,) or, for m outputs, (K, m).
        knots: (K,), K >= 2, strictly increasing.
        depth: linear layers, at least 2; more put identities in front, which hold for inputs from
            the first knot on.

    Raises:
        ValueError: a bad argument.
    """
    _check_depth(depth, 2)
    directions, slopes, bias = _interpolation(function, knots)
    knots = knots.double()
    hidden = (directions[:, None], -directions * knots)
    return _network(_deepened([hidden, (slopes.T, bias)], float(knots[0]), depth))


def circle(
    knots: int = 10, bounds: Sequence[float] = (0.2, 0.5, 0.7), depth: int = 3
) -> nn.Sequential:
    """Return scores of rings in the plane: class j has ``x^2 + y^2`` between bounds j - 1 and j.

    The squares are interpolated on [-1, 1]; class j scores ``a_j r^2 + c_j`` with ``a_j = 5 2^j``
    and c_j such that neighbours are equal at their bound.

    Args:
        knots: of each square, at least 2.
        bounds: of the rings, in rising order; there is one class more.
        depth: linear layers, at least 3.

    Raises:
        ValueError: a bad argument.
    """
    _check_depth(depth, 3)
    if list(bounds) != sorted(set(bounds)):
        raise ValueError(f"bounds must be strictly increasing, got {list(bounds)}")
    places = _grid(knots)
    directions, slopes, bias = _interpolation(torch.square, places)
    hidden = torch.block_diag(directions[:, None], directions[:, None])
    shifts = (-directions * places).repeat(2)
    rise = 5 * 2.0 ** torch.arange(len(bounds) + 1).double()
    steps = (rise[:-1] - rise[1:]) * torch.tensor(bounds, dtype=torch.float64)
    scores = (rise[:, None], torch.cat([torch.zeros(1), steps]).double().cumsum(0))
    parts = [(hidden, shifts), (slopes.T.repeat(1, 2), 2 * bias), scores]
    return _network(_deepened(parts, -1.0, depth))


def helix(knots: int = 30, depth: int = 2) -> nn.Sequential:
    """Return a curve in space, ``(y cos y, y sin y, y) / (8 pi)`` at ``y = pi (5 + 3 x)``.

    Args:
        knots: on [-1, 1], at least 2.
        depth: linear layers, at least 2.
    """

    def curve(x: Tensor) -> Tensor:
        y = math.pi * (5 + 3 * x)
        return torch.stack([y * y.cos(), y * y.sin(), y], 1) / (8 * math.pi)

    return piecewise_linear(curve, _grid(knots), depth)


Affine = tuple[Tensor, Tensor]


def _interpolation(
    function: Callable[[Tensor], Tensor], knots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return directions (K,), out weights (K, m) and out bias (m,)."""
    if knots.dim() != 1 or len(knots) < 2 or not (knots.diff() > 0).all():
        raise ValueError(f"knots must be two or more in strictly rising order, got {knots}")
    s = knots.double()
    ends = torch.cat([s, 2 * s[-1:] - s[-2:-1]])
    values = function(ends).double().reshape(len(ends), -1)
    slopes = values.diff(dim=0) / ends.diff()[:, None]
    directions = 1 - 2 * (torch.arange(len(s)) % 2).double()
    weights = torch.cat([slopes[:1], slopes.diff(dim=0)])
    # Left of its knot a neuron that looks left has slope -1, which the first neuron makes up for.
    weights[0] += weights[directions < 0].sum(0)
    bias = values[0] - (directions * (s[0] - s)).relu() @ weights
    return directions, weights, bias


def _deepened(parts: list[Affine], lower: float, depth: int) -> list[Affine]:
    """Put identities on ``x - lower >= 0`` in front until there are ``depth`` layers."""
    inputs = parts[0][0].shape[1]
    eye, zero = torch.eye(inputs).double(), torch.zeros(inputs).double()
    extra = depth - len(parts)
    if not extra:
        return parts
    weight, bias = parts[0]
    parts = [(weight, bias + lower * weight.sum(1)), *parts[1:]]
    return [(eye, zero - lower), *[(eye, zero)] * (extra - 1), *parts]


@torch.no_grad()
def _network(parts: Sequence[Affine]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for weight, bias in parts:
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _grid(knots: int) -> Tensor:
    if knots < 2:
        raise ValueError(f"knots must be at least 2, got {knots}")
    return torch.linspace(-1, 1, knots, dtype=torch.float64)


def _check_depth(depth: int, least: int) -> None:
    if depth < least:
        raise ValueError(f"depth must be at least {least}, got {depth}")

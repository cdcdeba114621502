"""The single hidden neuron laboratory: why learning rate rewinding finds what IMP cannot.

A student ``f(x) = a relu(w . x)`` learns ``y = relu(x_1) + noise`` from ``n`` inputs uniform in
``[-1, 1]^d`` by full-batch descent on ``L = (1 / 2n) sum_i (f(x_i) - y_i)^2``. With the residual
``r_i = f(x_i) - y_i`` everything follows from one vector, the pull::

    v = (1/n) sum_i r_i [w . x_i > 0] x_i        dL/da = w . v        dL/dw = a v

so gradient flow conserves ``a^2 - |w|^2``. From a balanced start, ``a(0)^2 = |w(0)|^2``, the sign
of ``a`` never changes, that of ``w_1`` can, as long as other inputs lead it around zero. Pruned to
one input it cannot. IMP restarts the pruned neuron from its first weights, so it needs
``a(0) > 0`` and ``w_1(0) > 0``; learning rate rewinding (LRR) goes on from the trained ones and
needs ``a(0) > 0`` alone. Shapes: S seeds, Q starts a seed, n samples, d inputs; "..." is S or none.

Source: A. Gadhikar and R. Burkholz, "Masks, Signs, And Learning Rate Rewinding", ICLR 2024,
arXiv:2402.19262. The closed form and the general success rule are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featherweight.common import Generator, as_generator, unknown

Method = Literal["imp", "lrr"]
METHODS: tuple[Method, ...] = ("imp", "lrr")
COLUMNS = ("dense", *METHODS)
QUADRANTS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


class Data(NamedTuple):
    """Training samples: inputs ``x`` (..., n, d) and labels ``y`` (..., n)."""

    x: Tensor
    y: Tensor


class Neuron(NamedTuple):
    """Students: outer weights ``a`` (..., Q) and inner weights ``w`` (..., Q, d)."""

    a: Tensor
    w: Tensor


def sample(seeds: int, samples: int, inputs: int, *, noise: float, generator: Generator) -> Data:
    """Draw a float64 training set a seed: ``x ~ U[-1, 1]^d``, ``y = relu(x_1) + noise N(0, 1)``."""
    x = 2 * torch.rand(seeds, samples, inputs, generator=generator, dtype=torch.float64) - 1
    errors = torch.randn(seeds, samples, generator=generator, dtype=torch.float64)
    return Data(x, x[..., 0].relu() + noise * errors)


def balanced_starts(seeds: int, inputs: int, *, generator: Generator) -> Neuron:
    """Draw balanced starts, ``w_i ~ N(0, 1/d)`` and ``a = ±|w|``, four for each seed.

    The four share their magnitudes and differ only in the signs of ``a`` and ``w_1``, in the order
    of ``QUADRANTS``: ``a`` has the shape (S, 4), ``w`` the shape (S, 4, d), float64.
    """
    draws = torch.randn(seeds, 1, inputs, generator=generator, dtype=torch.float64)
    signs = torch.tensor(QUADRANTS, dtype=torch.float64)
    w = (draws / math.sqrt(inputs)).repeat(1, len(QUADRANTS), 1)
    w[..., 0] = w[..., 0].abs() * signs[:, 1]
    return Neuron(signs[:, 0] * w.norm(dim=-1), w)


def pull(neuron: Neuron, data: Data, mask: Tensor | None = None) -> Tensor:
    """Return ``v = (1/n) sum_i r_i [w . x_i > 0] x_i``, shape (..., Q, d), zero outside the mask.

    The mask, bool of that shape, says which inner weights exist, None all; ``w`` is 0 elsewhere.
    """
    drive = neuron.w @ data.x.mT
    residual = neuron.a.unsqueeze(-1) * drive.relu() - data.y.unsqueeze(-2)
    v = (residual * (drive > 0)) @ data.x / data.x.shape[-2]
    return v if mask is None else v * mask


def conserved(neuron: Neuron) -> Tensor:
    """Return ``a^2 - |w|^2``; a descent step of rate h adds exactly ``h^2 (g_a^2 - |g_w|^2)``."""
    return neuron.a.square() - neuron.w.square().sum(dim=-1)


def descend(
    neuron: Neuron, data: Data, mask: Tensor | None = None, *, learning_rate: float, steps: int
) -> Neuron:
    """Run full-batch gradient descent, which is Euler's method on the flow; returns new neurons."""
    a, w = neuron
    for _ in range(steps):
        v = pull(Neuron(a, w), data, mask)
        a, w = a - learning_rate * (w * v).sum(dim=-1), w - learning_rate * a.unsqueeze(-1) * v
    return Neuron(a, w)


def flow(
    neuron: Neuron, data: Data, mask: Tensor | None = None, *, step: float, steps: int
) -> Neuron:
    """Follow gradient flow for the time ``step * steps``, conserving ``a^2 - |w|^2``.

    For a fixed pull the flow ``a' = -w . v, w' = -a v`` is a hyperbolic rotation of ``a`` with the
    part of ``w`` along ``v``. Each step rotates by the pull found in its middle: second order in
    the step, and the law holds to rounding at any step.
    """
    for _ in range(steps):
        middle = _rotate(neuron, pull(neuron, data, mask), step / 2)
        neuron = _rotate(neuron, pull(middle, data, mask), step)
    return neuron


def _rotate(neuron: Neuron, v: Tensor, time: float) -> Neuron:
    a, w = neuron
    speed = v.norm(dim=-1)
    direction = v / speed.clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(-1)
    along = (w * direction).sum(dim=-1)
    # Written alike for both, so that a = -w with one input stays so to the last bit.
    growth, sinh = torch.cosh(time * speed) - 1, torch.sinh(time * speed)
    shift = along * growth - a * sinh
    return Neuron(a + (a * growth - along * sinh), w + shift.unsqueeze(-1) * direction)


def half_line_moments(data: Data, sign: int) -> tuple[Tensor, Tensor]:
    """Return ``(1/n) sum x^2`` and ``(1/n) sum x y`` over samples with ``sign * x > 0``, one input.

    They are C1, C2 for sign 1 and D1, D2 for sign -1, all that a ``w`` of that sign sees;
    noise-free, D2 is 0. The data has ``x`` of shape (..., n, 1); the results have (...).
    """
    x = data.x[..., 0] * (sign * data.x[..., 0] > 0)
    return x.square().mean(dim=-1), (x * data.y).mean(dim=-1)


def balanced_product(start: float, time: Tensor, square: float, cross: float) -> Tensor:
    """Return ``u(t) = a(t) w(t)`` of a balanced one-input neuron along gradient flow, exactly.

    In balance ``a^2 = w^2 = |u|``, so ``u' = 2 |u| (C2 - C1 u)`` and ``u`` keeps its sign. With
    ``p = |u|`` and ``c = sign(u0) C2`` this is a logistic law, whose solution is::

        p(t) = p0 / (e^{-2ct} + C1 p0 (1 - e^{-2ct}) / c)        p0 / (1 + 2 C1 p0 t) for c = 0

    ``a, w > 0``: ``u -> C2 / C1``, the least squares slope on x > 0. ``w < 0``, noise-free: D2 = 0,
    algebraic decay. ``a < 0 < w``: exponential decay into the saddle (see `one_input_success`).

    Args:
        start: ``u0 = a(0) w(0)``.
        time: any shape.
        square: C1 if ``w(0) > 0``, else D1 (see `half_line_moments`).
        cross: C2, else D2.
    """
    rate = math.copysign(1.0, start) * cross
    growth = -torch.expm1(-2 * rate * time) / rate if rate else 2 * time
    return start / (torch.exp(-2 * rate * time) + square * abs(start) * growth)


def one_input_success(a: Tensor, w: Tensor) -> Tensor:
    """Tell which noise-free one-input starts reach the target along gradient flow, as bool.

    Balanced or not: ``w > 0``, and ``a > 0`` or ``w^2 > a^2``, as the conserved ``a^2 - w^2`` says
    which of the two meets zero first. ``a = -w < 0`` ends on the saddle, a failure.
    """
    return (w > 0) & ((a > 0) | (w.square() > a.square()))


def recovered(neuron: Neuron, tolerance: float = 0.1) -> Tensor:
    """Tell which students became the target: ``a > 0``, ``max |a w - e_1| <= tolerance``; (..., Q).

    For ``a > 0`` the student is ``relu((a w) . x)``, so this judges the function itself, which
    label noise does not blur.
    """
    product = neuron.a.unsqueeze(-1) * neuron.w
    product[..., 0] -= 1
    return (neuron.a > 0) & (product.abs().amax(dim=-1) <= tolerance)


def magnitude_mask(w: Tensor, kept: int) -> Tensor:
    """Return a bool mask of the ``kept`` largest ``|w|`` of each neuron; ties go to the first."""
    order = w.abs().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(w, dtype=torch.bool).scatter(-1, order[..., :kept], True)


def prune_iteratively(
    start: Neuron,
    dense: Neuron,
    *,
    method: Method,
    kept: Sequence[int],
    train: Callable[[Neuron, Tensor], Neuron],
) -> Neuron:
    """Prune trained neurons by magnitude, level by level, and train at each level.

    Args:
        start: the weights that the neurons began with.
        dense: the trained neurons.
        method: "imp" restarts from ``start`` at each level, "lrr" goes on from what it has.
        kept: inner weights left at each level, strictly decreasing.
        train: called with the masked neurons and the mask, (..., Q, d); returns trained neurons.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    inputs = dense.w.shape[-1]
    if list(kept) != sorted(set(kept) & set(range(1, inputs + 1)), reverse=True):
        raise ValueError(f"kept must decrease strictly within [1, {inputs}], got {tuple(kept)}")
    neuron = dense
    for count in kept:
        mask = magnitude_mask(neuron.w, count)
        a, w = start if method == "imp" else neuron
        neuron = train(Neuron(a, w * mask), mask)
    return neuron


@dataclass(frozen=True)
class QuadrantTable:
    """Successes out of ``seeds``, a row for each of QUADRANTS, a column for each of COLUMNS."""

    successes: tuple[tuple[int, ...], ...]
    seeds: int

    def rate(self, sign_a: int, sign_w: int, column: str) -> float:
        """Return one cell's success rate, in [0, 1]."""
        if (sign_a, sign_w) not in QUADRANTS or column not in COLUMNS:
            raise ValueError(f"no cell {(sign_a, sign_w, column)}: signs are ±1, columns {COLUMNS}")
        row = self.successes[QUADRANTS.index((sign_a, sign_w))]
        return row[COLUMNS.index(column)] / self.seeds

    def overall(self, column: str) -> float:
        """Return the success rate over the four quadrants, which are equally likely."""
        return sum(self.rate(a, w, column) for a, w in QUADRANTS) / len(QUADRANTS)

    def __str__(self) -> str:
        lines = ["sign a0, w1 " + "".join(f"{name:>8}" for name in COLUMNS)]
        for a, w in QUADRANTS:
            cells = (f"{self.rate(a, w, name):8.2f}" for name in COLUMNS)
            lines.append(f"     {a:+d}, {w:+d} " + "".join(cells))
        return "\n".join([*lines, f"{self.seeds} seeds in each cell"])


def quadrant_table(
    *,
    seed: int,
    inputs: int = 10,
    samples: int = 100,
    noise: float = 0.0,
    learning_rate: float = 0.2,
    steps: int = 1500,
    seeds: int = 200,
    kept: Sequence[int] = (3, 1),
) -> QuadrantTable:
    """Train, prune and count the successes of dense, IMP and LRR from each quadrant of signs.

    All seeds run as one batch. Each has its own data and magnitudes, shared by its four quadrants.
    Noise-free, theory says 1 1 0 0 for dense and LRR, 1 0 0 0 for IMP, in the order of QUADRANTS.

    Args:
        seed: of all draws.
        inputs: dimension d.
        samples: training samples n for each seed.
        noise: of the labels. Half of all draws have D2 > 0, which carries ``w_1`` through zero, so
            that IMP succeeds from (+,-) in about half of the seeds.
        learning_rate: of gradient descent.
        steps: at each level, the dense one included.
        seeds: starts in each quadrant.
        kept: inner weights left at each pruning level, strictly decreasing.
    """
    if min(inputs, samples, seeds) < 1:
        raise ValueError(f"{inputs=}, {samples=} and {seeds=} must be at least 1")
    generator = as_generator(seed)
    data = sample(seeds, samples, inputs, noise=noise, generator=generator)
    start = balanced_starts(seeds, inputs, generator=generator)

    def train(neuron: Neuron, mask: Tensor | None = None) -> Neuron:
        return descend(neuron, data, mask, learning_rate=learning_rate, steps=steps)

    ends = [dense := train(start)]
    for method in METHODS:
        ends.append(prune_iteratively(start, dense, method=method, kept=kept, train=train))
    counts = torch.stack([recovered(end).sum(dim=0) for end in ends], dim=1)
    return QuadrantTable(tuple(tuple(row) for row in counts.tolist()), seeds)

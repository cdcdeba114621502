"""The Sign-In toy: which signs of a one-neuron student descent on factors can learn from.

A student ``a relu(w x)`` learns ``relu(x)``, x uniform in [-1, 1], and both weights are products of
two factors, with betas ``(beta_a, beta_w)`` (see `featherweight.sparse.reparam.sign_in`). With the
pull ``v`` (:func:`pull`), gradient flow of the factors is::

    a' = -sqrt(4 a^2 + beta_a^2) w v        w' = -sqrt(4 w^2 + beta_w^2) a v

and conserves ``K = sqrt(4 a^2 + beta_a^2) - sqrt(4 w^2 + beta_w^2)``. From ``a < 0 < w`` one of the
two meets zero first, and K says which: that is the success rule. From balance, ``|a| = |w|``, it is
``beta_a > beta_w``. Plain descent finds the target from (+, +) alone then; a wider network finds it
from (+, -) as well (`featherweight.lab.neuron`); nothing smooth does from (-, -).

Source: A. Gadhikar, T. Jacobs, C. Zhou and R. Burkholz, NeurIPS 2025, arXiv:2504.12801. The rule
off balance and the closed forms are derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.common import as_generator
from featherweight.lab.neuron import QUADRANTS, Neuron, one_input_success, recovered
from featherweight.sparse.reparam import metric

Betas = tuple[float, float]
PAIRS: tuple[Betas, ...] = ((1.0, 1.0), (1.0, 0.5), (2.0, 0.1), (0.5, 1.0))
SECOND_MOMENT = 1 / 6  # of x on x > 0


def pull(a: Tensor, w: Tensor) -> Tensor:
    """Return v with ``dL/da = w v`` and ``dL/dw = a v``.

    The loss is ``E (a relu(w x) - relu(x))^2 / 2``. The student sees the half line of w's sign:
    there the target is x for ``w > 0``, 0 for ``w < 0``. Any equal shapes; the result has them.
    """
    target = (w > 0).to(w)
    return SECOND_MOMENT * torch.where(w == 0, 0, a * w - target)


def slope(a: Tensor, w: Tensor, betas: Betas | None) -> tuple[Tensor, Tensor]:
    """Return ``(a', w')`` of gradient flow; ``betas=None`` is that of the plain weights."""
    v = pull(a, w)
    if betas is None:
        return -w * v, -a * v
    # Written alike for both, so that a = -w under equal betas stays so to the last bit.
    return -metric(a, betas[0]) * (w * v), -metric(w, betas[1]) * (a * v)


def flow(
    a: Tensor, w: Tensor, betas: Betas | None, *, step: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Follow gradient flow for the time ``step * steps`` by the classical Runge-Kutta method."""
    for _ in range(steps):
        k1 = slope(a, w, betas)
        k2 = slope(a + step / 2 * k1[0], w + step / 2 * k1[1], betas)
        k3 = slope(a + step / 2 * k2[0], w + step / 2 * k2[1], betas)
        k4 = slope(a + step * k3[0], w + step * k3[1], betas)
        a, w = (
            x + step / 6 * (p + 2 * q + 2 * r + s)
            for x, p, q, r, s in zip((a, w), k1, k2, k3, k4, strict=True)
        )
    return a, w


def conserved(a: Tensor, w: Tensor, betas: Betas) -> Tensor:
    """Return ``K``, which gradient flow of the factors conserves."""
    return metric(a, betas[0]) - metric(w, betas[1])


def succeeds(a: Tensor, w: Tensor, betas: Betas | None) -> Tensor:
    """Tell from which starts gradient flow reaches the target, as bool.

    Needs ``w > 0``, and ``a > 0`` or
    ``beta_a - sqrt(4 a^2 + beta_a^2) > beta_w - sqrt(4 w^2 + beta_w^2)``. Plain weights are the
    limit of large equal betas, ``w^2 > a^2``.
    """
    if betas is None:
        return one_input_success(a, w)
    crosses = betas[0] - metric(a, betas[0]) > betas[1] - metric(w, betas[1])
    return (w > 0) & ((a > 0) | crosses)


def found(a: Tensor, w: Tensor, tolerance: float = 0.1) -> Tensor:
    """Tell which students became the target, as bool; see `featherweight.lab.neuron.recovered`."""
    return recovered(Neuron(a, w.unsqueeze(-1)), tolerance)


def starts(count: int, *, balanced: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Draw starts of all signs: ``a`` and ``w`` of shape (count, 4), columns as in ``QUADRANTS``.

    Magnitudes are |N(0, 1)|, shared by the four columns, and by ``a`` and ``w`` where balanced.
    """
    draws = torch.randn(2, count, 1, generator=as_generator(seed), dtype=torch.float64).abs()
    signs = torch.tensor(QUADRANTS, dtype=torch.float64)
    return draws[0] * signs[:, 0], draws[0 if balanced else 1] * signs[:, 1]


@dataclass(frozen=True)
class SignTable:
    """Successes out of ``starts``: a row for each of QUADRANTS, a column for each pair of betas.

    The first column, of ``None``, is plain descent.
    """

    pairs: tuple[Betas | None, ...]
    successes: tuple[tuple[int, ...], ...]
    starts: int

    def rate(self, sign_a: int, sign_w: int, betas: Betas | None) -> float:
        """Return one cell's success rate, in [0, 1]."""
        if (sign_a, sign_w) not in QUADRANTS or betas not in self.pairs:
            raise ValueError(
                f"no cell {(sign_a, sign_w, betas)}: signs are ±1, columns {self.pairs}"
            )
        return (
            self.successes[QUADRANTS.index((sign_a, sign_w))][self.pairs.index(betas)] / self.starts
        )

    def __str__(self) -> str:
        names = ["plain" if p is None else f"{p[0]:g}, {p[1]:g}" for p in self.pairs]
        lines = ["sign a, w " + "".join(f"{name:>9}" for name in names)]
        for a, w in QUADRANTS:
            cells = (f"{self.rate(a, w, pair):9.2f}" for pair in self.pairs)
            lines.append(f"   {a:+d}, {w:+d} " + "".join(cells))
        return "\n".join([*lines, f"{self.starts} starts in each cell; columns: beta_a, beta_w"])


def sign_table(
    *,
    seed: int,
    pairs: Sequence[Betas] = PAIRS,
    balanced: bool = True,
    count: int = 200,
    step: float = 0.2,
    steps: int = 1500,
) -> SignTable:
    """Follow gradient flow from each quadrant of signs and count who finds the target.

    Balanced, theory says 1 0 0 0 in the order of ``QUADRANTS`` for plain descent and where
    ``beta_a <= beta_w``, 1 0 1 0 where ``beta_a > beta_w``.

    Args:
        seed: of the magnitudes.
        pairs: betas of ``a`` and ``w``, each over 0; plain descent is added in front.
        balanced: whether ``|a| = |w|`` at the start.
        count: starts in each quadrant.
        step: of the Runge-Kutta method.
        steps: their number; the slowest starts take a time of some hundreds.
    """
    if min(count, steps) < 1 or step <= 0:
        raise ValueError(f"{count=} and {steps=} must be at least 1, {step=} over 0")
    if any(min(pair) <= 0 for pair in pairs):
        raise ValueError(f"pairs must hold betas over 0, got {tuple(pairs)}")
    a, w = starts(count, balanced=balanced, seed=seed)
    columns = (None, *pairs)
    ends = [found(*flow(a, w, pair, step=step, steps=steps)).sum(dim=0) for pair in columns]
    rows = torch.stack(ends, dim=1).tolist()
    return SignTable(columns, tuple(tuple(row) for row in rows), count)


def mirror(theta: Tensor, beta: float) -> Tensor:
    """Return ``arcsinh(2 theta / beta) / 2``, on which gradient flow acts as on a plain weight."""
    return torch.asinh(2 * theta / beta) / 2


def unmirror(dual: Tensor, beta: float) -> Tensor:
    """Undo `mirror`: ``beta / 2 * sinh(2 dual)``."""
    return beta / 2 * torch.sinh(2 * dual)


def constant_pull(start: Tensor, gradient: float, beta: float, time: Tensor) -> Tensor:
    """Return theta(t) under a constant gradient: ``unmirror(mirror(theta_0) - gradient * t)``."""
    return unmirror(mirror(start, beta) - gradient * time, beta)


def time_to_zero(start: Tensor, gradient: float, beta: float | None) -> Tensor:
    """Return when a weight crosses zero under a constant gradient of its own sign.

    ``arcsinh(2 theta_0 / beta) / (2 gradient)``; ``beta=None`` is a plain weight,
    ``theta_0 / gradient``. The first is shorter for ``beta >= 1`` and grows without end as beta
    falls to 0: signs freeze.
    """
    return (start if beta is None else mirror(start, beta)) / gradient

"""Differential privacy of clients: clipped updates, noise on their sum, and an accountant.

Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang 2018, arXiv:1710.06963; adaptive clipping:
Galen Andrew, Om Thakkar, Brendan McMahan, Swaroop Ramaswamy 2019, arXiv:1905.03871.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.federated.robust import clip_to
from featherweight.federated.streams import stream


@dataclass(frozen=True)
class Privacy:
    """DP-FedAvg: every update is clipped, and Gaussian noise is added to their sum.

    Neighbours are populations that differ by one client. Clients must be sampled by Poisson's rule
    and weighted uniformly, and the sum is divided by the *expected* size of the cohort.

    Args:
        clip: largest Euclidean norm S of an update, above 0; with ``quantile``, the first.
        noise_multiplier: z: the noise on the sum has standard deviation z S; 0: no privacy.
        quantile: None: the clip stays. Otherwise it follows this quantile of the norms, in (0, 1),
            by ``S = S exp(-clip_rate (b - quantile))``, b the noised part of norms below S.
        clip_rate: how fast the clip moves, above 0.
        count_noise: standard deviation of the noise on the *number* of norms below the clip; None:
            a twentieth of the expected size of the cohort. The noise on the sum grows, so that both
            together are as private as ``noise_multiplier`` says.

    Raises:
        ValueError: an argument is out of range.

    Source:
        McMahan et al. 2018, arXiv:1710.06963, Algorithm 1; Andrew et al. 2019, arXiv:1905.03871,
        Algorithm 1.
    """

    clip: float
    noise_multiplier: float
    quantile: float | None = None
    clip_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "clip_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier must be finite and at least 0, got {self.noise_multiplier}"
            )
        if self.quantile is not None and not 0.0 < self.quantile < 1.0:
            raise ValueError(f"quantile must lie in (0, 1), got {self.quantile}")
        if self.count_noise is not None and not self.count_noise >= 0.0:
            raise ValueError(f"count_noise must be at least 0, got {self.count_noise}")

    def sum_multiplier(self, expected: float) -> float:
        """Return the noise multiplier of the sum: above z where the clip adapts.

        ``(z^-2 - (2 count_noise)^-2)^(-1/2)``, Andrew et al. 2019, section 3.1.

        Args:
            expected: size of the cohort.

        Raises:
            ValueError: the count has too little noise for z.
        """
        if self.quantile is None or self.noise_multiplier == 0.0:
            return self.noise_multiplier
        count = self.counted(expected)
        if not 2.0 * count > self.noise_multiplier:
            raise ValueError(
                f"count_noise must be above noise_multiplier / 2 = {self.noise_multiplier / 2:g}, "
                f"got {count:g}"
            )
        return float((self.noise_multiplier**-2 - (2.0 * count) ** -2) ** -0.5)

    def counted(self, expected: float) -> float:
        """Return the standard deviation of the noise on the number of norms below the clip."""
        return expected / 20.0 if self.count_noise is None else self.count_noise

    def epsilon(self, *, rounds: int, delta: float, rate: float, accountant: str = "pld") -> float:
        """Return the epsilon of a number of rounds, by ``dp-accounting``.

        Args:
            rounds: how many, at least 0.
            delta: chance of failure, below one over the number of clients.
            rate: with which a client is sampled in a round, in (0, 1].
            accountant: "pld", tight; or "rdp".

        Raises:
            ImportError: the library is missing.
            ValueError: an argument is out of range.
        """
        accounting = _accounting()
        made = _accountant(accountant)
        if rounds == 0 or self.noise_multiplier == 0.0:
            return math.inf if rounds else 0.0
        event = _round_event(accounting, self.noise_multiplier, rate)
        made.compose(event, rounds)
        return float(made.get_epsilon(delta))


def noise_multiplier_for(
    epsilon: float, *, delta: float, rounds: int, rate: float, accountant: str = "pld"
) -> float:
    """Return the least noise multiplier with which rounds stay (epsilon, delta)-private.

    Args:
        epsilon: above 0.
        delta: chance of failure.
        rounds: how many.
        rate: with which a client is sampled in a round, in (0, 1].
        accountant: "pld" or "rdp".

    Raises:
        ImportError: ``dp-accounting`` is missing.
        ValueError: an argument is out of range.
    """
    if not epsilon > 0.0 or not 0.0 < delta < 1.0 or rounds < 1:
        raise ValueError(
            "epsilon must be above 0, delta in (0, 1), rounds at least 1; "
            f"got {epsilon}, {delta}, {rounds}"
        )
    accounting = _accounting()

    def make_event(multiplier: float) -> Any:
        event = _round_event(accounting, multiplier, rate)
        return accounting.SelfComposedDpEvent(event, rounds)

    found = accounting.calibrate_dp_mechanism(
        lambda: _accountant(accountant), make_event, epsilon, delta
    )
    return float(found)


def _round_event(accounting: Any, multiplier: float, rate: float) -> Any:
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate must lie in (0, 1], got {rate}")
    gaussian = accounting.GaussianDpEvent(multiplier)
    return gaussian if rate == 1.0 else accounting.PoissonSampledDpEvent(rate, gaussian)


def _accounting() -> Any:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise ImportError(
            "accounting needs dp-accounting: pip install 'featherweight[federated]'"
        ) from error


def _accountant(name: str) -> Any:
    kinds = {"pld": "PLDAccountant", "rdp": "RdpAccountant"}
    if name not in kinds:
        raise ValueError(f"accountant must be 'pld' or 'rdp', got {name!r}")
    return getattr(importlib.import_module(f"dp_accounting.{name}"), kinds[name])()


class Mechanism:
    """What a simulation does for `Privacy`: the clip so far, and noise by round.

    The noise is that of a pseudo-random generator in floating point: right for studying how much
    accuracy privacy costs, not for protecting anybody.

    Args:
        privacy: the options.
        expected: size of the cohort, sampling rate times clients.
        seed: of the noise.
    """

    def __init__(self, privacy: Privacy, expected: float, seed: int) -> None:
        self.privacy, self.expected, self.seed = privacy, expected, seed
        self.multiplier = privacy.sum_multiplier(expected)
        self.clip = privacy.clip
        self._below = 0

    def clipped(self, updates: Tensor) -> Tensor:
        """Return the updates [C, length] clipped, and count those that already were short."""
        norms = torch.linalg.vector_norm(updates, dim=1)
        self._below += int((norms <= self.clip).sum())
        return clip_to(updates, self.clip)

    def noised(self, total: Tensor, round: int) -> Tensor:
        """Return the noised sum of clipped updates over the expected cohort, and move the clip."""
        seed = stream(self.seed, "noise", round)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(total.shape, generator=generator, dtype=total.dtype)
        found = (total + self.multiplier * self.clip * noise.to(total.device)) / self.expected
        if self.privacy.quantile is not None:
            self._move(float(torch.randn((), generator=generator)), self.privacy.quantile)
        self._below = 0
        return found

    def _move(self, noise: float, quantile: float) -> None:
        scale = self.privacy.counted(self.expected) if self.privacy.noise_multiplier else 0.0
        below = (self._below + scale * noise) / self.expected
        self.clip *= math.exp(-self.privacy.clip_rate * (below - quantile))

    def state_dict(self) -> dict[str, Any]:
        """Return the clip."""
        return {"clip": self.clip}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the clip."""
        self.clip = float(state["clip"])

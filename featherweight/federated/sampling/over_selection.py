"""More clients than needed are asked; the fastest count, and the slow ones never do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.sampling.base import SAMPLERS, cohort_of, draws


@SAMPLERS.register(
    "over-selection",
    "asks more clients than needed and takes the first to finish",
    "Bonawitz et al. 2019, arXiv:1902.01046",
    needs=["seconds", "size"],
)
@dataclass(frozen=True, eq=False)
class OverSelection:
    """A uniform choice of ``over * size`` clients, of which the first ``size`` to finish count.

    The cohort leans towards fast clients: their data count more. That is what production does, and
    what dropping stragglers from a mean alone would hide.

    Args:
        seconds: float [clients], how long each needs in the median, above 0; see
            `TimeModel.devices`.
        size: clients that count, at most.
        seed: of all cohorts.
        over: clients asked over ``size``, at least 1; 1: no over-selection.
        deadline: seconds after which nobody counts, above 0.
        dropout: probability that a client asked never answers, in [0, 1).
        jitter: standard deviation of the logarithm of a client's time from round to round, at
            least 0.
    """

    seconds: Tensor
    size: int
    seed: int = 0
    over: float = 1.3
    deadline: float = math.inf
    dropout: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not (self.over >= 1 and self.size >= 1 and self.asked <= len(self.seconds)):
            raise ValueError(
                f"size * over must lie in [1, {len(self.seconds)} clients], over at least 1; "
                f"got {self.size} * {self.over}"
            )
        if not (self.deadline > 0 and 0 <= self.dropout < 1 and self.jitter >= 0):
            raise ValueError(
                "deadline must be above 0, dropout lie in [0, 1) and jitter be at least 0; got "
                f"{self.deadline}, {self.dropout} and {self.jitter}"
            )

    @property
    def asked(self) -> int:
        """Number of clients asked in a round."""
        return math.ceil(self.over * self.size - 1e-9)

    def selected(self, round: int) -> Tensor:
        """Return the ids of the clients asked, int64, ascending."""
        rng = draws("cohort", self.seed, round)
        return cohort_of(rng.choice(len(self.seconds), self.asked, replace=False))

    def times(self, round: int) -> Tensor:
        """Return the seconds of each client asked, in the order of `selected`; inf: no answer."""
        rng = draws("stragglers", self.seed, round)
        factors = np.exp(self.jitter * rng.standard_normal(self.asked))
        times = self.seconds[self.selected(round)].double() * torch.from_numpy(factors)
        silent = torch.from_numpy(rng.random(self.asked) < self.dropout)
        return times.masked_fill(silent, math.inf)

    def cohort(self, round: int) -> Tensor:
        """Return the ids of the clients that count; may be fewer than ``size``, or none."""
        times = self.times(round)
        fastest = times.argsort(stable=True)[: self.size]
        within = fastest[(times[fastest] <= self.deadline) & times[fastest].isfinite()]
        return cohort_of(self.selected(round)[within])

"""Samplers of clients that can always be reached."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.sampling.base import SAMPLERS, check_size, cohort_of, draws


@SAMPLERS.register("all", "every client, every round (cross-silo)", needs=["clients"])
@dataclass(frozen=True)
class Everyone:
    """All clients in every round.

    Args:
        clients: number of clients.
    """

    clients: int

    def __post_init__(self) -> None:
        check_size(self.clients, self.clients)

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients."""
        return torch.arange(self.clients)


@SAMPLERS.register("uniform", "so many clients, without replacement", needs=["clients", "size"])
@dataclass(frozen=True)
class Uniform:
    """A uniform choice without replacement within the round.

    With normalised example weights this is algorithm 1 of the field guide, whose mean is a ratio
    estimator: biased for the mean over all clients, unless these hold equally much.

    Args:
        clients: number of clients.
        size: of a cohort.
        seed: of all cohorts.
    """

    clients: int
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size, self.clients)

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients."""
        rng = draws("cohort", self.seed, round)
        return cohort_of(rng.choice(self.clients, self.size, replace=False))


@SAMPLERS.register(
    "with-replacement", "uniform; a client may be drawn twice", needs=["clients", "size"]
)
@dataclass(frozen=True)
class WithReplacement:
    """Independent uniform draws; a client that is drawn twice is named twice.

    Args:
        clients: number of clients.
        size: draws of a round, at least 1.
        seed: of all cohorts.
    """

    clients: int
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.clients, self.size) < 1:
            raise ValueError(
                f"clients and size must be at least 1, got {self.clients} and {self.size}"
            )

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients, some more than once."""
        return cohort_of(draws("cohort", self.seed, round).integers(self.clients, size=self.size))


@SAMPLERS.register(
    "by-size", "in proportion to examples, with replacement", needs=["sizes", "size"]
)
@dataclass(frozen=True, eq=False)
class BySize:
    """Independent draws in proportion to the numbers of examples.

    Together with *uniform* weights the mean is unbiased for the mean over all examples. Example
    weights would count the numbers twice.

    Args:
        sizes: int64 [clients], numbers of examples, not all 0.
        size: draws of a round, at least 1.
        seed: of all cohorts.
    """

    sizes: Tensor
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or int(self.sizes.min()) < 0 or int(self.sizes.sum()) < 1:
            raise ValueError(f"size must be at least 1 and sizes not all 0, got size {self.size}")

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients, some more than once."""
        shares = self.sizes.double().numpy()
        rng = draws("cohort", self.seed, round)
        return cohort_of(rng.choice(len(shares), self.size, p=shares / shares.sum()))


@SAMPLERS.register(
    "poisson", "each client on its own with one probability", needs=["clients", "size"]
)
@dataclass(frozen=True)
class Poisson:
    """Each client takes part independently: what accountants of differential privacy assume.

    A round's cohort may have any size, 0 included.

    Args:
        clients: number of clients.
        size: expected number of clients of a round; ``size / clients`` is the probability.
        seed: of all cohorts.
    """

    clients: int
    size: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.clients:
            raise ValueError(f"size must lie in (0, {self.clients} clients], got {self.size}")

    @property
    def rate(self) -> float:
        """Probability that a client takes part in a round."""
        return self.size / self.clients

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients; may be empty."""
        drawn = draws("cohort", self.seed, round).random(self.clients) < self.rate
        return cohort_of(np.flatnonzero(drawn))

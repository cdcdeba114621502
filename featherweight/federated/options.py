"""The choices of a simulation, and which of them don't go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from featherweight.common import unknown
from featherweight.federated.algorithms.base import Algorithm
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.local import Local
from featherweight.federated.population import Population
from featherweight.federated.privacy import Mechanism, Privacy
from featherweight.federated.robust import Aggregator
from featherweight.federated.streams import stream

Weighting = Literal["examples", "uniform", "unbiased"] | Callable[[Tensor], Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, Any]]

WEIGHTINGS = ("examples", "uniform", "unbiased")


class Sampler(Protocol):
    """Says who takes part."""

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients, int64, [M]; M may be 0."""


@dataclass(frozen=True)
class Options:
    """See `simulate`, whose arguments these are."""

    sampler: Sampler
    codec: Codec | None
    local: Local
    aggregator: Aggregator | None
    privacy: Privacy | None
    weighting: Weighting
    evaluate: Evaluate | None
    evaluate_every: int
    seed: int
    threads: int | None
    side_by_side: int | None

    def __post_init__(self) -> None:
        if not callable(self.weighting) and self.weighting not in WEIGHTINGS:
            raise ValueError(unknown("weighting", self.weighting, WEIGHTINGS))
        for name in ("evaluate_every", "threads", "side_by_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def weights(self, population: Population) -> Tensor:
        """Return the weight of each client of the population, float64, above 0, [clients].

        Raises:
            ValueError: a function of the user's gives other than one weight above 0 for each.
        """
        if self.weighting == "uniform":
            return torch.ones(len(population), dtype=torch.float64)
        if not callable(self.weighting):
            return population.sizes.double()
        found = self.weighting(torch.arange(len(population))).double()
        if found.shape != (len(population),) or not bool(
            (found > 0).all() & found.isfinite().all()
        ):
            raise ValueError("weighting must give one finite weight above 0 for each client")
        return found

    def check_algorithm(self, algorithm: Algorithm) -> None:
        """Refuse what doesn't go together with an algorithm.

        Raises:
            ValueError: it doesn't.
        """
        if self.privacy is not None and not algorithm.private:
            raise ValueError(
                f"privacy= covers a clipped update a client alone; {type(algorithm).__name__} "
                "learns more from clients"
            )

    def mechanism(self, population: Population) -> Mechanism | None:
        """Return the privacy mechanism, if there is privacy.

        Raises:
            ValueError: sampler, weighting, codec or aggregator break its guarantee.
        """
        if self.privacy is None:
            return None
        rate = getattr(self.sampler, "rate", None)
        if rate is None:
            raise ValueError(
                "privacy= needs a sampler that draws each client by itself, with a rate, such as "
                f"Poisson; got {type(self.sampler).__name__}"
            )
        if self.weighting != "uniform":
            raise ValueError(
                f"privacy= needs weighting='uniform', got {self.weighting!r}: an update's weight "
                "would multiply what one client can change"
            )
        if self.codec is not None and self.codec.name != "identity":
            raise ValueError(
                f"privacy= needs codec=None or Identity(), got {self.codec.name!r}: a decoded "
                "update may be longer than the clip"
            )
        if self.aggregator is not None:
            raise ValueError("privacy= needs the mean: aggregator must be None")
        return Mechanism(self.privacy, rate * len(population), stream(self.seed, "privacy"))

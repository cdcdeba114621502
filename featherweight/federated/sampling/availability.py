"""Samplers of clients that cannot always be reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.sampling.base import SAMPLERS, check_size, cohort_of, draws


@SAMPLERS.register(
    "diurnal",
    "groups of clients that are reachable one after another, as day and night",
    "Eichner et al. 2019, arXiv:1904.10120",
    needs=["clients", "size"],
)
@dataclass(frozen=True)
class Diurnal:
    """Uniform within the group that is awake; client i belongs to group i modulo ``groups``.

    Args:
        clients: number of clients.
        size: of a cohort, at most a group.
        seed: of all cohorts.
        period: rounds of a day, in which every group has its turn once.
        groups: number of groups.
    """

    clients: int
    size: int
    seed: int = 0
    period: int = 24
    groups: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= min(self.clients, self.period):
            raise ValueError(
                f"groups must lie in [1, {min(self.clients, self.period)}], got {self.groups}"
            )
        if not 1 <= self.size <= self.clients // self.groups:
            raise ValueError(
                f"size must lie in [1, {self.clients // self.groups}], the clients of a group; "
                f"got {self.size}"
            )

    def awake(self, round: int) -> int:
        """Return the group that is reachable in a round."""
        return (round % self.period) * self.groups // self.period

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients."""
        members = np.arange(self.awake(round), self.clients, self.groups)
        rng = draws("cohort", self.seed, round)
        return cohort_of(rng.choice(members, self.size, replace=False))


@SAMPLERS.register(
    "markov", "clients that come and go, each as a chain of two states", needs=["clients", "size"]
)
@dataclass
class Markov:
    """Uniform among the clients that are on; a client's state is a Markov chain over the rounds.

    The chains start in their stationary state. Where fewer than ``size`` clients are on, all of
    them take part. Rounds in ascending order cost one step of the chains each; a jump back starts
    the chains anew.

    Args:
        clients: number of clients.
        size: of a cohort, at most ``clients``.
        seed: of chains and cohorts.
        arrive: probability that a client that is off is on in the next round, in (0, 1].
        leave: probability that a client that is on is off in the next round, in [0, 1).
    """

    clients: int
    size: int
    seed: int = 0
    arrive: float = 0.1
    leave: float = 0.1
    _round: int = field(default=-1, init=False, repr=False, compare=False)
    _on: np.ndarray = field(
        default_factory=lambda: np.empty(0, bool), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_size(self.size, self.clients)
        if not (0 < self.arrive <= 1 and 0 <= self.leave < 1):
            raise ValueError(
                f"arrive must lie in (0, 1] and leave in [0, 1), got {self.arrive} and {self.leave}"
            )

    def on(self, round: int) -> Tensor:
        """Return the ids of the clients that are on in a round."""
        if round < self._round or self._round < 0:
            self._round = 0
            drawn = draws("availability", self.seed, 0).random(self.clients)
            self._on = drawn < self.arrive / (self.arrive + self.leave)
        while self._round < round:
            self._round += 1
            drawn = draws("availability", self.seed, self._round).random(self.clients)
            self._on = np.where(self._on, drawn >= self.leave, drawn < self.arrive)
        return cohort_of(np.flatnonzero(self._on))

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients; may be fewer than ``size``, or none."""
        present = self.on(round).numpy()
        rng = draws("cohort", self.seed, round)
        return cohort_of(rng.choice(present, min(self.size, len(present)), replace=False))

    def state_dict(self) -> dict[str, Any]:
        """Return where the chains stand, so that a resumed run need not walk through all rounds."""
        return {"round": self._round, "on": torch.from_numpy(self._on.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where other chains of the same arguments stood."""
        self._round, self._on = int(state["round"]), state["on"].numpy().copy()

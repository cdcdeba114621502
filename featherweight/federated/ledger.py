"""What a training has cost so far: rounds, bytes, examples, and the estimated time on devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from featherweight.federated.record import RoundRecord
from featherweight.federated.time_model import TimeModel


@dataclass(frozen=True)
class Costs:
    """Totals over rounds and clients.

    Attributes:
        rounds: finished.
        bytes_up: from clients.
        bytes_down: to clients.
        examples: whose gradients were computed.
        steps: local steps.
        seconds: estimated time on devices.
    """

    rounds: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    examples: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down


class Ledger:
    """Add up what rounds cost.

    Args:
        clients: number of clients of the population.
        time_model: turns bytes and examples into seconds.
    """

    def __init__(self, clients: int, time_model: TimeModel | None = None) -> None:
        self.time_model = time_model or TimeModel()
        self.totals = Costs()
        self.participation = torch.zeros(clients, dtype=torch.int64)

    def add(self, record: RoundRecord) -> Costs:
        """Add a round.

        Args:
            record: of the round; rounds come in order, from 0.

        Returns:
            The totals, this round included.

        Raises:
            ValueError: another round was due.
        """
        if record.round != self.totals.rounds:
            raise ValueError(f"round {self.totals.rounds} was due, got round {record.round}")
        ids = record.cohort.cpu()
        self.participation.index_add_(0, ids, torch.ones_like(ids))
        self.totals = Costs(
            rounds=self.totals.rounds + 1,
            bytes_up=self.totals.bytes_up + _total(record.bytes_up),
            bytes_down=self.totals.bytes_down + _total(record.bytes_down),
            examples=self.totals.examples + _total(record.examples),
            steps=self.totals.steps + _total(record.steps),
            seconds=self.totals.seconds
            + self.time_model.round(record.bytes_down, record.bytes_up, record.examples),
        )
        return self.totals

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs."""
        return {"totals": asdict(self.totals), "participation": self.participation.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another ledger's totals.

        Raises:
            ValueError: it is of another number of clients, or its totals have other names.
        """
        names = {item.name for item in fields(Costs)}
        if set(state["totals"]) != names or state["participation"].shape != (
            self.participation.shape
        ):
            raise ValueError(f"not the state of a ledger of {len(self.participation)} clients")
        self.totals = Costs(**state["totals"])
        self.participation = state["participation"].clone()


def _total(values: Tensor) -> int:
    return int(values.sum())

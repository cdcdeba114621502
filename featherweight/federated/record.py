"""What a simulation tells about each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """One round. The tensors have one entry a client of the cohort, in the order of ``cohort``.

    Attributes:
        round: from 0.
        cohort: ids of the clients that trained, int64, [M]; M may be 0. Each client once.
        train_loss: mean of ``client_losses``; NaN without clients.
        client_losses: each client's mean loss over its local batches, before each step; [M].
        start_losses: each client's loss on its first batch, at the weights it was sent; [M].
        steps: local steps, int64, [M].
        examples: examples whose gradient was computed, int64, [M].
        bytes_up: bytes from each client, int64, [M].
        bytes_down: bytes to each client, int64, [M].
        metrics: what ``evaluate`` returned, empty in rounds without.
        seconds: wall clock of the round without its evaluation.
        refused: clients whose message was left out of the mean, and why.
        server_rate: the server's learning rate in this round.
        client_rate: the clients' learning rate in this round.
    """

    round: int
    cohort: Tensor
    train_loss: float
    client_losses: Tensor
    start_losses: Tensor
    steps: Tensor
    examples: Tensor
    bytes_up: Tensor
    bytes_down: Tensor
    metrics: Mapping[str, Any]
    seconds: float
    refused: Mapping[int, str] = field(default_factory=dict)
    server_rate: float = 1.0
    client_rate: float = 0.0

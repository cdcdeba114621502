"""From bytes and examples to an estimate of the time that real devices would need."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.streams import stream


@dataclass(frozen=True)
class TimeModel:
    """The field guide's model of a round: communication, then the slowest client, then the server.

    The defaults are averages over production tasks on phones: bandwidths of the device that
    completes the 90 % quantile, language models and encoders.

    Source: Wang et al. 2021, arXiv:2107.06917, equations 9 and 10.

    Attributes:
        down: bytes a second to a client, above 0.
        up: bytes a second from a client, above 0.
        slowdown: R_comp, time of a device over that of the simulation, at least 0.
        overhead: C_comp, seconds that a device needs beside training, at least 0.
        server: T_server, seconds of the server a round, at least 0.
        per_example: seconds that the simulation needs for one example's gradient, at least 0; 0:
            training takes no time. The guide's MobileNetV2 takes 0.127 on one core.
    """

    down: float = 0.75e6
    up: float = 0.25e6
    slowdown: float = 7.0
    overhead: float = 10.0
    server: float = 0.0
    per_example: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            positive = item.name in ("down", "up")
            if not (value > 0 if positive else value >= 0) or value == float("inf"):
                low = "above 0" if positive else "at least 0"
                raise ValueError(f"{item.name} must be finite and {low}, got {value}")

    def communication(self, bytes_down: float, bytes_up: float) -> float:
        """Return T_comm in seconds for the bytes to and from one client."""
        return bytes_down / self.down + bytes_up / self.up

    def client(self, examples: float) -> float:
        """Return T_client in seconds of a client that computes so many examples' gradients."""
        return self.slowdown * self.per_example * examples + self.overhead

    def round(self, bytes_down: Tensor, bytes_up: Tensor, examples: Tensor) -> float:
        """Return T_round in seconds.

        Args:
            bytes_down: [M], to each client of the round. The largest counts, as in the guide,
                where all are equal.
            bytes_up: [M], from each client.
            examples: [M], whose gradients each client computed; the largest counts.

        Returns:
            Seconds; without clients those of the server.
        """
        if not len(examples):
            return self.server
        sent = self.communication(float(bytes_down.max()), float(bytes_up.max()))
        return sent + self.client(float(examples.max())) + self.server

    def devices(
        self, examples: Tensor, bytes_down: float, bytes_up: float, *, spread: float, seed: int
    ) -> Tensor:
        """Draw how long each client needs for a round: some are slow.

        Args:
            examples: [clients], whose gradients each would compute.
            bytes_down: to each.
            bytes_up: from each.
            spread: standard deviation of the logarithm of a device's speed, at least 0; 0: equal
                devices. Bandwidth and computation are slow together.
            seed: of the speeds.

        Returns:
            float64 [clients], seconds; the median device has the speed of the model.
        """
        rng = np.random.default_rng(stream(seed, "devices"))
        factors = np.exp(spread * rng.standard_normal(len(examples)))
        training = self.slowdown * self.per_example * examples.double() + self.overhead
        return torch.from_numpy(factors) * (training + self.communication(bytes_down, bytes_up))

"""What every federated algorithm answers, and where its clients' vectors are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.local import ClientOptimizer, Correction, Local, Sgd, Trained
from featherweight.federated.schedules import rate_at
from featherweight.federated.server import ServerOptimizer, ServerSgd
from featherweight.federated.work import Work

UPDATE, VARIATE, GRADIENT = "update", "variate", "gradient"


@dataclass(frozen=True, eq=False)
class Federation:
    """What an algorithm is told once, at the start.

    Attributes:
        length: of the vectors.
        shares: of the clients in the objective, [clients], of sum 1.
        local: the clients' work.
        like: an empty tensor of the vectors' dtype and device.
    """

    length: int
    shares: Tensor
    local: Local
    like: Tensor

    def zeros(self) -> Tensor:
        """Return a vector of zeros."""
        return self.like.new_zeros(self.length)


@dataclass(frozen=True, eq=False)
class Summary:
    """What an algorithm is told about a round at its end; of clients whose messages counted.

    Attributes:
        round: from 0.
        weights: of the clients in the mean, [n], above 0.
        steps: their local steps, int64, [n].
        share: sum of their shares in the objective, at most 1.
        rate: the clients' learning rate.
    """

    round: int
    weights: Tensor
    steps: Tensor
    share: float
    rate: float


class ClientVectors:
    """One vector a client, zero until written; memory is taken for those written alone.

    Args:
        clients: how many.
        like: dtype and device.
        length: of the vectors.
    """

    def __init__(self, clients: int, length: int, like: Tensor) -> None:
        # NumPy leaves the zeroing to the operating system, page by page; torch writes all of them
        dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
        self._vectors = torch.from_numpy(np.zeros((clients, length), dtype)).to(like.device)
        self._written = torch.zeros(clients, dtype=torch.bool)

    def __getitem__(self, clients: Tensor) -> Tensor:
        """Return a copy of the vectors of some clients, [C, length]."""
        return self._vectors[clients.to(self._vectors.device)]

    def add(self, clients: Tensor, values: Tensor) -> None:
        """Add [C, length] to the vectors of some clients, each named once."""
        self._vectors.index_add_(0, clients.to(self._vectors.device), values)
        self._written[clients] = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return who was written, and what."""
        clients = self._written.nonzero()[:, 0]
        return {"clients": clients, "vectors": self[clients]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore."""
        written = self._written.nonzero()[:, 0]
        self._vectors[written.to(self._vectors.device)] = 0
        self._written[written] = False
        self.add(state["clients"], state["vectors"])


class Algorithm:
    """Averaging of local updates, to be varied.

    A round goes: `begin` (where ``sends_gradient``, with the mean of the clients' gradients over
    all their examples), then local steps along `correction` by `optimizer`, then `messages` from
    the clients, each of whose kinds is averaged by itself, then `finish` on the server.

    Args:
        server: moves the server's weights.

    Attributes:
        stateful: keeps a vector for each client between rounds, so that clients must be known and
            come back.
        private: nothing but the mean of the updates is learnt from clients.
        sends_gradient: clients send their full gradient before they train.
        wants_gradient: `messages` needs each client's full gradient.
        uplink: number of vectors from each client.
        downlink: number of vectors to each client.
    """

    stateful: ClassVar[bool] = False
    private: ClassVar[bool] = True
    sends_gradient: bool = False
    wants_gradient: bool = False
    uplink: int = 1
    downlink: int = 1

    def __init__(self, server: ServerOptimizer | None = None) -> None:
        self.server = ServerSgd() if server is None else server

    def start(self, federation: Federation) -> None:
        """Learn the sizes, and refuse what the algorithm can't do.

        Raises:
            ValueError: the algorithm can't work with these clients' optimizer.
        """

    def begin(self, gradient: Tensor) -> None:
        """Learn the mean of the cohort's full gradients at the server's weights."""

    def correction(self, work: Work) -> Correction:
        """Return what is added to the gradients of these clients."""
        return Correction()

    def optimizer(self, local: Local) -> ClientOptimizer:
        """Return the clients' optimizer."""
        return local.optimizer

    def messages(self, trained: Trained, gradients: Tensor | None) -> dict[str, Tensor]:
        """Return the vectors [C, length] that clients send, by kind, and keep what they keep."""
        return {UPDATE: trained.delta}

    def finish(self, weights: Tensor, means: Mapping[str, Tensor], summary: Summary) -> Tensor:
        """Return the server's new weights."""
        return self.server.step(weights, means[UPDATE], summary.round)

    def rate(self, round: int) -> float:
        """Return the server's learning rate of a round."""
        return rate_at(self.server.rate, round)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dicts of tensors."""
        return {"server": self.server.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self.server.load_state_dict(state["server"])


def plain_sgd(name: str, local: Local, *, momentum: bool = False) -> Sgd:
    """Return the clients' optimizer, which must be SGD for the algorithm's formulas to hold.

    Args:
        name: of the algorithm, for the error.
        local: the clients' work.
        momentum: whether momentum is allowed.

    Raises:
        ValueError: it is another optimizer, or has momentum that is not allowed.
    """
    optimizer = local.optimizer
    if not isinstance(optimizer, Sgd):
        kind = type(optimizer).__name__
        raise ValueError(f"{name} needs clients with optimizer=Sgd(), got {kind}")
    if optimizer.momentum and not momentum:
        raise ValueError(f"{name} needs clients without momentum, got {optimizer.momentum:g}")
    return optimizer

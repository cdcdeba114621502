"""The clients of a federation and their examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Population:
    """Examples, and which of them each client holds.

    Attributes:
        inputs: [N, ...], all examples of all clients.
        targets: [N], int64 labels (or whatever the loss takes, one an example).
        clients: for each client the int64 indices of its examples, at least one. Clients may share
            examples.

    Raises:
        TypeError: indices are not int64.
        ValueError: there is no client, inputs and targets differ in length, a client holds no
            example, or an index is out of range.
    """

    inputs: Tensor
    targets: Tensor
    clients: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(self.clients))
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"inputs and targets must be of one length, got {len(self.inputs)} and "
                f"{len(self.targets)}"
            )
        if not self.clients:
            raise ValueError("clients must name at least one client, got none")
        for client, indices in enumerate(self.clients):
            _check(client, indices, len(self.inputs))

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.clients)

    @cached_property
    def sizes(self) -> Tensor:
        """Number of examples of each client: int64, [clients]."""
        return torch.tensor([len(indices) for indices in self.clients])

    @cached_property
    def indices(self) -> Tensor:
        """The indices of all clients one after another: int64, [sum of sizes]."""
        return torch.cat([indices.cpu() for indices in self.clients])

    @cached_property
    def offsets(self) -> Tensor:
        """Where each client begins in `indices`: int64, [clients]."""
        return self.sizes.cumsum(0) - self.sizes

    def client(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one client."""
        indices = self.clients[index]
        return self.inputs[indices], self.targets[indices]


def _check(client: int, indices: Tensor, examples: int) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise TypeError(
            f"clients[{client}] must be a 1-D int64 tensor, got {indices.dim()}-D {indices.dtype}"
        )
    if len(indices) == 0:
        raise ValueError(f"clients[{client}] holds no example; leave it out of the population")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= examples:
        raise ValueError(
            f"clients[{client}] must index [0, {examples}), got {low if low < 0 else high}"
        )

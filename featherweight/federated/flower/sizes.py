"""Populations where nobody holds all examples: the server knows sizes, a client its own data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featherweight.federated.population import Population


def of_sizes(sizes: Sequence[int] | Tensor, example: Tensor, target: Tensor) -> Population:
    """Return a population of which the sizes are true and the examples are all the same.

    For the server: weights in the mean and numbers of local steps follow from sizes, and the one
    example is what the model is tried on. It takes 8 bytes an example.

    Args:
        sizes: number of examples of each client, at least 1.
        example: one input, without the dimension of the batch; its values don't matter.
        target: its target.

    Raises:
        ValueError: there is no client, or one without an example.
    """
    counts = torch.as_tensor(sizes, dtype=torch.int64)
    total = int(counts.sum())
    inputs = example.expand(total, *example.shape)
    clients = torch.arange(total).split(counts.tolist())
    return Population(inputs, target.expand(total, *target.shape), clients)


def alone(client: int, inputs: Tensor, targets: Tensor, clients: int) -> Population:
    """Return a population of which one client is there; of the others the number alone is true.

    For a client: what it trains on depends on its own examples, and on its number and its seed.

    Args:
        client: its number, from 0.
        inputs: [n, ...], its examples.
        targets: [n, ...].
        clients: how many there are in all.

    Raises:
        ValueError: the client is none of them, or has no example.
    """
    if not 0 <= client < clients:
        raise ValueError(f"client must lie in [0, {clients}), got {client}")
    others = torch.zeros(1, dtype=torch.int64)
    held = [others] * clients
    held[client] = torch.arange(len(inputs))
    return Population(inputs, targets, tuple(held))

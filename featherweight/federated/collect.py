"""How the server takes in the vectors of a round: a running sum, a stack, or messages in bytes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from featherweight.federated.codecs.codec import Codec
from featherweight.federated.inbox import Inbox
from featherweight.federated.robust import Aggregator

FLOAT_BYTES = 4  # what travels is float32


class Collector(Protocol):
    """Takes vectors of one kind in, group of clients by group."""

    def add(self, clients: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        """Take in vectors [n, length] of weights [n]; return their sizes in bytes, int64, [n]."""

    def mean(self) -> Tensor:
        """Return the mean of what was taken in, [length]; there must be something."""


class Running:
    """Keeps a weighted sum, so that memory doesn't grow with the cohort."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, clients: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        """Take in vectors; see `Collector`."""
        part = weights.to(vectors) @ vectors
        self._sum = part if self._sum is None else self._sum + part
        self._weight += float(weights.sum())
        return torch.full_like(clients, FLOAT_BYTES * vectors.shape[1])

    def mean(self) -> Tensor:
        """Return the weighted mean."""
        assert self._sum is not None
        return self._sum / self._weight


class Stacked:
    """Keeps all vectors for an aggregator that needs to see them together."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self._vectors: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, clients: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        """Take in vectors; see `Collector`."""
        self._vectors.append(vectors)
        self._weights.append(weights.to(vectors))
        return torch.full_like(clients, FLOAT_BYTES * vectors.shape[1])

    def mean(self) -> Tensor:
        """Return what the aggregator makes of the vectors."""
        return self._aggregator(torch.cat(self._vectors), torch.cat(self._weights))


class Coded:
    """Passes every vector through a codec as bytes, as it would travel.

    Args:
        codec: of clients and server.
        round: from 0.
        length: of the vectors.
        cohort: ids of those who may send.
        like: dtype and device of the mean.
        aggregator: None: the codec's own mean, which may see all messages together; otherwise each
            message is decoded by itself, and the aggregator sees the results.
    """

    def __init__(
        self,
        codec: Codec,
        round: int,
        length: int,
        cohort: Tensor,
        like: Tensor,
        aggregator: Aggregator | None,
    ) -> None:
        self._codec, self._round, self._like, self._aggregator = codec, round, like, aggregator
        self._inbox = Inbox(codec, round=round, length=length, clients=cohort.tolist())
        self._messages: list[bytes] = []

    def add(self, clients: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        """Encode vectors and take the messages in; see `Collector`."""
        rows = vectors.detach().to("cpu", torch.float32)
        sizes = []
        for client, row, weight in zip(clients.tolist(), rows, weights.tolist(), strict=True):
            message = self._codec.encode(row, round=self._round, client=client, weight=weight)
            self._inbox.add(message, sender=client)
            sizes.append(len(message))
            if self._aggregator is not None:
                self._messages.append(message)
        return torch.tensor(sizes)

    def mean(self) -> Tensor:
        """Return the decoded mean."""
        if self._aggregator is None:
            return self._inbox.mean().to(self._like)
        vectors = torch.stack([self._codec.decode_mean([message]) for message in self._messages])
        weights = torch.tensor(self._inbox.weights, dtype=vectors.dtype)
        return self._aggregator(vectors, weights).to(self._like)

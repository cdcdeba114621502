"""The messages of a round: those of a client count all or none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from featherweight.federated.codecs.codec import Codec
from featherweight.federated.inbox import Inbox
from featherweight.federated.robust import Aggregator
from featherweight.federated.wire import Header, Refused


class Gathered:
    """Takes in what clients send, which may be anything.

    Args:
        codecs: by kind of vector; every client sends one of each.
        lengths: of the vectors, by kind.
        round: from 0.
        weights: of the clients that may send, as messages must name them.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        lengths: Mapping[str, int],
        round: int,
        weights: Mapping[int, float],
    ) -> None:
        self._codecs, self._lengths, self._round, self._weights = codecs, lengths, round, weights
        self._messages: dict[int, Mapping[str, bytes]] = {}

    def add(self, client: int, payloads: Mapping[str, bytes]) -> int:
        """Take in a client's messages; return their size in bytes.

        They are read twice, here to judge all of them before any counts.

        Raises:
            Refused: one of them is not what it should be.
        """
        if client in self._messages:
            raise Refused(f"client {client} has sent already")
        if set(payloads) != set(self._codecs):
            raise Refused(f"it sent {sorted(payloads)[:3]}, not {sorted(self._codecs)}")
        for kind, message in payloads.items():
            self._inbox(kind).add(message, sender=client)
            weight = np.float32(self._weights[client])
            if Header.unpack(message).weight != weight:
                raise Refused(f"the weight of {kind} is not {weight:g}")
        self._messages[client] = payloads
        return sum(len(message) for message in payloads.values())

    def mean(self, kind: str) -> Tensor:
        """Return the weighted mean, by a decoder that may see all messages together."""
        inbox = self._inbox(kind)
        for client, payloads in self._messages.items():
            inbox.add(payloads[kind], sender=client)
        return inbox.mean()

    def vectors(self, kind: str) -> Tensor:
        """Return each client's vector decoded by itself, [n, length]."""
        codec = self._codecs[kind]
        return torch.stack([codec.decode_mean([p[kind]]) for p in self._messages.values()])

    def reduced(self, kind: str, aggregator: Aggregator | None) -> Tensor:
        """Return what an aggregator makes of the vectors; None: the mean."""
        if aggregator is None:
            return self.mean(kind)
        weights = torch.tensor([self._weights[client] for client in self._messages])
        return aggregator(self.vectors(kind), weights)

    def __len__(self) -> int:
        return len(self._messages)

    def _inbox(self, kind: str) -> Inbox:
        clients = self._weights.keys()
        return Inbox(
            self._codecs[kind], round=self._round, length=self._lengths[kind], clients=clients
        )

"""The server's side of a round: messages are checked one by one, the good ones averaged."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from featherweight.federated.codecs.codec import Codec, Message
from featherweight.federated.wire import Header, Refused

__all__ = ["Inbox", "Refused"]

Bytes = bytes  # inside `Inbox` the name is that of a property


class Inbox:
    """Collects the messages of one round from clients that need not be honest.

    A message that is refused leaves no trace: the mean is that of the others.

    Args:
        codec: reads the messages; with the same options as the clients'.
        round: that messages must belong to.
        length: of the vectors.
        clients: who may send; None for anybody.
        limit: largest message in bytes; None for what the codec can need at most.
        max_weight: largest weight that a message may claim; None for any that is finite.

    Example:
        >>> import torch
        >>> from featherweight.federated.codecs.identity import Identity
        >>> inbox = Inbox(Identity(), round=0, length=2)
        >>> inbox.add(Identity().encode(torch.tensor([1.0, 2.0]), round=0, client=7))
        >>> inbox.mean()
        tensor([1., 2.])
    """

    def __init__(
        self,
        codec: Codec,
        *,
        round: int,
        length: int,
        clients: Collection[int] | None = None,
        limit: int | None = None,
        max_weight: float | None = None,
    ) -> None:
        self.codec = codec
        self.round = round
        self.length = length
        self.limit = codec.most_bytes(length) if limit is None else limit
        self.max_weight = max_weight
        self._allowed = None if clients is None else frozenset(clients)
        self._messages: dict[int, Message] = {}

    def add(self, message: Bytes, *, sender: int | None = None) -> None:
        """Take a message in.

        Args:
            message: what arrived.
            sender: the client it came from, if the transport knows; it must say the same.

        Raises:
            Refused: with one line that says why. Nothing has changed then.
        """
        if isinstance(message, bytes) and len(message) > self.limit:
            raise Refused(f"{len(message)} bytes are more than the limit of {self.limit}")
        header = Header.unpack(message)
        self._check(header, sender)
        self._messages[header.client] = self.codec.read(message)

    def mean(self) -> Tensor:
        """Return the estimated weighted mean of what was taken in, [length], float32.

        Codecs that remember something of the clients learn it here: call it once a round.

        Raises:
            Refused: the inbox is empty.
        """
        return self.codec.combine(list(self._messages.values()))

    @property
    def clients(self) -> list[int]:
        """Who has sent, in order of arrival."""
        return list(self._messages)

    @property
    def weights(self) -> list[float]:
        """Their weights, in the same order, as they claimed them."""
        return [message.header.weight for message in self._messages.values()]

    @property
    def bytes(self) -> int:
        """Size of all messages taken in."""
        return sum(message.size for message in self._messages.values())

    def __len__(self) -> int:
        return len(self._messages)

    def _check(self, header: Header, sender: int | None) -> None:
        client = header.client
        if header.round != self.round:
            raise Refused(f"the round is {header.round}, not {self.round}")
        if header.length != self.length:
            raise Refused(f"the length is {header.length}, not {self.length}")
        if sender is not None and client != sender:
            raise Refused(f"client {sender} sent a message of client {client}")
        if self._allowed is not None and client not in self._allowed:
            raise Refused(f"client {client} takes no part in round {self.round}")
        if client in self._messages:
            raise Refused(f"client {client} has sent already")
        if self.max_weight is not None and header.weight > self.max_weight:
            raise Refused(f"the weight {header.weight:g} is larger than {self.max_weight:g}")

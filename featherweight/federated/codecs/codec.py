"""What a codec is: vectors to bytes on clients, many byte strings to one mean on the server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featherweight.common import unknown
from featherweight.federated.wire import (
    HEADER_BYTES,
    VALUE_BYTES,
    VALUES,
    Array,
    Floats,
    Header,
    Reader,
    Refused,
    as_vector,
    check_integer,
    check_weight,
    join,
)

Stateful = Literal["no", "client", "server"]


class Origin(NamedTuple):
    """Who sends a message and when."""

    round: int
    client: int


@dataclass(frozen=True)
class Body:
    """What a codec puts behind the header, and the fields of the header that depend on it."""

    parts: Sequence[Array]
    coding: int = 0
    parameter: int = 0
    count: int = 0


@dataclass(frozen=True)
class Message:
    """A message that has been read and found in order.

    Attributes:
        header: its fields.
        content: arrays, as the codec that read it understands them.
        size: bytes of the message.
    """

    header: Header
    content: tuple[Array, ...]
    size: int


class Codec(ABC):
    """Turns a vector into bytes, and the messages of a round into one mean.

    Subclasses write `_body` and `_content`, which are each other's inverse, and `_add`, or
    `combine` where the decoder looks at all messages together.

    Args:
        values: how values travel: "float32", "float16" or "bfloat16" (rounded to nearest).
        seed: of everything random; clients and server share it.

    Attributes:
        name: in the registry.
        number: on the wire.
        unbiased: the mean of ``decode_mean`` over the codec's randomness is the clients' mean.
        contractive: the squared error is at most (1 - a) times the squared norm for an a > 0, in
            expectation.
        separable: ``decode_mean`` is the weighted mean of the messages, decoded one by one.
        linear: messages of one round may be summed value by value before they are decoded.
        stateful: who has to keep something between rounds.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    unbiased: ClassVar[bool]
    contractive: ClassVar[bool]
    separable: ClassVar[bool] = True
    stateful: Stateful = "no"

    def __init__(self, *, values: str = "float32", seed: int = 0) -> None:
        if values not in VALUES:
            raise ValueError(unknown("type of values", values, VALUES))
        self.values = values
        self.seed = int(seed)

    @property
    def linear(self) -> bool:
        """Whether messages of one round may be summed value by value before they are decoded."""
        return False

    def encode(self, tensor: Tensor, *, round: int, client: int, weight: float = 1.0) -> bytes:
        """Return the message that a client sends.

        Args:
            tensor: [length], floating point; sent as float32.
            round: number of the round, below 2**32.
            client: number of the client, below 2**32.
            weight: in the mean, positive, up to a common factor; rounded to float32.

        Raises:
            ValueError: the tensor is not a vector of finite values below 2**64, or an argument is
                out of range.
        """
        origin = Origin(check_integer("round", round), check_integer("client", client))
        check_weight(weight)
        vector = as_vector(tensor)
        body = self._body(vector, origin)
        blank = self._header(len(vector), origin, float(weight))
        header = replace(blank, coding=body.coding, parameter=body.parameter, count=body.count)
        return join(header, body.parts)

    def read(self, message: bytes) -> Message:
        """Check a message whole.

        Raises:
            Refused: it is not what this codec would have sent.
        """
        header = Header.unpack(message)
        origin = Origin(header.round, header.client)
        blank = self._header(header.length, origin, header.weight)
        free = {n: getattr(header, n) for n in ("coding", "parameter", "count")}
        header.must_be(replace(blank, **free))
        reader = Reader(memoryview(message)[HEADER_BYTES:])
        content = self._content(header, reader)
        reader.end()
        return Message(header, content, len(message))

    def decode_mean(self, messages: Sequence[bytes]) -> Tensor:
        """Return the estimated weighted mean of the vectors behind a round's messages.

        Messages from strangers go through an `Inbox`, which knows how long they should be.

        Args:
            messages: one a client.

        Returns:
            [length], float32.

        Raises:
            Refused: a message is damaged, or they do not belong together.
        """
        return self.combine([self.read(message) for message in messages])

    def combine(self, messages: Sequence[Message]) -> Tensor:
        """Do what `decode_mean` does for messages that have been read."""
        weights = shares(messages)
        total = np.zeros(messages[0].header.length, np.float32)
        for message, weight in zip(messages, weights, strict=True):
            self._add(message, float(weight), total)
        return torch.from_numpy(total)

    def observe(self, loss: float, round: int) -> None:
        """Hear the mean loss of the clients of a round, at the model that it began with.

        Adaptive codecs set the levels of later rounds by it; the others do nothing.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be kept between rounds: tensors and plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: the state is another codec's.
        """
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)[:3]}")

    def expected_bytes(self, length: int, client: int = 0) -> int | None:
        """Return the exact size of a message, or None if it depends on the vector."""
        return None

    def excess(self, length: int) -> float | None:
        """Return w such that the expected squared error is at most w times the squared norm.

        None where the codec is biased, or no such number is known.
        """
        return None

    @abstractmethod
    def most_bytes(self, length: int) -> int:
        """Return a size that no message for vectors of this length exceeds."""

    def key(self) -> int:
        """Return the fingerprint of the seed that messages carry."""
        return 0

    @abstractmethod
    def _body(self, vector: Floats, origin: Origin) -> Body:
        """Return what follows the header."""

    @abstractmethod
    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        """Read and check what follows the header, and the header's fields that depend on it."""

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        """Add what a message says, times a weight, to ``total``."""
        raise NotImplementedError

    def _header(self, length: int, origin: Origin, weight: float) -> Header:
        kind = VALUES.index(self.values)
        return Header(
            self.number, 0, kind, 0, length, 0, origin.round, origin.client, weight, self.key()
        )

    def _value_bytes(self, count: int) -> int:
        return HEADER_BYTES + count * VALUE_BYTES[self.values]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._options())})"

    def _options(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if not name.startswith("_")]


def shares(messages: Sequence[Message]) -> Floats:
    """Return the weights of messages, made to sum to 1.

    Raises:
        Refused: there is no message, or they differ in length or round, or two have one client.
    """
    if not messages:
        raise Refused("there is no message to take the mean of")
    headers = [message.header for message in messages]
    for name in ("length", "round"):
        values = {getattr(header, name) for header in headers}
        if len(values) > 1:
            raise Refused(f"messages differ in their {name}: {sorted(values)[:3]}")
    if len({header.client for header in headers}) < len(headers):
        raise Refused("two messages come from one client")
    weights = np.array([header.weight for header in headers], np.float64)
    found: Floats = weights / weights.sum()
    return found

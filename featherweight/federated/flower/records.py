"""What lies in Flower's messages: bytes of a codec, plain numbers, nothing that is unpickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from featherweight.federated.wire import Refused

INLINE = 4 << 20  # bytes; Flower cuts arrays into chunks of 5 MiB, other records travel whole
STYPE = "featherweight.v1"
UP, DOWN, ASK, METRICS = "up", "down", "ask", "metrics"
REASON = 200  # characters of a client's words that are repeated


def pack(payloads: Mapping[str, bytes]) -> ConfigRecord | ArrayRecord:
    """Return a record of byte strings by name: one object on the wire while they are small."""
    if sum(len(payload) for payload in payloads.values()) <= INLINE:
        return ConfigRecord(dict(payloads))
    return ArrayRecord(
        {
            name: Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
            for name, payload in payloads.items()
        }
    )


def unpack(content: RecordDict, name: str) -> dict[str, bytes]:
    """Return the byte strings of a record made by `pack`.

    Raises:
        Refused: there is no such record, or it holds other things.
    """
    record = content.get(name)
    if isinstance(record, ArrayRecord):
        return {key: array.data for key, array in record.items()}
    if not isinstance(record, ConfigRecord):
        raise Refused(f"there is no record {name!r}")
    found = {key: value for key, value in record.items() if isinstance(value, bytes)}
    if len(found) < len(record):
        raise Refused(f"record {name!r} holds more than bytes")
    return found


@dataclass(frozen=True)
class Ask:
    """What a client is asked.

    Attributes:
        round: from 0.
        client: who is meant.
        weight: its weight in the mean.
        steps: local steps.
        rate: learning rate.
        levels: quantisation levels by kind of vector, where the server sets them.
    """

    round: int
    client: int
    weight: float
    steps: int
    rate: float
    levels: Mapping[str, int]

    def record(self) -> ConfigRecord:
        """Return the record that travels."""
        values = {"round": self.round, "client": self.client, "steps": self.steps}
        levels = {f"levels.{kind}": value for kind, value in self.levels.items()}
        return ConfigRecord({**values, **levels, "weight": self.weight, "rate": self.rate})

    @classmethod
    def read(cls, content: RecordDict) -> Ask:
        """Return what a message asks.

        Raises:
            KeyError: it asks nothing.
        """
        held = dict(content[ASK])
        prefix = "levels."
        names = [name for name in held if name.startswith(prefix)]
        levels = {name.removeprefix(prefix): held.pop(name) for name in names}
        return cls(**held, levels=levels)


@dataclass(frozen=True)
class Answer:
    """What a client sends.

    Attributes:
        payloads: messages of the codec by kind of vector.
        loss: mean over its steps.
        first: loss of the first step, at the weights it was sent.
        examples: whose gradient was computed.
    """

    payloads: Mapping[str, bytes]
    loss: float = math.nan
    first: float = math.nan
    examples: int = 0

    def content(self) -> RecordDict:
        """Return the content that travels."""
        numbers = {"loss": self.loss, "first": self.first, "num-examples": self.examples}
        return RecordDict({UP: pack(self.payloads), METRICS: MetricRecord(numbers)})

    @classmethod
    def read(cls, reply: Message) -> Answer:
        """Return what a reply holds; the payloads are not looked into.

        Raises:
            Refused: the client's app failed, or the reply has another form.
        """
        if reply.has_error():
            raise Refused(f"its app failed: {last_line(reply.error.reason)}")
        payloads = unpack(reply.content, UP)
        metrics = reply.content.get(METRICS)
        if not isinstance(metrics, MetricRecord):
            raise Refused(f"there is no record {METRICS!r}")
        loss, first = (_number(metrics, name) for name in ("loss", "first"))
        examples = metrics.get("num-examples")
        if not isinstance(examples, int) or not 0 <= examples < 2**53:
            raise Refused("num-examples is no number of examples")
        return cls(payloads, loss, first, examples)


def _number(metrics: MetricRecord, name: str) -> float:
    value = metrics.get(name)
    if not isinstance(value, float) or not abs(value) < 2.0**64:
        raise Refused(f"{name} is no finite number")
    return value


def last_line(text: str | None) -> str:
    """Return the last line of what went wrong, which is the error itself in a traceback."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:REASON] if lines else "no reason given"

"""Any Flower strategy, fed with updates that came through a codec."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from featherweight.federated.codecs.adaquantfl import AdaptiveQSGD
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.flower.compression import REST, TICKET, weight_of
from featherweight.federated.flower.flat import Flat
from featherweight.federated.flower.records import UP, unpack
from featherweight.federated.inbox import Inbox
from featherweight.federated.wire import Header, Refused


class Compressed(Strategy):  # type: ignore[misc]
    """A strategy whose clients run the mod `compression`.

    Where the codec decodes messages one by one, the strategy sees each client's arrays as they come
    out of it. Where the decoder looks at all messages together there is one mean, and every reply
    carries it: right for strategies that average (FedAvg, FedAdam and their like), useless for
    those that compare clients (medians, Krum).

    A reply that is not what it should be is dropped, with a line in the log. Strategies average
    integer arrays (batch norm's counter) to fractions; here they come back as the integers they
    were.

    Args:
        strategy: any that works with one array record a message.
        codec: with the same options as the clients'.
        loss_key: metric by which clients tell their loss; adaptive codecs need it.

    Raises:
        ValueError: the codec is adaptive, and ``loss_key`` is None.

    Example:
        ```python
        app = ClientApp(mods=[compression(TopKFeedback(0.01))])
        Compressed(FedAvg(), TopKFeedback(0.01)).start(grid, initial_arrays, num_rounds=10)
        ```
    """

    def __init__(self, strategy: Strategy, codec: Codec, *, loss_key: str | None = None) -> None:
        self.strategy, self.codec, self.loss_key = strategy, copy.deepcopy(codec), loss_key
        if isinstance(codec, AdaptiveQSGD) and loss_key is None:
            raise ValueError(f"{codec.name} sets its levels by the clients' loss: give loss_key=")
        self._arrays_key = getattr(strategy, "arrayrecord_key", "arrays")
        self._weight_key = getattr(strategy, "weighted_by_key", "num-examples")
        self._numbers: dict[int, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's messages, each with a ticket that tells the mod what to do."""
        self._before = Flat(arrays)
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        self._sent = [self._with_ticket(message, server_round) for message in messages]
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Turn messages into arrays again, and let the strategy have them."""
        numbers = {m.metadata.message_id: self._numbers[m.metadata.dst_node_id] for m in self._sent}
        inbox = Inbox(self.codec, round=server_round, length=self._before.length)
        good, failed = [], []
        for reply in replies:
            if reply.has_error():
                failed.append(reply)
                continue
            client = numbers[reply.metadata.reply_to_message_id]
            try:
                good.append((reply, self._take(reply, client, inbox)))
            except Refused as error:
                log(WARNING, "round %s: client %s left out: %s", server_round, client, error)
        self._restore(good, inbox)
        restored = [reply for reply, _ in good]
        self._observe(restored, server_round)
        found, metrics = self.strategy.aggregate_train(server_round, restored + failed)
        return None if found is None else self._before.cast(found), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's messages."""
        found: Iterable[Message]
        found = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return found

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's metrics."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Let the strategy say what it is."""
        self.strategy.summary()

    def _with_ticket(self, message: Message, round: int) -> Message:
        node = message.metadata.dst_node_id
        ticket: dict[str, Any] = {
            "round": round,
            "client": self._numbers.setdefault(node, len(self._numbers)),
            "arrays": self._arrays_key,
            "weight": self._weight_key,
        }
        if isinstance(self.codec, AdaptiveQSGD):
            ticket["levels"] = self.codec.levels
        return Message(
            RecordDict({**message.content, TICKET: ConfigRecord(ticket)}),
            dst_node_id=node,
            message_type=message.metadata.message_type,
            ttl=message.metadata.ttl,
            group_id=message.metadata.group_id,
        )

    def _take(self, reply: Message, client: int, inbox: Inbox) -> bytes:
        """Check all of a reply; the message goes into the inbox last."""
        payloads = unpack(reply.content, UP)
        message = payloads.get(self._arrays_key, b"")
        rest = reply.content.get(REST)
        if rest is not None and not isinstance(rest, ArrayRecord):
            raise Refused(f"record {REST!r} holds no arrays")
        self._before.check(rest or {})
        weight = np.float32(weight_of(reply.content, self._weight_key))
        if Header.unpack(message).weight != weight:
            raise Refused(f"the weight is not {self._weight_key}, {weight:g}")
        if self.loss_key is not None and not math.isfinite(weight_of(reply.content, self.loss_key)):
            raise Refused(f"{self.loss_key} is not finite")
        inbox.add(message, sender=client)
        return message

    def _restore(self, good: list[tuple[Message, bytes]], inbox: Inbox) -> None:
        """Put arrays in the place of messages."""
        if not good:
            return
        mean = None if self.codec.separable else inbox.mean()
        for reply, message in good:
            delta = self.codec.decode_mean([message]) if mean is None else mean
            del reply.content[UP]
            rest = reply.content.pop(REST, None) or {}
            filled = self._before.filled(self._before.vector + delta, rest)
            reply.content[self._arrays_key] = filled

    def _observe(self, replies: list[Message], round: int) -> None:
        if self.loss_key is None or not replies:
            return
        weights = [weight_of(reply.content, self._weight_key) for reply in replies]
        losses = [weight_of(reply.content, self.loss_key) for reply in replies]
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        self.codec.observe(total / sum(weights), round)

"""A mod that sends any client app's update through a codec."""

from __future__ import annotations

import copy
from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from featherweight.federated.codecs.adaquantfl import AdaptiveQSGD
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.flower.flat import Flat
from featherweight.federated.flower.records import UP, pack
from featherweight.federated.flower.state import read_state, write_state

TICKET = "featherweight.ticket"
REST = "featherweight.rest"

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def compression(codec: Codec) -> Mod:
    """Return a mod for ``ClientApp(mods=[...])`` or ``app.train(mods=[...])``.

    What the app sends is replaced by the bytes of the codec for the change of all floating-point
    arrays, as one vector; integer arrays travel as they are. The app knows nothing of it. Messages
    that are not from a server with `Compressed` pass untouched.

    Args:
        codec: with the same options as the server's. Copied for every message; what it keeps of the
            client lies in the state that Flower holds for the node.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        if not message.has_content() or TICKET not in message.content:
            return call_next(message, context)
        ticket = dict(message.content.pop(TICKET))
        before = Flat(message.content[ticket["arrays"]])
        reply = call_next(message, context)
        return reply if reply.has_error() else _compressed(reply, context, codec, before, ticket)

    return mod


def _compressed(
    reply: Message, context: Context, codec: Codec, before: Flat, ticket: dict[str, object]
) -> Message:
    codec = copy.deepcopy(codec)
    if codec.stateful == "client":
        codec.load_state_dict(read_state(context.state).get("codec", {}))
    if isinstance(codec, AdaptiveQSGD):
        codec.levels = int(str(ticket["levels"]))
    name = str(ticket["arrays"])
    after = Flat(reply.content.pop(name))
    message = codec.encode(
        after.vector - before.vector,
        round=int(str(ticket["round"])),
        client=int(str(ticket["client"])),
        weight=weight_of(reply.content, str(ticket["weight"])),
    )
    reply.content[UP] = pack({name: message})
    if after.rest:
        reply.content[REST] = ArrayRecord(after.rest)
    if codec.stateful == "client":
        write_state(context.state, {"codec": codec.state_dict()})
    return reply


def weight_of(content: RecordDict, key: str) -> float:
    """Return the weight of a client in the mean, 1 where no metric has that name."""
    for record in content.values():
        if isinstance(record, MetricRecord) and isinstance(record.get(key), int | float):
            return float(record[key])
    return 1.0

"""Which node is which client, and questions that wait for answers."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

PAUSE = 0.2  # seconds between looks for replies
CLIENT = "client"
GRADIENT_ACTION = "gradient"

Key = TypeVar("Key", bound=Hashable)


def exchange(grid: Grid, messages: Mapping[Key, Message], timeout: float) -> dict[Key, Message]:
    """Send messages, and return the replies that come in time.

    Args:
        grid: Flower's.
        messages: by any key.
        timeout: seconds.

    Returns:
        Replies by the same keys, errors among them.
    """
    grid.push_messages(list(messages.values()))
    waiting = {message.metadata.message_id: key for key, message in messages.items()}
    found: dict[Key, Message] = {}
    end = time.monotonic() + timeout
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            found[waiting.pop(reply.metadata.reply_to_message_id)] = reply
        if not waiting or time.monotonic() >= end:
            break
        time.sleep(PAUSE)
    return found


class Roll:
    """Nodes by the number of the client that they say they are.

    A node's number changes with every start, so that nothing can be told by it. Who says first that
    it is a client is that client, until it goes away or is struck off.

    Args:
        clients: how many there are.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self._nodes: dict[int, int] = {}

    def find(self, grid: Grid, wanted: Collection[int], patience: float) -> dict[int, int]:
        """Return the nodes of clients, waiting for those that are not there yet.

        Args:
            grid: Flower's.
            wanted: numbers of clients.
            patience: seconds to wait at most.

        Returns:
            Nodes by client; those that didn't come are left out.
        """
        end = time.monotonic() + patience
        while True:
            self._update(grid, max(0.0, end - time.monotonic()))
            if all(client in self._nodes for client in wanted) or time.monotonic() >= end:
                return {c: self._nodes[c] for c in wanted if c in self._nodes}
            time.sleep(PAUSE)

    def strike(self, clients: Collection[int]) -> None:
        """Forget the nodes of clients that did not answer; any node may be them from now on."""
        for client in clients:
            self._nodes.pop(client, None)

    def _update(self, grid: Grid, timeout: float) -> None:
        present = set(grid.get_node_ids())
        self._nodes = {c: node for c, node in self._nodes.items() if node in present}
        strangers = present - set(self._nodes.values())
        questions = {
            node: Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(strangers)
        }
        if questions:
            for node, reply in exchange(grid, questions, timeout).items():
                self._enter(node, reply)

    def _enter(self, node: int, reply: Message) -> None:
        record = None if reply.has_error() else reply.content.get(CLIENT)
        client = record.get(CLIENT) if isinstance(record, MetricRecord) else None
        if isinstance(client, int) and 0 <= client < self.clients:
            self._nodes.setdefault(client, node)

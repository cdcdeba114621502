"""A grid whose nodes answer in this process, as Flower's grids look to a strategy."""

import itertools
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


def context_of(partition, node=1, run_config=None):
    return Context(
        run_id=1,
        node_id=node,
        node_config=UserConfig({"partition-id": partition}),
        state=RecordDict(),
        run_config=UserConfig(run_config or {}),
    )


class LoopGrid(Grid):
    """Nodes by id: an app and a context each. `tamper` may change a reply, or return None."""

    def __init__(self, app, partitions, tamper: Callable | None = None):
        # messages take these from the process, which Flower marks when it starts a server app
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.app, self.tamper = app, tamper or (lambda node, message, reply: reply)
        self.contexts = {}
        self._ids = itertools.count(1)
        self._replies = {}
        self.asked = []
        for partition in partitions:
            self.join(partition)

    def join(self, partition):
        node = 1000 + 7 * len(self.contexts) + partition
        self.contexts[node] = context_of(partition, node)
        return node

    def leave(self, node):
        del self.contexts[node]

    def set_run(self, run): ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = identity = str(next(self._ids))
            ids.append(identity)
            node = message.metadata.dst_node_id
            self.asked.append((message.metadata.message_type, node))
            reply = self.tamper(node, message, self._answer(node, message))
            if reply is not None:
                self._replies[identity] = reply
        return ids

    def _answer(self, node, message):
        if node not in self.contexts:
            return Message(Error(5, "gone"), reply_to=message)
        inner = Message(
            RecordDict(dict(message.content)),
            dst_node_id=node,
            message_type=message.metadata.message_type,
        )
        inner.metadata.__dict__.update(message.metadata.__dict__)
        try:
            return self.app(inner, self.contexts[node])
        except Exception as error:
            return Message(Error(2, f"Traceback\n{type(error).__name__}: {error}"), reply_to=inner)

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        ids = self.push_messages(list(messages))
        return self.pull_messages(ids)

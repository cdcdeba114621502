"""Ready apps: what Flower runs on its nodes and beside its SuperLink."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from featherweight.federated.codecs.codec import Codec
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.flower.client import Client
from featherweight.federated.flower.records import DOWN, Answer, Ask, unpack
from featherweight.federated.flower.roll import CLIENT, GRADIENT_ACTION
from featherweight.federated.flower.state import read_state, write_state
from featherweight.federated.flower.strategy import FlowerStrategy
from featherweight.federated.simulate import Simulation

PARTITION = "partition-id"


def client_app(make: Callable[[Context], Simulation], down: Codec | None = None) -> ClientApp:
    """Return a client app that answers a `FlowerStrategy`.

    A node is client number ``partition-id`` of its node configuration. A message that asks for what
    was answered already gets the same answer again, so that a server may ask twice.

    Args:
        make: builds the simulation whose client the node is, by the context of the node; with the
            same options as the server's. It is called for every message: cache what it builds where
            a process answers more than one.
        down: the codec of what comes down, as the strategy's.
    """
    app, codec = ClientApp(), Identity() if down is None else down

    def query(message: Message, context: Context) -> Message:
        numbers = MetricRecord({CLIENT: int(context.node_config[PARTITION])})
        return Message(RecordDict({CLIENT: numbers}), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, make, codec, Client.train)

    def gradient(message: Message, context: Context) -> Message:
        return _answer(message, context, make, codec, Client.gradient)

    app.query()(query)
    app.train()(train)
    app.train(GRADIENT_ACTION)(gradient)
    return app


def _answer(
    message: Message,
    context: Context,
    make: Callable[[Context], Simulation],
    codec: Codec,
    work: Callable[[Client], Answer],
) -> Message:
    ask, state = Ask.read(message.content), read_state(context.state)
    if ask.client != int(context.node_config[PARTITION]):
        raise ValueError(f"this is client {context.node_config[PARTITION]}, not {ask.client}")
    name = f"{work.__name__} {ask.round}"
    if name in state.get("answered", {}):
        answer = Answer(**state["answered"][name])
        return Message(answer.content(), reply_to=message)
    vector = codec.decode_mean([unpack(message.content, DOWN)["model"]])
    client = Client(make(context), ask, vector, state)
    answer = work(client)
    kept = client.state()
    if kept["algorithm"] or kept["codecs"]:
        write_state(context.state, {**kept, "answered": {name: vars(answer)}})
    return Message(answer.content(), reply_to=message)


def server_app(
    make: Callable[[Context], FlowerStrategy],
    rounds: Callable[[Context, FlowerStrategy], int],
    *,
    timeout: Callable[[Context], float] = lambda context: 3600.0,
    evaluate: Callable[[FlowerStrategy], MetricRecord | None] | None = None,
    finish: Callable[[Context, FlowerStrategy], None] | None = None,
) -> ServerApp:
    """Return a server app that runs a `FlowerStrategy`.

    Args:
        make: builds the strategy, by the context of the run.
        rounds: how many to run.
        timeout: seconds to wait for the replies of a round, before those missing are asked anew.
            Asked for after ``make``, like ``rounds``.
        evaluate: of the server's model, after each round.
        finish: called at the end.
    """
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        strategy = make(context)

        def judge(_: int, arrays: ArrayRecord) -> MetricRecord | None:
            return None if evaluate is None else evaluate(strategy)

        strategy.start(
            grid,
            strategy.arrays(),
            num_rounds=rounds(context, strategy),
            timeout=timeout(context),
            evaluate_fn=judge,
        )
        if finish is not None:
            finish(context, strategy)

    app.main()(main)
    return app

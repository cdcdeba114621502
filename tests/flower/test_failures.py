import math
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featherweight.federated.algorithms import Mime, Scaffold
from featherweight.federated.codecs import CODECS
from featherweight.federated.flower import FlowerStrategy, client_app
from featherweight.federated.flower.gather import Gathered
from featherweight.federated.local import Local
from featherweight.federated.wire import Refused

from .loop import LoopGrid, context_of
from .population import CLIENTS, make_simulation
from .test_strategy import on_flower

LIAR = 2


def liar(change):
    """Return a tamper that changes the training replies of client `LIAR`."""

    def tamper(node, message, reply):
        asked = message.metadata.message_type.startswith("train")
        client = message.content["ask"]["client"] if asked else None
        return change(message, reply) if client == LIAR else reply

    return tamper


def payload(reply, change):
    up = reply.content["up"]
    reply.content["up"] = ConfigRecord({kind: change(message) for kind, message in up.items()})
    return reply


def header(offset, kind, value):
    def change(message):
        size = struct.calcsize(kind)
        return message[:offset] + struct.pack("<" + kind, value) + message[offset + size :]

    return change


def metrics(**values):
    def change(message, reply):
        reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **values})
        return reply

    return change


def content(**records):
    def change(message, reply):
        return Message(RecordDict(records), reply_to=message)

    return change


LIES = {
    "the magic": lambda m, r: payload(r, lambda b: b"XX" + b[2:]),
    "bytes are shorter": lambda m, r: payload(r, lambda b: b[:10]),
    "the body ends": lambda m, r: payload(r, lambda b: b[:-1]),
    "more than the limit": lambda m, r: payload(r, lambda b: b + b"x"),
    "the round is 9": lambda m, r: payload(r, header(16, "I", 9)),
    "sent a message of client 0": lambda m, r: payload(r, header(20, "I", 0)),
    "the weight of update is not": lambda m, r: payload(r, header(24, "f", 1e6)),
    "the length is 4294967295": lambda m, r: payload(r, header(8, "I", 2**32 - 1)),
    "not finite": lambda m, r: payload(r, lambda b: b[:-4] + struct.pack("<f", math.inf)),
    "loss is no finite number": metrics(loss=math.nan),
    "first is no finite number": metrics(first=math.inf),
    "num-examples is no number": metrics(**{"num-examples": -1}),
    "there is no record 'up'": content(),
    "there is no record 'metrics'": lambda m, r: content(up=r.content["up"])(m, r),
    "holds more than bytes": content(up=ConfigRecord({"update": 3})),
    "it sent ['other']": content(
        up=ConfigRecord({"other": b""}),
        metrics=MetricRecord({"loss": 1.0, "first": 1.0, "num-examples": 3}),
    ),
    "it sent ['weights']": content(
        up=ArrayRecord({"weights": Array(np.zeros(3))}),
        metrics=MetricRecord({"loss": 1.0, "first": 1.0, "num-examples": 3}),
    ),
    "its app failed: last": lambda m, r: Message(Error(2, "first\nlast"), reply_to=m),
    "its app failed: no reason": lambda m, r: Message(Error(0), reply_to=m),
}


def everyone(**options):
    return make_simulation(size=CLIENTS, **options)


def without_liar():
    """What the server's weights are where the liar isn't there."""
    strategy, _ = on_flower(everyone, 1, [c for c in range(CLIENTS) if c != LIAR], attempts=1)
    assert strategy.records[0].refused == {LIAR: "no reply from it"}
    return strategy.simulation.weights


@pytest.mark.parametrize("reason", LIES)
def test_a_lie_is_refused_and_the_mean_is_that_of_the_others(reason):
    strategy, _ = on_flower(everyone, 1, tamper=liar(LIES[reason]), attempts=1)
    refused = strategy.records[0].refused
    assert list(refused) == [LIAR]
    assert reason in refused[LIAR]
    assert "\n" not in refused[LIAR]
    assert torch.equal(strategy.simulation.weights, without_liar())


def test_a_client_counts_with_all_its_vectors_or_none():
    def spoil(message, reply):
        up = dict(reply.content["up"])
        reply.content["up"] = ConfigRecord({**up, "variate": up["variate"][:-1]})
        return reply

    def make():
        return everyone(algorithm=Scaffold())

    strategy, _ = on_flower(make, 1, tamper=liar(spoil), attempts=1)
    absent, _ = on_flower(make, 1, [c for c in range(CLIENTS) if c != LIAR], attempts=1)
    assert "the body ends" in strategy.records[0].refused[LIAR]
    assert torch.equal(strategy.simulation.weights, absent.simulation.weights)
    variates = [s.simulation.algorithm.variate for s in (strategy, absent)]
    assert torch.equal(*variates)


def test_a_lost_gradient_does_not_keep_a_client_from_training():
    def spoil(message, reply):
        gradient = message.metadata.message_type == "train.gradient"
        return payload(reply, lambda b: b[:-1]) if gradient else reply

    strategy, _ = on_flower(lambda: everyone(algorithm=Mime()), 1, tamper=liar(spoil))
    assert not strategy.records[0].refused
    others = torch.tensor([c != LIAR for c in range(CLIENTS)])
    twice, _ = on_flower(lambda: everyone(algorithm=Mime()), 1)
    assert torch.equal(strategy.records[0].bytes_up[others], twice.records[0].bytes_up[others])
    assert not torch.equal(strategy.simulation.weights, twice.simulation.weights)


def test_a_round_without_any_reply_leaves_the_weights():
    before = everyone().weights
    strategy, _ = on_flower(everyone, 2, tamper=lambda n, m, r: None, attempts=1)
    assert torch.equal(strategy.simulation.weights, before)
    assert [len(record.refused) for record in strategy.records] == [CLIENTS, CLIENTS]


def test_a_client_whose_node_died_is_asked_again_at_its_new_node():
    grid = LoopGrid(client_app(lambda context: everyone()), range(CLIENTS))
    dead = next(n for n, c in grid.contexts.items() if c.node_config["partition-id"] == LIAR)

    def die(node, message, reply):
        if node == dead and message.metadata.message_type == "train":
            if node in grid.contexts:
                grid.leave(node)
                grid.join(LIAR)
            return None
        return reply

    grid.tamper = die
    strategy = FlowerStrategy(everyone(), patience=0.0)
    strategy.start(grid, strategy.arrays(), num_rounds=2)
    simulation = everyone()
    list(simulation.rounds(2))
    assert [record.refused for record in strategy.records] == [{}, {}]
    torch.testing.assert_close(strategy.simulation.weights, simulation.weights)


def test_an_error_of_a_lost_node_is_asked_again_and_that_of_an_app_is_not():
    for code, refused in ((5, 0), (8, 0), (2, 1), (6, 1)):
        seen = []

        def fail(message, reply, code=code, seen=seen):
            seen.append(message)
            return Message(Error(code, "x"), reply_to=message) if len(seen) == 1 else reply

        strategy, _ = on_flower(everyone, 1, tamper=liar(fail))
        assert len(strategy.records[0].refused) == refused


def test_asked_twice_a_client_with_a_state_moves_it_once():
    def make():
        return make_simulation(Scaffold(), codec=CODECS["top-k-feedback"].method(k=0.2))

    seen = []

    def lose_first(message, reply):
        seen.append(message)
        return None if len(seen) == 1 else reply

    strategy, _ = on_flower(make, 6, tamper=liar(lose_first))
    simulation = make()
    list(simulation.rounds(6))
    assert len(seen) > 2
    torch.testing.assert_close(
        strategy.simulation.weights, simulation.weights, rtol=2e-5, atol=2e-6
    )


def test_two_nodes_that_claim_one_client_are_one():
    strategy, grid = on_flower(everyone, 1, [*range(CLIENTS), LIAR])
    trained = [node for kind, node in grid.asked if kind == "train"]
    assert len(trained) == len(set(trained)) == CLIENTS
    assert not strategy.records[0].refused


def test_a_node_that_is_no_client_is_left_alone():
    _, grid = on_flower(everyone, 1, [*range(CLIENTS), CLIENTS, -1])
    nobody = [
        n for n, c in grid.contexts.items() if not 0 <= c.node_config["partition-id"] < CLIENTS
    ]
    assert not [n for kind, n in grid.asked if kind == "train" and n in nobody]


def test_an_update_that_is_not_finite_stays_at_home():
    def make():
        return everyone(local=Local(learning_rate=1e30, steps=3))

    strategy, _ = on_flower(make, 1)
    refused = strategy.records[0].refused
    assert refused == dict.fromkeys(
        range(CLIENTS), "its app failed: ValueError: its update is not finite"
    )
    assert torch.equal(strategy.simulation.weights, make().weights)


def test_a_client_refuses_a_question_for_another():
    app = client_app(lambda context: everyone())
    grid = LoopGrid(app, range(CLIENTS))
    strategy = FlowerStrategy(everyone(), patience=0.0)
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    with pytest.raises(ValueError, match="this is client 5, not 0"):
        app(next(iter(messages)), context_of(5))


def test_a_client_refuses_a_vector_of_another_model():
    def other():
        simulation = everyone()
        simulation._buffers = torch.zeros(3)
        return simulation

    strategy = FlowerStrategy(other(), patience=0.0)
    grid = LoopGrid(client_app(lambda context: everyone()), range(CLIENTS))
    strategy.start(grid, strategy.arrays(), num_rounds=1)
    assert "values came down, the model wants" in strategy.records[0].refused[0]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.integers(0, 40))
def test_bytes_of_any_kind_are_refused_and_leave_no_trace(junk, cut):
    codec = CODECS["rand-k"].method(k=4, seed=1)
    gathered = Gathered({"update": codec}, {"update": 9}, 0, {0: 1.0, 1: 2.0})
    honest = codec.encode(torch.arange(9.0), round=0, client=0)
    gathered.add(0, {"update": honest})
    before = gathered.mean("update")
    good = codec.encode(torch.ones(9), round=0, client=1, weight=2.0)
    spoiled = good[:cut] + junk
    if spoiled != good:
        with pytest.raises(Refused):
            gathered.add(1, {"update": spoiled if len(spoiled) != len(good) else spoiled[:-1]})
    assert torch.equal(gathered.mean("update"), before)


def test_a_client_counts_once():
    codec = CODECS["identity"].method()
    gathered = Gathered({"update": codec}, {"update": 3}, 0, {0: 1.0})
    message = {"update": codec.encode(torch.ones(3), round=0, client=0)}
    assert gathered.add(0, message) == 32 + 12
    with pytest.raises(Refused, match="client 0 has sent already"):
        gathered.add(0, message)

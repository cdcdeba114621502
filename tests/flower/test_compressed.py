"""Somebody's app, which knows nothing of codecs, with and without the pair of mod and strategy."""

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from torch import nn

from featherweight.federated.codecs import CODECS
from featherweight.federated.flower import Compressed, compression
from featherweight.federated.flower.flat import Flat
from featherweight.federated.wire import Refused

from .loop import LoopGrid

NODES = 4


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 2))


def app_of(mods):
    app = ClientApp(mods=mods)

    def train(message, context):
        assert set(message.content) == {"arrays", "config"}  # nothing is there that is not theirs
        model = make_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        partition = context.node_config["partition-id"]
        generator = torch.Generator().manual_seed(partition)
        inputs = torch.randn(10 + partition, 5, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(inputs), "train-loss": loss.item()})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    app.train()(train)
    app.query()(lambda message, context: Message(RecordDict(), reply_to=message))
    return app


def plain(kind=FedAvg, **options):
    given = {"fraction_evaluate": 0.0, "min_available_nodes": NODES, "min_train_nodes": NODES}
    return kind(**given, min_evaluate_nodes=0, **options)


def run(strategy, mods=(), rounds=2, tamper=None):
    grid = LoopGrid(app_of(list(mods)), range(NODES), tamper)
    arrays = ArrayRecord(make_model().state_dict())
    return strategy.start(grid, arrays, num_rounds=rounds), grid


def pair(codec, kind=FedAvg, **options):
    return Compressed(plain(kind), codec, **options), [compression(codec)]


def assert_close(left, right, tolerance=1e-6):
    assert left.arrays["1.num_batches_tracked"].dtype == "int64"
    left, right = (result.arrays.to_torch_state_dict() for result in (left, right))
    assert left.keys() == right.keys()
    for name in left.keys() - {"1.num_batches_tracked"}:
        close = torch.testing.assert_close
        close(left[name], right[name].to(left[name]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [FedAvg, FedAdam, FedMedian])
def test_with_all_values_sent_nothing_changes(kind):
    strategy, mods = pair(CODECS["identity"].method(), kind)
    ours, _ = run(strategy, mods)
    theirs, _ = run(plain(kind))
    assert_close(ours, theirs, 1e-5)
    for round, metrics in theirs.train_metrics_clientapp.items():
        assert dict(ours.train_metrics_clientapp[round]) == pytest.approx(dict(metrics))


def test_a_joint_decoder_that_sees_everything_gives_the_mean():
    codec = CODECS["rand-k-spatial"].method(k=1.0, seed=3)
    assert not codec.separable
    assert_close(run(*pair(codec))[0], run(plain())[0], 1e-5)


def test_a_joint_decoder_s_mean_reaches_the_strategy():
    codec = CODECS["rand-k-spatial"].method(k=0.5, seed=3)
    before = Flat(ArrayRecord(make_model().state_dict()))
    grid = LoopGrid(app_of([]), range(NODES))
    inner = plain()
    dense = grid.send_and_receive(
        inner.configure_train(1, ArrayRecord(make_model().state_dict()), ConfigRecord(), grid)
    )
    numbers = {
        node: number
        for number, node in enumerate(
            dict.fromkeys(
                reply.metadata.src_node_id
                for reply in sorted(dense, key=lambda r: r.metadata.src_node_id)
            )
        )
    }
    messages = [
        codec.encode(
            Flat(reply.content["arrays"]).vector - before.vector,
            round=1,
            client=numbers[reply.metadata.src_node_id],
            weight=reply.content["metrics"]["num-examples"],
        )
        for reply in dense
    ]
    expected = before.vector + codec.decode_mean(messages)
    strategy, mods = pair(codec)
    strategy._numbers.update(numbers)
    result, _ = run(strategy, mods, rounds=1)
    torch.testing.assert_close(Flat(result.arrays).vector, expected, rtol=1e-5, atol=1e-6)


def test_error_feedback_is_kept_in_the_node_s_state():
    codec = CODECS["top-k-feedback"].method(k=0.3)
    strategy, mods = pair(codec)
    result, grid = run(strategy, mods, rounds=40)
    for context in grid.contexts.values():
        assert "featherweight.arrays" in context.state
    assert_close(result, run(plain(), rounds=40)[0], 0.05)


def test_what_travels_is_small():
    sizes = []

    def weigh(node, message, reply):
        sizes.append(sum(record.count_bytes() for record in reply.content.values()))
        return reply

    codec = CODECS["rand-k"].method(k=4, values="float16", seed=1)
    strategy, mods = pair(codec)
    run(strategy, mods, rounds=1, tamper=weigh)
    compressed = max(sizes)
    sizes.clear()
    run(plain(), rounds=1, tamper=weigh)
    # 32 + 4 * 2 bytes of ours, the counter of batch norm as .npy, and two metrics
    assert compressed < 400 < 1000 < min(sizes)


def test_adaptive_levels_go_down_and_the_loss_comes_back():
    levels = []

    def note(node, message, reply):
        levels.append(message.content["featherweight.ticket"]["levels"])
        return reply

    codec = CODECS["adaquantfl"].method(levels=2, seed=1)
    strategy, mods = pair(codec, loss_key="train-loss")
    run(strategy, mods, rounds=12, tamper=note)
    assert levels[0] == codec.levels
    assert levels[-1] > levels[0]
    assert len(set(levels[:NODES])) == 1
    with pytest.raises(ValueError, match="adaquantfl sets its levels by the clients' loss"):
        Compressed(plain(), codec)


def test_without_the_strategy_the_mod_does_nothing():
    codec = CODECS["rand-k"].method(k=1, seed=1)
    ours, theirs = run(plain(), [compression(codec)])[0], run(plain())[0]
    for name, array in ours.arrays.items():
        np.testing.assert_allclose(array.numpy(), theirs.arrays[name].numpy(), atol=1e-6)


def spoil_up(reply):
    up = reply.content["up"]
    reply.content["up"] = ConfigRecord({name: message[:-1] for name, message in up.items()})


def spoil_weight(reply):
    reply.content["metrics"]["num-examples"] = 10**6


def spoil_rest(reply):
    name = "1.num_batches_tracked"
    reply.content["featherweight.rest"] = ArrayRecord({name: Array(np.zeros(10**5))})


def drop_rest(reply):
    del reply.content["featherweight.rest"]


def no_rest(reply):
    reply.content["featherweight.rest"] = MetricRecord({})


def no_message(reply):
    del reply.content["up"]


@pytest.mark.parametrize(
    "spoil", [spoil_up, spoil_weight, spoil_rest, drop_rest, no_rest, no_message]
)
@pytest.mark.parametrize("name", ["rand-k", "rand-k-spatial"])
def test_a_spoiled_reply_is_dropped(spoil, name):
    codec = CODECS[name].method(k=0.5, seed=1)

    def tamper(node, message, reply):
        if message.metadata.message_type == "train" and node == 1000:
            spoil(reply)
        return reply

    def lose(node, message, reply):
        lost = message.metadata.message_type == "train" and node == 1000
        return None if lost else reply

    def numbered():
        strategy, mods = pair(codec)
        strategy._numbers.update({1000 + 8 * i: i for i in range(NODES)})
        return strategy, mods

    assert_close(
        run(*numbered(), rounds=1, tamper=tamper)[0], run(*numbered(), rounds=1, tamper=lose)[0]
    )


def test_errors_reach_the_strategy():
    def boom(message, context, call_next):
        raise RuntimeError("boom")

    codec = CODECS["identity"].method()
    strategy = Compressed(plain(), codec)
    result, _ = run(strategy, [compression(codec), boom], rounds=1)
    assert not result.train_metrics_clientapp


def test_flat_puts_values_back_where_they_were():
    arrays = ArrayRecord(
        {
            "a": Array(np.arange(6, dtype=np.float64).reshape(2, 3)),
            "n": Array(np.array(3)),
            "b": Array(np.ones((), np.float16)),
        }
    )
    flat = Flat(arrays)
    assert flat.vector.tolist() == [0.0, 1, 2, 3, 4, 5, 1]
    back = flat.filled(flat.vector + 1, {"n": Array(np.array(9))})
    assert list(back) == ["a", "n", "b"]
    assert back["a"].numpy().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert back["a"].numpy().dtype == np.float64
    assert back["b"].numpy() == np.float16(2)
    assert back["n"].numpy() == 9
    for wrong in (np.zeros(2, np.int64), np.array(3, np.int32), np.array(3.0)):
        with pytest.raises(Refused, match="array n has another shape or dtype"):
            flat.check({"n": Array(wrong)})
    with pytest.raises(Refused, match="it sent"):
        flat.check({})
    with pytest.raises(ValueError, match="no floating-point"):
        Flat(ArrayRecord({"n": Array(np.array(3))}))

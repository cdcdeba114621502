"""What holds for every registered codec."""

import numpy as np
import pytest
import torch

from featherweight.federated.codecs import CODECS, RandK, TopK
from featherweight.federated.inbox import Inbox, Refused
from featherweight.federated.wire import HEADER_BYTES
from tests.federated.codec_rows import ROWS, VECTOR

every = pytest.mark.parametrize("name", ROWS)


def encoded(codec, vectors, round=0, weights=None):
    weights = weights or [1.0] * len(vectors)
    return [
        codec.encode(vector, round=round, client=client, weight=weight)
        for client, (vector, weight) in enumerate(zip(vectors, weights, strict=True))
    ]


def test_every_codec_has_a_row():
    assert set(ROWS) == set(CODECS)


@every
def test_golden_messages(name):
    """Bytes never change within a version of the format; levels and choices come from the seed."""
    codec = ROWS[name].make()
    assert codec.encode(VECTOR, round=3, client=9, weight=2.0).hex() == ROWS[name].golden


@every
def test_names_and_numbers(name):
    assert CODECS[name].method.name == name
    assert type(ROWS[name].make()) is CODECS[name].method


@every
def test_sizes_are_as_predicted(name):
    for length in (8, 9, 64, 1000):
        codec = ROWS[name].make()
        message = codec.encode(torch.randn(length), round=0, client=1)
        expected = codec.expected_bytes(length, 1)
        assert expected in (None, len(message))
        assert len(message) <= codec.most_bytes(length)
        assert len(message) >= HEADER_BYTES


@every
def test_messages_repeat_and_the_mean_is_finite(name):
    vectors = torch.randn(5, 30)
    one, other = ROWS[name].make(), ROWS[name].make()
    messages = encoded(one, vectors)
    assert messages == encoded(other, vectors)
    mean = one.decode_mean(messages)
    assert mean.shape == (30,)
    assert mean.dtype == torch.float32
    assert mean.is_contiguous()
    assert torch.isfinite(mean).all()


@every
def test_order_of_messages_does_not_matter(name):
    messages = encoded(ROWS[name].make(), torch.randn(6, 40))
    forward = ROWS[name].make().decode_mean(messages)
    backward = ROWS[name].make().decode_mean(messages[::-1])
    torch.testing.assert_close(forward, backward)


@every
def test_equal_weights_are_the_plain_mean(name):
    vectors = torch.randn(4, 40)
    plain = ROWS[name].make().decode_mean(encoded(ROWS[name].make(), vectors))
    weighted = encoded(ROWS[name].make(), vectors, weights=[7.0] * 4)
    torch.testing.assert_close(ROWS[name].make().decode_mean(weighted), plain)


@every
def test_a_zero_vector_stays_zero(name):
    codec = ROWS[name].make()
    assert torch.equal(codec.decode_mean(encoded(codec, torch.zeros(3, 20))), torch.zeros(20))


@every
def test_encoding_leaves_the_vector_alone(name):
    vector = torch.randn(20)
    before = vector.clone()
    ROWS[name].make().encode(vector, round=0, client=0)
    assert torch.equal(vector, before)


@every
def test_double_and_half_vectors_are_sent_as_float32(name):
    vector = torch.randn(20, dtype=torch.bfloat16)
    messages = [
        ROWS[name].make().encode(vector.to(kind), round=0, client=0)
        for kind in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert messages[0] == messages[1] == messages[2]


@every
def test_state_carries_on_exactly(name):
    """Three rounds in one go, and with the state moved to a new codec before the last."""
    vectors = torch.randn(3, 4, 25)
    whole, first, second = (ROWS[name].make() for _ in range(3))
    for round, codec in ((0, first), (1, first), (2, second)):
        if round == 2:
            state = first.state_dict()
            assert all(isinstance(v, (torch.Tensor, int, float)) for v in state.values())
            second.load_state_dict(state)
        means = []
        for one in (whole, codec):
            one.observe(1.0 / (1 + round), round)
            means.append(one.decode_mean(encoded(one, vectors[round], round)))
        assert torch.equal(*means)


@every
def test_foreign_states_are_refused(name):
    with pytest.raises(ValueError, match="state"):
        ROWS[name].make().load_state_dict({"nonsense": 1.0})


@every
def test_loading_copies(name):
    codec, other = ROWS[name].make(), ROWS[name].make()
    codec.decode_mean(encoded(codec, torch.randn(2, 20)))
    state = codec.state_dict()
    other.load_state_dict(state)
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.fill_(float("nan"))
    mean = other.decode_mean(encoded(other, torch.randn(2, 20), 1))
    assert torch.isfinite(mean).all()


@every
@pytest.mark.parametrize(
    "bad",
    [
        {"round": -1},
        {"round": 2**32},
        {"client": -1},
        {"client": 1.5},
        {"client": True},
        {"weight": 0.0},
        {"weight": float("nan")},
    ],
)
def test_bad_arguments_are_named(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ROWS[name].make().encode(torch.ones(8), **({"round": 0, "client": 0} | bad))


@every
def test_messages_that_do_not_belong_together(name):
    codec = ROWS[name].make()
    message = codec.encode(torch.randn(20), round=0, client=0)
    longer = codec.encode(torch.randn(21), round=0, client=1)
    later = codec.encode(torch.randn(20), round=1, client=2)
    for messages, reason in (
        ([], "no message"),
        ([message, message], "one client"),
        ([message, longer], "length"),
        ([message, later], "round"),
    ):
        with pytest.raises(Refused, match=reason):
            codec.decode_mean(messages)


@every
def test_another_codecs_message_is_refused(name):
    codec = ROWS[name].make()
    for other in ROWS:
        if ROWS[other].golden[:8] != ROWS[name].golden[:8]:
            with pytest.raises(Refused, match="codec is"):
                codec.read(bytes.fromhex(ROWS[other].golden))


@every
def test_every_cut_and_any_tail_is_refused(name):
    codec = ROWS[name].make()
    message = bytes.fromhex(ROWS[name].golden)
    for end in range(len(message)):
        with pytest.raises(Refused):
            codec.read(message[:end])
    with pytest.raises(Refused, match="follow the end"):
        codec.read(message + b"\0")


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].make().separable])
def test_separable_means_are_means_of_single_messages(name):
    codec = ROWS[name].make()
    messages = encoded(codec, torch.randn(3, 40), weights=[1.0, 2.0, 5.0])
    single = torch.stack([codec.decode_mean([message]) for message in messages])
    expected = (single * torch.tensor([[1.0], [2.0], [5.0]])).sum(0) / 8
    torch.testing.assert_close(codec.decode_mean(messages), expected)


@pytest.mark.parametrize("make", [lambda: ROWS["identity"].make(), lambda: RandK(5, shared=True)])
def test_linear_messages_may_be_summed(make):
    codec = make()
    assert codec.linear
    vectors = torch.randn(3, 30)
    bodies = [np.frombuffer(message[HEADER_BYTES:], "<f4") for message in encoded(codec, vectors)]
    head = codec.encode(vectors[0], round=0, client=0)[:HEADER_BYTES]
    summed = head + np.sum(bodies, axis=0, dtype=np.float32).tobytes()
    torch.testing.assert_close(
        codec.decode_mean([summed]) / 3, codec.decode_mean(encoded(codec, vectors))
    )
    assert not RandK(5).linear
    assert not TopK(5).linear


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["identity", "rand-k", "top-k", "induced", "wangni", "r-top-k"])
def test_half_precision_halves_the_values(name, values):
    method = CODECS[name].method
    options = {"k": 20} if CODECS[name].needs else {}
    codec = method(**options, values=values)
    vector = torch.randn(100)
    message = codec.encode(vector, round=0, client=0)
    whole = method(**options).encode(vector, round=0, client=0)
    count = 100 if name == "identity" else int.from_bytes(message[12:16], "little")
    assert len(whole) - len(message) == 2 * count
    decoded = codec.decode_mean([message])
    torch.testing.assert_close(
        decoded, method(**options).decode_mean([whole]), rtol=0.05, atol=0.05
    )
    with pytest.raises(Refused, match="values"):
        codec.read(whole)


def test_unknown_types_of_values():
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        RandK(1, values="float15")


@every
def test_an_inbox_takes_them(name):
    codec = ROWS[name].make()
    vectors = torch.randn(3, 40)
    inbox = Inbox(codec, round=2, length=40)
    messages = encoded(codec, vectors, 2)
    for client, message in enumerate(messages):
        inbox.add(message, sender=client)
    expected = ROWS[name].make().decode_mean(messages)
    torch.testing.assert_close(inbox.mean(), expected)

"""A server survives any bytes, and the mean of honest clients is unaffected."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.federated.codecs import QSGD, Identity, RandK, RandKTemporal, TopK
from featherweight.federated.inbox import Inbox, Refused
from tests.federated.codec_rows import ROWS

LENGTH = 40
SLOW = int(os.environ.get("FEATHERWEIGHT_FUZZ", "0"))  # inputs a codec; 0 for a few hundred
every = pytest.mark.parametrize("name", ROWS)


def vectors():
    return torch.randn(4, LENGTH, generator=torch.Generator().manual_seed(1))


def filled(name):
    """Return an inbox with three honest messages, and that of a fourth client."""
    codec = ROWS[name].make()
    inbox = Inbox(codec, round=3, length=LENGTH)
    messages = [codec.encode(v, round=3, client=c) for c, v in enumerate(vectors())]
    for message in messages[:3]:
        inbox.add(message)
    return inbox, messages[3]


class TestRules:
    def inbox(self, **options):
        return Inbox(Identity(), **({"round": 3, "length": 4} | options))

    def message(self, **options):
        options = {"round": 3, "client": 7, "length": 4, "weight": 1.0} | options
        vector = torch.arange(options.pop("length"), dtype=torch.float32)
        return Identity().encode(vector, **options)

    @pytest.mark.parametrize(
        ("options", "message", "reason"),
        [
            ({}, {"round": 2}, "the round is 2, not 3"),
            ({}, {"length": 3}, "the length is 3, not 4"),
            ({}, {"length": 5}, "52 bytes are more than the limit of 48"),
            ({"limit": 47}, {}, "48 bytes are more than the limit of 47"),
            ({"clients": [1, 2]}, {}, "client 7 takes no part in round 3"),
            ({"clients": []}, {}, "client 7 takes no part"),
            ({"max_weight": 10.0}, {"weight": 11.0}, "weight 11 is larger than 10"),
        ],
    )
    def test_what_is_refused_and_why(self, options, message, reason):
        inbox = self.inbox(**options)
        with pytest.raises(Refused, match=reason):
            inbox.add(self.message(**message))
        assert len(inbox) == 0

    def test_a_sender_speaks_for_itself(self):
        with pytest.raises(Refused, match="client 6 sent a message of client 7"):
            self.inbox().add(self.message(), sender=6)

    def test_a_client_sends_once(self):
        inbox = self.inbox()
        inbox.add(self.message())
        with pytest.raises(Refused, match="client 7 has sent already"):
            inbox.add(self.message(weight=5.0))
        assert inbox.weights == [1.0]

    def test_what_it_tells(self):
        inbox = self.inbox(clients={7, 8}, max_weight=3.0)
        inbox.add(self.message(), sender=7)
        inbox.add(self.message(client=8, weight=3.0), sender=8)
        assert inbox.clients == [7, 8]
        assert inbox.weights == [1.0, 3.0]
        assert inbox.bytes == 96
        assert len(inbox) == 2
        assert inbox.mean().tolist() == [0.0, 1.0, 2.0, 3.0]

    def test_an_empty_one_has_no_mean(self):
        with pytest.raises(Refused, match="no message"):
            self.inbox().mean()

    def test_the_seed_must_be_the_servers(self):
        inbox = Inbox(RandK(2, seed=1), round=0, length=8)
        with pytest.raises(Refused, match="key"):
            inbox.add(RandK(2, seed=2).encode(torch.ones(8), round=0, client=0))

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (RandK(3), RandK(2)),
            (RandK({0: 3}), RandK({1: 3})),
            (TopK(3), TopK(2)),
            (QSGD(7), QSGD(3)),
            (QSGD(3, bucket=4), QSGD(3)),
            (Identity(values="bfloat16"), Identity()),
        ],
    )
    def test_options_must_be_the_servers(self, theirs, ours):
        inbox = Inbox(ours, round=0, length=8, limit=1000)
        with pytest.raises(Refused):
            inbox.add(theirs.encode(torch.ones(8), round=0, client=0))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_values_that_would_poison_the_mean(self, value):
        message = bytearray(self.message())
        message[36:40] = struct.pack("<f", value)
        with pytest.raises(Refused, match="not finite or larger"):
            self.inbox().add(bytes(message))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e30])
    def test_bad_norms_are_refused(self, value):
        codec = QSGD(3)
        message = bytearray(codec.encode(torch.ones(8), round=0, client=0))
        message[32:36] = struct.pack("<f", value)
        with pytest.raises(Refused, match=r"norm|not finite"):
            Inbox(codec, round=0, length=8).add(bytes(message))

    def test_the_largest_values_leave_the_mean_finite(self):
        codec = RandKTemporal(1, memory="float16")
        for round in range(3):
            inbox = Inbox(codec, round=round, length=1000)
            for client in range(5):
                inbox.add(codec.encode(torch.full((1000,), 2.0**64), round=round, client=client))
            assert torch.isfinite(inbox.mean()).all()


@every
def test_memory_is_asked_for_after_the_checks(name):
    """Headers that claim four billion entries, levels or indices cost nothing."""
    codec = ROWS[name].make()
    valid = codec.encode(torch.randn(LENGTH), round=3, client=3)
    inbox = Inbox(codec, round=3, length=LENGTH)
    tracemalloc.start()
    for offset in (6, 8, 12, *range(32, min(len(valid), 48))):
        message = bytearray(valid)
        message[offset : offset + 4] = b"\xff" * len(message[offset : offset + 4])
        try:
            inbox.add(bytes(message))
        except Refused:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@every
def test_what_is_refused_leaves_no_trace(name):
    inbox, message = filled(name)
    expected = filled(name)[0].mean()
    for bad in (b"", b"FW", message[:-1], message + b"\0", b"\xff" * len(message)):
        with pytest.raises(Refused):
            inbox.add(bad)
    assert len(inbox) == 3
    assert torch.equal(inbox.mean(), expected)


def mutated(message, random):
    """Return a message with some bytes changed, cut, repeated or set to extremes."""
    data = bytearray(message)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(len(data) + 1))
        kind = random.integers(5)
        if kind == 0:
            data[place : place + 1] = random.bytes(1)
        elif kind == 1:
            data[place : place + 4] = random.choice([b"\xff" * 4, b"\0" * 4, b"\0\0\x80\x7f"])
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = random.bytes(int(random.integers(1, 9)))
        elif len(data):
            data[place % len(data)] ^= 1 << int(random.integers(8))
    return bytes(data)


@every
def test_mutated_messages(name):
    """Whatever arrives is refused in one line or is a message; then the mean is finite."""
    inbox, message = filled(name)
    random = np.random.default_rng(7)
    refused = 0
    for trial in range(SLOW or 400):
        if trial % 100 == 0:
            inbox, message = filled(name)
            expected = ROWS[name].make().combine(list(inbox._messages.values()))
        try:
            inbox.add(mutated(message, random))
        except Refused:
            refused += 1
            if trial % 50 == 0:
                held = list(inbox._messages.values())[:3]
                assert torch.equal(ROWS[name].make().combine(held), expected)
        else:
            assert torch.isfinite(ROWS[name].make().combine(list(inbox._messages.values()))).all()
            inbox, message = filled(name)
    assert refused > (SLOW or 400) // 3


@every
@settings(deadline=None, max_examples=SLOW or 60)
@given(data=st.binary(max_size=80), keep=st.integers(0, 48))
def test_any_bytes(name, data, keep):
    """A valid beginning of any length, and then anything."""
    inbox, message = filled(name)
    expected = filled(name)[0].mean()
    try:
        inbox.add(message[:keep] + data)
    except Refused:
        assert torch.equal(inbox.mean(), expected)
    else:
        assert torch.isfinite(inbox.mean()).all()

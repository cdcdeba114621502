"""The format of messages, and the indices that follow from seeds."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.federated.indices import choose, generator, hash64
from featherweight.federated.wire import (
    HEADER_BYTES,
    LARGEST,
    VALUE_BYTES,
    Header,
    Reader,
    Refused,
    as_vector,
    write_values,
)
from tests.oracles import federated_codecs as oracle

HEADER = Header(1, 2, 0, 515, 70000, 9, 4, 2**32 - 1, 2.5, 0xDEADBEEF)


class TestHeader:
    def test_bytes_are_those_of_the_specification(self):
        packed = HEADER.pack()
        assert len(packed) == HEADER_BYTES == 32
        assert packed == b"FW" + bytes([1, 1, 2, 0]) + struct.pack(
            "<HIIIIfI", 515, 70000, 9, 4, 2**32 - 1, 2.5, 0xDEADBEEF
        )
        assert Header.unpack(packed + b"body") == HEADER

    @pytest.mark.parametrize(
        ("offset", "data", "reason"),
        [
            (0, b"XX", "magic"),
            (2, b"\x02", "version"),
            (8, b"\0\0\0\0", "length is 0"),
            (24, struct.pack("<f", float("nan")), "weight"),
            (24, struct.pack("<f", float("inf")), "weight"),
            (24, struct.pack("<f", 0.0), "weight"),
            (24, struct.pack("<f", -1.0), "weight"),
        ],
    )
    def test_bad_fields_are_named(self, offset, data, reason):
        packed = bytearray(HEADER.pack())
        packed[offset : offset + len(data)] = data
        with pytest.raises(Refused, match=reason):
            Header.unpack(bytes(packed))

    @pytest.mark.parametrize("size", [0, 1, 31])
    def test_short_messages_are_refused(self, size):
        with pytest.raises(Refused, match="shorter"):
            Header.unpack(HEADER.pack()[:size])

    @pytest.mark.parametrize("message", [None, "FW", 3, bytearray(40), memoryview(bytes(40))])
    def test_only_bytes_are_messages(self, message):
        with pytest.raises(Refused, match="must be bytes"):
            Header.unpack(message)

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-45, 1e30])
    def test_bad_weights_are_not_packed(self, weight):
        with pytest.raises(ValueError, match="weight"):
            replace(HEADER, weight=weight).pack()

    def test_fields_too_large_are_not_packed(self):
        with pytest.raises(ValueError, match="does not fit"):
            replace(HEADER, parameter=2**16).pack()


class TestValues:
    @pytest.mark.parametrize("kind", VALUE_BYTES)
    def test_round_trip_is_torchs_rounding(self, kind):
        values = torch.randn(1000) * 10 ** torch.linspace(-4, 4, 1000)
        sent = write_values(values.numpy(), kind).tobytes()
        assert len(sent) == 1000 * VALUE_BYTES[kind]
        read = Reader(memoryview(sent)).values(1000, kind)
        expected = values.to(getattr(torch, kind)).float().numpy()
        np.testing.assert_array_equal(read, expected)

    def test_float16_refuses_what_it_cant_hold(self):
        with pytest.raises(ValueError, match="bfloat16"):
            write_values(np.array([1e5], np.float32), "float16")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST])
    def test_values_out_of_range_are_refused(self, value):
        data = np.array([1.0, value, 2.0], "<f4").tobytes()
        with pytest.raises(Refused, match="not finite or larger"):
            Reader(memoryview(data)).values(3, "float32")
        with pytest.raises(ValueError, match="not finite or larger"):
            as_vector(torch.tensor([1.0, value, 2.0]))

    @pytest.mark.parametrize(
        "tensor", [torch.zeros(2, 2), torch.zeros(()), torch.zeros(0), torch.zeros(3).int()]
    )
    def test_only_vectors_are_sent(self, tensor):
        with pytest.raises(ValueError, match="must be a floating-point vector"):
            as_vector(tensor)

    def test_reader_stops_at_the_end(self):
        reader = Reader(memoryview(b"abc"))
        assert reader.integer(2) == int.from_bytes(b"ab", "little")
        with pytest.raises(Refused, match="ends 1 bytes early"):
            reader.raw(2)
        with pytest.raises(Refused, match="1 bytes follow"):
            reader.end()

    def test_padding_bits_are_zero(self):
        assert Reader(memoryview(b"\x05")).bits(3).tolist() == [1, 0, 1]
        with pytest.raises(Refused, match="fill the last byte"):
            Reader(memoryview(b"\x0d")).bits(3)


class TestIndices:
    def test_golden_vectors(self):
        """These numbers never change: clients of all versions and machines rely on them."""
        assert hash64(0) == 16294208416658607535
        assert hash64(1, 2, 3) == 15020427595393229491
        assert hash64(2**64 - 1, 7) == 1869568459174662326
        assert choose(10, 10, 1).tolist() == [6, 0, 8, 9, 4, 3, 7, 2, 1, 5]
        assert choose(1000, 5, 2).tolist() == [240, 191, 219, 995, 263]
        assert choose(10**7, 5, 3).tolist() == [4572526, 3335217, 1966274, 7039076, 1498694]
        assert choose(2**32, 3, 4).tolist() == [3485785711, 3579470357, 2543498623]

    @given(st.integers(1, 5000), st.data(), st.integers(0, 2**64 - 1))
    def test_is_the_construction_written_down(self, length, data, seed):
        count = data.draw(st.integers(0, min(length, 40)))
        assert choose(length, count, seed).tolist() == oracle.choose(length, count, seed)

    @pytest.mark.parametrize("length", [1, 2, 4095, 4096, 4097, 100_000])
    def test_all_of_them_are_a_permutation(self, length):
        assert sorted(choose(length, length, 5)) == list(range(length))

    def test_a_prefix_is_a_smaller_choice(self):
        np.testing.assert_array_equal(choose(10**6, 70_000, 8)[:100], choose(10**6, 100, 8))

    def test_inclusion_of_entries_and_pairs_is_even(self):
        """Chi-squared statistics over their degrees of freedom, within 5 standard deviations."""
        length, count, draws = 40, 6, 20_000
        held = np.zeros((draws, length))
        for draw in range(draws):
            held[draw, choose(length, count, hash64(11, draw))] = 1
        p, pairs = count / length, count * (count - 1) / length / (length - 1)
        single = held.sum(0)
        assert held.sum() == draws * count
        both = (held.T @ held)[np.triu_indices(length, 1)]
        for found, chance in ((single, p), (both, pairs)):
            statistic = (found - draws * chance) ** 2 / (draws * chance * (1 - chance))
            assert abs(statistic.mean() - 1) < 5 * np.sqrt(2 / len(found))

    def test_consecutive_seeds_overlap_as_independent_ones(self):
        length, count = 100_000, 10_000
        overlaps = [
            len(np.intersect1d(choose(length, count, seed), choose(length, count, seed + 1)))
            for seed in range(20)
        ]
        assert np.mean(overlaps) == pytest.approx(count**2 / length, rel=0.02)

    def test_order_of_numbers_counts(self):
        assert len({hash64(a, b) for a in range(50) for b in range(50)}) == 2500
        assert generator(1, 2).random() != generator(2, 1).random()
        assert generator(1, 2).random() == generator(1, 2).random()

    @pytest.mark.parametrize(("length", "count"), [(0, 0), (5, 6), (5, -1), (2**32 + 1, 1)])
    def test_impossible_choices(self, length, count):
        with pytest.raises(ValueError, match="can't choose"):
            choose(length, count, 0)

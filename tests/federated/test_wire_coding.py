"""Lossless codings: inverses of each other, as long as predicted, never worse than fixed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.federated.coding import bits, levels, omega, radix, rice, sets
from featherweight.federated.wire import Reader, Refused
from tests.oracles import federated_codecs as oracle


def body(parts):
    return b"".join(parts)


def reader(data):
    return Reader(memoryview(data))


def read_whole(data, read):
    cursor = reader(data)
    found = read(cursor)
    cursor.end()
    return found


class TestBits:
    @pytest.mark.parametrize("width", range(33))
    @pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 200])
    def test_round_trip(self, width, count):
        numbers = np.random.default_rng(width).integers(0, 1 << width, count)
        data = body(bits.pack(numbers, width))
        assert len(data) == bits.size(count, width) == math.ceil(count * width / 8)
        found = read_whole(data, lambda r: bits.unpack(r, count, width))
        assert found.tolist() == numbers.tolist()

    def test_three_bits_lie_low_bits_first(self):
        numbers = np.array([1, 2, 3, 4, 5, 6, 7, 0])
        expected = sum(int(n) << 3 * i for i, n in enumerate(numbers)).to_bytes(3, "little")
        assert body(bits.pack(numbers, 3)) == expected

    @pytest.mark.parametrize("width", [1, 3, 4, 12])
    def test_padding_must_be_zero(self, width):
        data = bytearray(body(bits.pack(np.zeros(3, np.int64), width)))
        data[-1] |= 0x80
        with pytest.raises(Refused):
            bits.unpack(reader(bytes(data)), 3, width)


class TestRadix:
    @pytest.mark.parametrize("levels", [1, 2, 3, 5, 7, 100, 255, 65535])
    @pytest.mark.parametrize("count", [1, 4, 5, 6, 1000])
    def test_round_trip(self, levels, count):
        base = 2 * levels + 1
        numbers = np.random.default_rng(levels).integers(0, base, count)
        data = radix.write(numbers, base).tobytes()
        assert len(data) == radix.size(count, base)
        found = read_whole(data, lambda r: radix.read(r, count, base))
        assert found.tolist() == numbers.tolist()

    @pytest.mark.parametrize(("base", "digits", "width"), [(3, 5, 1), (5, 24, 7), (7, 17, 6)])
    def test_layout(self, base, digits, width):
        assert radix.layout(base) == (digits, width)
        assert base**digits <= 256**width < base ** (digits + 1)

    def test_words_beyond_the_digits_are_refused(self):
        with pytest.raises(Refused, match="too large"):
            radix.read(reader(b"\xff"), 5, 3)
        with pytest.raises(Refused, match="too large"):
            radix.read(reader(bytes([3])), 1, 3)  # a second digit where there is one


class TestOmega:
    def test_lengths_are_eliass(self):
        numbers = np.array([1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 100, 1000])
        expected = [1, 3, 3, 6, 6, 7, 7, 11, 11, 12, 12, 13, 17]
        assert omega.lengths(numbers).tolist() == expected
        assert [len(oracle.omega(n)) for n in numbers.tolist()] == expected

    def test_a_million_numbers(self):
        numbers = np.arange(1, 10**6 + 1)
        data = body(omega.write(numbers))
        assert len(data) == omega.size(numbers)
        assert abs(8 * len(data) - omega.lengths(numbers).sum()) < 8 * 20  # padding of planes
        found = read_whole(data, lambda r: omega.read(r, len(numbers), 10**6))
        np.testing.assert_array_equal(found, numbers)

    @given(st.lists(st.integers(1, 2**32), max_size=40))
    def test_round_trip_and_length(self, numbers):
        array = np.array(numbers, np.int64)
        data = body(omega.write(array))
        assert len(data) == omega.size(array)
        assert omega.lengths(array).tolist() == [len(oracle.omega(n)) for n in numbers]
        assert read_whole(data, lambda r: omega.read(r, len(numbers), 2**32)).tolist() == numbers

    @given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
    def test_size_from_a_histogram(self, numbers):
        values, counts = np.unique(numbers, return_counts=True)
        assert omega.size(values, counts) == omega.size(np.array(numbers))

    def test_too_large_is_refused(self):
        data = body(omega.write(np.array([5, 9])))
        with pytest.raises(Refused, match="more than 8"):
            omega.read(reader(data), 2, 8)
        with pytest.raises(Refused):
            omega.read(reader(b"\xff" * 40), 1, 2**32)


class TestSets:
    @settings(deadline=None)
    @given(st.integers(1, 3000), st.data())
    def test_round_trip_by_the_shortest(self, length, data):
        chosen = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=60)))
        indices = np.array(chosen, np.int64)
        coded = sets.write(indices, length)
        sizes = sets.sizes(indices, length)
        written = body(coded.parts)
        assert len(written) == sizes[coded.coding] == min(sizes.values())
        assert len(written) <= sets.most_bytes(len(chosen), length)
        found = read_whole(written, lambda r: sets.read(r, coded.coding, len(chosen), length))
        assert found.tolist() == chosen

    def test_rice_has_the_length_of_the_textbook(self):
        indices = np.sort(np.random.default_rng(0).choice(100_000, 1000, replace=False))
        gaps = np.diff(indices, prepend=-1)
        best = rice.best_parameter(gaps)
        exact = {b: sum(oracle.rice_bits(g, b) for g in gaps.tolist()) for b in range(17)}
        assert best == min(exact, key=exact.__getitem__)
        assert abs(8 * rice.size(gaps, best) - exact[best]) < 16
        entropy = 1000 * (math.log2(100) + 1.5)
        assert exact[best] == pytest.approx(entropy, rel=0.03)

    @pytest.mark.parametrize("coding", [sets.PACKED, sets.RICE, sets.ELIAS])
    def test_indices_outside_are_refused(self, coding):
        gaps = {
            sets.PACKED: body(bits.pack(np.array([6]), 3)),
            sets.RICE: body([b"\0", *rice.write(np.array([7]), 0)]),
            sets.ELIAS: body(omega.write(np.array([7]))),
        }
        assert sets.read(reader(gaps[coding]), coding, 1, 7).tolist() == [6]
        with pytest.raises(Refused):
            sets.read(reader(gaps[coding]), coding, 1, 6)

    @pytest.mark.parametrize("pair", [(3, 3), (4, 1)])
    def test_indices_must_ascend(self, pair):
        data = body(bits.pack(np.array(pair), 4))
        with pytest.raises(Refused, match="not ascending"):
            sets.read(reader(data), sets.PACKED, 2, 9)

    @pytest.mark.parametrize("count", [10, 2**32 - 1])
    def test_no_more_indices_than_entries(self, count):
        with pytest.raises(Refused, match="do not fit"):
            sets.read(reader(b"\xff" * 100), sets.RICE, count, 9)

    def test_unknown_coding(self):
        with pytest.raises(Refused, match="coding 9"):
            sets.read(reader(b""), 9, 0, 9)


def random_levels(most, spread, length=3000, seed=0):
    drawn = np.random.default_rng(seed).standard_normal(length) * spread
    return np.clip(np.rint(drawn), -most, most).astype(levels.signed_type(most))


class TestLevels:
    @pytest.mark.parametrize("most", [1, 2, 3, 7, 127, 128, 255, 32768, 65535])
    @pytest.mark.parametrize("spread", [0.2, 1.0, 100.0])
    def test_every_coding_inverts_and_is_predicted(self, most, spread):
        signed = random_levels(most, spread)
        sizes = levels.sizes(signed, most)
        for coding in (levels.FIXED, levels.RADIX, levels.DENSE, levels.SPARSE):
            data = body(levels.WRITERS[coding](signed, most))
            assert len(data) == sizes.get(coding, len(data))
            found = read_whole(data, lambda r, c=coding: levels.read(r, c, len(signed), most))
            np.testing.assert_array_equal(found, signed)
            assert found.dtype == levels.signed_type(most)

    @pytest.mark.parametrize("most", [1, 2, 3, 7, 15, 255])
    @pytest.mark.parametrize("spread", [0.15, 0.3, 1.0, 3.0, 1000.0])
    def test_the_shortest_is_chosen(self, most, spread):
        signed = random_levels(most, spread)
        lengths = {c: len(body(levels.WRITERS[c](signed, most))) for c in levels.WRITERS if c}
        coded = levels.write(signed, most)
        assert len(body(coded.parts)) == min(lengths.values())
        assert len(body(coded.parts)) <= levels.most_bytes(len(signed), most)

    def test_each_coding_wins_somewhere(self):
        winners = {
            levels.write(random_levels(most, spread), most).coding
            for most, spread in ((1, 0.001), (7, 3.0), (1, 2.0), (1, 0.25), (200, 0.5))
        }
        clustered = np.zeros(1000, np.int8)
        clustered[::2] = 1
        winners.add(levels.write(clustered, 100).coding)
        assert winners >= {levels.EMPTY, levels.FIXED, levels.RADIX, levels.SPARSE}

    def test_zeros_take_no_byte(self):
        coded = levels.write(np.zeros(50, np.int8), 3)
        assert coded == (levels.EMPTY, [])

    def test_fixed_width_is_sign_and_level(self):
        """ceil(log2(2 s + 1)) = 1 + ceil(log2(s + 1)) for 1 <= s <= 10^4."""
        for s in range(1, 10**4 + 1):
            assert (2 * s).bit_length() == 1 + s.bit_length()
            assert (2 * s).bit_length() == math.ceil(math.log2(2 * s + 1))

    def test_symbols_out_of_range_are_refused(self):
        data = body(bits.pack(np.array([7, 0, 0]), 3))
        with pytest.raises(Refused, match="symbol is 7, more than 6"):
            levels.read(reader(data), levels.FIXED, 3, 3)
        with pytest.raises(Refused, match="coding 5"):
            levels.read(reader(data), 5, 3, 3)

    def test_near_entropy_for_few_levels(self):
        """Gaussian, d = 10^5, s = 3, one norm: 3 bits fixed, about 0.1 coded."""
        drawn = np.random.default_rng(0)
        vector = drawn.standard_normal(10**5)
        ratios = np.abs(vector) * 3 / np.linalg.norm(vector)
        signed = (np.sign(vector) * np.floor(ratios + drawn.random(10**5))).astype(np.int8)
        size = 8 * len(body(levels.write(signed, 3).parts)) / 10**5
        share = np.mean(signed != 0)
        entropy = share * (1 - math.log2(share)) - (1 - share) * math.log2(1 - share)
        assert size < 1.2 * entropy < 0.12

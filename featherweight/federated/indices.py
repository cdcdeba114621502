"""Random choices that every machine derives alike from one seed.

Library samplers are no wire format: their streams differ between devices and versions. Here all is
arithmetic on unsigned integers, written down once:

* ``hash64(a, b, ...)``: start at 0; for each number, XOR it in and apply the SplitMix64 step (add
  the golden ratio, then Stafford's mixer 13).
* ``choose(length, count, seed)``: a permutation of [0, 2**bits), bits = max(12, bit length of
  length - 1), by an alternating Feistel network of 6 rounds over the low ceil(bits / 2) and the
  high floor(bits / 2) bits. Of pi(0), pi(1), ... those below ``length`` are taken, until there are
  ``count``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK64 = 2**64 - 1
ROUNDS = 6
LEAST_BITS = 12  # smaller networks shuffle badly
CHUNK = 1 << 15  # numbers that stay in cache

Indices = NDArray[np.int64]
Words = NDArray[np.uint32]


def hash64(*numbers: int) -> int:
    """Return 64 bits that depend on all numbers and their order.

    Args:
        *numbers: integers; their lowest 64 bits count.
    """
    state = 0
    for number in numbers:
        state = splitmix64((state ^ number) & MASK64)
    return state


def splitmix64(state: int) -> int:
    """Return one step of SplitMix64 (Steele, Lea & Flood 2014, with Stafford's mixer 13)."""
    z = (state + GOLDEN) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def generator(*numbers: int) -> np.random.Generator:
    """Return a generator for what a client draws alone and nobody has to derive again."""
    return np.random.Generator(np.random.SFC64(hash64(*numbers)))


def choose(length: int, count: int, seed: int) -> Indices:
    """Choose ``count`` of the indices below ``length``, without replacement.

    Args:
        length: at least 1, at most 2**32.
        count: from 0 to ``length``.
        seed: 64 bits; every seed is another choice.

    Returns:
        [count], distinct, in the order in which they were drawn.

    Raises:
        ValueError: a number is out of range.
    """
    if not 1 <= length <= 2**32 or not 0 <= count <= length:
        raise ValueError(f"can't choose {count} of {length} indices")
    found = np.empty(count, np.int64)
    filled = 0
    for drawn in _drawn(length, count, seed):
        taken = drawn[: count - filled]
        found[filled : filled + len(taken)] = taken
        filled += len(taken)
    return found


def _drawn(length: int, count: int, seed: int) -> Iterator[Words]:
    """Yield the permutation's values below ``length``, chunk by chunk, until there are enough."""
    bits = max(LEAST_BITS, (length - 1).bit_length())
    keys = np.array([hash64(seed, r) & 0xFFFFFFFF for r in range(ROUNDS)], np.uint32)
    share = length / 2**bits
    start, missing = 0, count
    while missing > 0:
        size = min(CHUNK, int(missing / share) + 64, 2**bits - start)
        drawn = permuted(np.arange(start, start + size, dtype=np.uint32), bits, keys)
        kept = drawn[drawn < length] if length < 2**bits else drawn
        yield kept
        missing -= len(kept)
        start += size


def permuted(numbers: Words, bits: int, keys: Words) -> Words:
    """Apply the Feistel network.

    Args:
        numbers: uint32, below 2**bits.
        bits: from 2 to 32.
        keys: [ROUNDS], uint32.
    """
    low_bits = (bits + 1) // 2
    low_mask = np.uint32((1 << low_bits) - 1)
    high_mask = np.uint32((1 << (bits - low_bits)) - 1)
    low, high = numbers & low_mask, numbers >> np.uint32(low_bits)
    for index in range(0, ROUNDS, 2):
        low ^= _mix(high, keys[index]) & low_mask
        high ^= _mix(low, keys[index + 1]) & high_mask
    found: Words = (high << np.uint32(low_bits)) | low
    return found


def _mix(numbers: Words, key: Any) -> Words:
    """Mix 32 bits: xor-shifts and odd multipliers of Wellons' hash prospector, "lowbias32"."""
    z = numbers + key
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x7FEB352D)
    z ^= z >> np.uint32(15)
    z *= np.uint32(0x846CA68B)
    found: Words = z ^ (z >> np.uint32(16))
    return found

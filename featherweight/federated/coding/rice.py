"""Rice's code for gaps: quotients in unary, all together, then remainders of one width.

A gap g is coded as (g - 1) >> b zeros and a one, and b bits. With b = 0 the unary part is the
bitmap of the set itself.

Source: Golomb 1966; Rice and Plaunt 1971.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.coding import bits
from featherweight.federated.coding.bits import Bytes, Integers
from featherweight.federated.wire import Reader, Refused

LARGEST_PARAMETER = 31
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def size(gaps: Integers, parameter: int) -> int:
    """Return the exact bytes of `write`."""
    unary = int(((gaps - 1) >> parameter).sum()) + len(gaps)
    return -(-unary // 8) + bits.size(len(gaps), parameter)


def best_parameter(gaps: Integers) -> int:
    """Return the parameter with the shortest code among those near log2(0.69 of the mean gap)."""
    if not len(gaps):
        return 0
    middle = int(math.log2(max(1.0, 0.69 * float(gaps.mean()))))
    return min(range(max(0, middle - 1), middle + 2), key=lambda parameter: size(gaps, parameter))


def write(gaps: Integers, parameter: int) -> list[Bytes]:
    """Code gaps.

    Args:
        gaps: [count], at least 1.
        parameter: bits of the remainders.
    """
    ends = np.cumsum(((gaps - 1) >> parameter) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    remainders = (gaps - 1) & ((1 << parameter) - 1)
    return [np.packbits(unary, bitorder="little"), *bits.pack(remainders, parameter)]


def read(reader: Reader, count: int, parameter: int, most: int) -> NDArray[np.int64]:
    """Read what `write` wrote.

    Args:
        reader: of the body.
        count: how many gaps.
        parameter: as in `write`.
        most: the largest gap that is allowed.

    Raises:
        Refused: the body is too short, or the parameter or a gap too large.
    """
    if parameter > LARGEST_PARAMETER:
        raise Refused(f"the Rice parameter is {parameter}, more than {LARGEST_PARAMETER}")
    ends = _ones(reader, count)
    remainders = bits.unpack(reader, count, parameter).astype(np.int64)
    quotients = np.diff(ends, prepend=-1) - 1
    if count and quotients.max() > most >> parameter:  # before the shift, which could overflow
        raise Refused(f"a gap is larger than {most}")
    return ((quotients << parameter) | remainders) + 1


def _ones(reader: Reader, count: int) -> NDArray[np.int64]:
    """Read bits until so many ones were seen, and the rest of that byte; return their places."""
    if count > 8 * reader.left:
        raise Refused(f"the body is too short for {count} gaps")
    if not count:
        return np.zeros(0, np.int64)
    held = np.cumsum(ONES[reader.peek()], dtype=np.int64)
    whole = int(np.searchsorted(held, count)) + 1  # bytes
    if whole > len(held) or held[whole - 1] != count:
        raise Refused(f"the body does not hold {count} gaps")
    return np.flatnonzero(np.unpackbits(reader.raw(whole), bitorder="little"))

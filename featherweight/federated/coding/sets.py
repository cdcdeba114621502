"""Sets of indices, in the shortest of three codings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.coding import bits, omega, rice
from featherweight.federated.coding.bits import Bytes
from featherweight.federated.wire import Reader, Refused

Indices = NDArray[np.int64]
PACKED, RICE, ELIAS = 1, 2, 3


class Coded(NamedTuple):
    """A coded sequence.

    Attributes:
        coding: its number on the wire.
        parts: the bytes.
    """

    coding: int
    parts: list[Bytes]


def most_bytes(count: int, length: int) -> int:
    """Return a size that no set of ``count`` indices below ``length`` exceeds."""
    return bits.size(count, _width(length))


def sizes(indices: Indices, length: int) -> dict[int, int]:
    """Return the exact bytes of each coding.

    Args:
        indices: [count], ascending.
        length: all indices are below it.
    """
    gaps = np.diff(indices, prepend=-1)
    return {
        PACKED: bits.size(len(indices), _width(length)),
        RICE: 1 + rice.size(gaps, rice.best_parameter(gaps)),
        ELIAS: _omega_size(gaps),
    }


def write(indices: Indices, length: int) -> Coded:
    """Code a set by its shortest coding.

    Args:
        indices: [count], ascending.
        length: all indices are below it.
    """
    found = sizes(indices, length)
    coding = min(found, key=found.__getitem__)
    if coding == PACKED:
        return Coded(PACKED, bits.pack(indices, _width(length)))
    gaps = np.diff(indices, prepend=-1)
    if coding == ELIAS:
        return Coded(ELIAS, omega.write(gaps))
    parameter = rice.best_parameter(gaps)
    return Coded(RICE, [np.array([parameter], np.uint8), *rice.write(gaps, parameter)])


def read(reader: Reader, coding: int, count: int, length: int) -> Indices:
    """Read what `write` wrote.

    Raises:
        Refused: the body is too short, or the indices are not ascending below ``length``.
    """
    if coding not in READERS:
        raise Refused(f"the coding {coding} of indices is unknown")
    if count > length:
        raise Refused(f"{count} indices do not fit below {length}")
    gaps = READERS[coding](reader, count, length)
    if count and (gaps.min() < 1 or float(gaps.sum(dtype=np.float64)) > length):
        raise Refused(f"indices are not ascending below {length}")
    return np.cumsum(gaps) - 1


def _omega_size(gaps: Indices) -> int:
    if gaps.max(initial=1) > len(gaps):
        return omega.size(gaps)
    counts = np.bincount(gaps)  # most gaps are alike
    return omega.size(np.flatnonzero(counts), counts[counts > 0])


def _width(length: int) -> int:
    return (length - 1).bit_length()


def _read_packed(reader: Reader, count: int, length: int) -> Indices:
    indices = bits.unpack(reader, count, _width(length)).astype(np.int64)
    return np.diff(indices, prepend=-1)


READERS: dict[int, Callable[[Reader, int, int], Indices]] = {
    PACKED: _read_packed,
    RICE: lambda reader, count, most: rice.read(reader, count, reader.integer(1), most),
    ELIAS: omega.read,
}

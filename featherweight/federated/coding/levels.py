"""Quantised vectors: signed levels, mostly small and often zero, in the shortest of four codings.

* fixed: every entry in the same number of bits;
* radix: digits of base 2 s + 1;
* dense: Elias's omega code of every magnitude plus one, then the signs of those that are not zero;
* sparse: which entries are not zero (`sets`), their signs, omega codes of their magnitudes.

A vector of zeros takes no byte.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.coding import bits, omega, radix, sets
from featherweight.federated.coding.bits import Bytes, Integers
from featherweight.federated.coding.sets import Coded
from featherweight.federated.wire import Reader, Refused

CHUNK = 1 << 16  # entries
EMPTY, FIXED, RADIX, DENSE, SPARSE = range(5)


def signed_type(most: int) -> np.dtype[np.signedinteger]:
    """Return the smallest signed type that holds levels up to ``most``."""
    return np.dtype(np.int8 if most < 2**7 else np.int16 if most < 2**15 else np.int32)


def most_bytes(length: int, most: int) -> int:
    """Return a size that no vector of this length with levels up to ``most`` exceeds."""
    return min(bits.size(length, _width(most)), radix.size(length, 2 * most + 1))


def sizes(levels: Integers, most: int) -> dict[int, int]:
    """Return the exact bytes of the codings; of those that can't be shortest, perhaps none.

    Args:
        levels: [length], of magnitude up to ``most``.
        most: the number of levels above zero.
    """
    length, count = len(levels), int(np.count_nonzero(levels))
    if not count:
        return {EMPTY: 0}
    found = {
        FIXED: bits.size(length, _width(most)),
        RADIX: radix.size(length, 2 * most + 1),
    }
    least, signs = min(found.values()), -(-count // 8)
    if 3 * count > 8 * least:  # a sign, a gap or a zero, and a level take a bit each
        return found
    often = _histogram(levels, most)
    found[DENSE] = omega.size(np.flatnonzero(often) + 1, often[often > 0]) + signs
    often[0] = 0
    rest = 5 + signs + omega.size(np.flatnonzero(often), often[often > 0])
    if rest + count // 8 < min(found.values()):  # a gap takes a bit at least
        found[SPARSE] = rest + min(sets.sizes(np.flatnonzero(levels), length).values())
    return found


def _histogram(levels: Integers, most: int) -> NDArray[np.int64]:
    """Count magnitudes from 0 to ``most``, in pieces that stay in cache."""
    found = np.zeros(most + 1, np.int64)
    for start in range(0, len(levels), CHUNK):
        found += np.bincount(np.abs(levels[start : start + CHUNK]), minlength=most + 1)
    return found


def write(levels: Integers, most: int) -> Coded:
    """Code levels by their shortest coding.

    Args:
        levels: [length], signed, of magnitude up to ``most``.
        most: from 1 to 2**16 - 1.
    """
    found = sizes(levels, most)
    coding = min(found, key=found.__getitem__)
    return Coded(coding, WRITERS[coding](levels, most))


def read(reader: Reader, coding: int, length: int, most: int) -> Integers:
    """Read what `write` wrote, in the type of `signed_type`.

    Raises:
        Refused: the body is too short, or a level is out of range.
    """
    if coding not in READERS:
        raise Refused(f"the coding {coding} of levels is unknown")
    return READERS[coding](reader, length, most)


def _width(most: int) -> int:
    return (2 * most).bit_length()


def _symbols(levels: Integers, most: int) -> Integers:
    """Map 0, 1, -1, 2, -2, ... to 0, 1, 2, 3, 4, ..."""
    kind = np.min_scalar_type(2 * most)
    magnitudes = np.abs(levels).astype(kind)
    magnitudes += magnitudes
    magnitudes -= levels > 0
    return magnitudes


def _levels(symbols: Integers, most: int) -> Integers:
    if symbols.max() > 2 * most:
        raise Refused(f"a symbol is {symbols.max()}, more than {2 * most}")
    one = symbols.dtype.type(1)
    halves = ((symbols + one) >> one).astype(signed_type(most))
    minus = -(~symbols & one).astype(signed_type(most))  # all ones where the symbol is even
    found: Integers = (halves ^ minus) - minus
    return found


def _write_dense(levels: Integers, _: int) -> list[Bytes]:
    return [*omega.write(np.abs(levels).astype(np.uint32) + 1), _signs(levels[levels != 0])]


def _write_sparse(levels: Integers, _: int) -> list[Bytes]:
    indices = np.flatnonzero(levels)
    chosen = sets.write(indices, len(levels))
    head = len(indices).to_bytes(4, "little") + bytes([chosen.coding])
    kept = levels[indices]
    magnitudes = omega.write(np.abs(kept).astype(np.uint32))
    return [np.frombuffer(head, np.uint8), *chosen.parts, _signs(kept), *magnitudes]


def _signs(levels: Integers) -> Bytes:
    return np.packbits(levels < 0, bitorder="little")


def _read_empty(_: Reader, length: int, most: int) -> Integers:
    return np.zeros(length, signed_type(most))


def _read_dense(reader: Reader, length: int, most: int) -> Integers:
    found = (omega.read(reader, length, most + 1) - 1).astype(signed_type(most))
    indices = np.flatnonzero(found)
    found[indices] = _with_signs(found[indices], reader)
    return found


def _read_sparse(reader: Reader, length: int, most: int) -> Integers:
    count, coding = reader.integer(4), reader.integer(1)
    indices = sets.read(reader, coding, count, length)
    negative = reader.bits(count)
    magnitudes = omega.read(reader, count, most).astype(signed_type(most))
    found = np.zeros(length, signed_type(most))
    found[indices] = np.where(negative, -magnitudes, magnitudes)
    return found


def _with_signs(magnitudes: Integers, reader: Reader) -> Integers:
    return np.where(reader.bits(len(magnitudes)), -magnitudes, magnitudes)


Writer = Callable[[Integers, int], list[Bytes]]
WRITERS: dict[int, Writer] = {
    EMPTY: lambda levels, most: [],
    FIXED: lambda levels, most: bits.pack(_symbols(levels, most), _width(most)),
    RADIX: lambda levels, most: [radix.write(_symbols(levels, most), 2 * most + 1)],
    DENSE: _write_dense,
    SPARSE: _write_sparse,
}
READERS: dict[int, Callable[[Reader, int, int], NDArray[np.signedinteger]]] = {
    EMPTY: _read_empty,
    FIXED: lambda r, length, most: _levels(bits.unpack(r, length, _width(most)), most),
    RADIX: lambda r, length, most: _levels(radix.read(r, length, 2 * most + 1), most),
    DENSE: _read_dense,
    SPARSE: _read_sparse,
}

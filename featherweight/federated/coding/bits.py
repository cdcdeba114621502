"""Numbers of one width, or each of its own, packed without gaps; low bits first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.wire import Reader, Refused

Bytes = NDArray[np.uint8]
Integers = NDArray[Any]


def size(count: int, width: int) -> int:
    """Return the bytes that ``count`` numbers of ``width`` bits take."""
    return -(-count * width // 8)


def pack(numbers: Integers, width: int) -> list[Bytes]:
    """Pack unsigned numbers: the lowest bytes of all, then the next, then the bits that are left.

    Args:
        numbers: [count], below 2**width.
        width: from 0 to 32.
    """
    planes = [(numbers >> 8 * p).astype(np.uint8) for p in range(width // 8)]
    if width % 8:
        planes.append(_pack_small((numbers >> 8 * (width // 8)).astype(np.uint8), width % 8))
    return planes


def unpack(reader: Reader, count: int, width: int) -> Integers:
    """Read what `pack` wrote, as the smallest unsigned type that holds it.

    Raises:
        Refused: the body is too short, or bits beyond the last number are set.
    """
    planes = [reader.raw(count) for _ in range(width // 8)]
    if width % 8:
        rest = reader.raw(size(count, width % 8))
        if count * width % 8 and rest[-1] >> (count * width % 8):
            raise Refused("the bits that fill the last byte are not zero")
        planes.append(_unpack_small(rest, count, width % 8))
    if len(planes) < 2:
        return planes[0] if planes else np.zeros(count, np.uint8)
    kind: Any = np.uint16 if len(planes) == 2 else np.uint32
    found: Integers = planes[0].astype(kind)
    for place, plane in enumerate(planes[1:], 1):
        found = found | (plane.astype(kind) << kind(8 * place))
    return found


def pack_each(numbers: Integers, widths: Integers) -> Bytes:
    """Pack the low ``widths[i]`` bits of ``numbers[i]``, one after the other."""
    ends = np.cumsum(widths, dtype=np.int64)
    starts = ends - widths
    stream = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(widths.max(initial=0))):
        inside = widths > place
        stream[starts[inside] + place] = (numbers[inside] >> place) & 1
    return np.packbits(stream, bitorder="little")


def unpack_each(reader: Reader, widths: Integers) -> NDArray[np.int64]:
    """Read what `pack_each` wrote; widths are at most 32."""
    ends = np.cumsum(widths, dtype=np.int64)
    starts = ends - widths
    stream = reader.bits(int(ends[-1]) if len(ends) else 0)
    found = np.zeros(len(widths), np.int64)
    for place in range(int(widths.max(initial=0))):
        inside = np.flatnonzero(widths > place)
        found[inside] |= stream[starts[inside] + place].astype(np.int64) << place
    return found


def _repeated(field: int, lane: int) -> np.uint64:
    """Return a bit field repeated in every lane of 64 bits."""
    return np.uint64(sum(field << start for start in range(0, 64, lane)))


def _steps(width: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """Return masks of the low and the packed high half and the shift, for the three merges."""
    steps = []
    for lane in (16, 32, 64):
        held = width * lane // 16  # bits of one half
        low = (1 << held) - 1
        steps.append(
            (_repeated(low, lane), _repeated(low << held, lane), np.uint64(lane // 2 - held))
        )
    return steps


def _pack_small(numbers: Bytes, width: int) -> Bytes:
    """Pack bytes below 2**width, width < 8: eight at a time become ``width`` bytes."""
    count = len(numbers)
    if width == 1:
        return np.packbits(numbers, bitorder="little")
    padded = np.zeros(-(-count // 8) * 8, np.uint8)
    padded[:count] = numbers
    words = padded.view("<u8")
    for low, high, shift in _steps(width):
        words = (words & low) | ((words >> shift) & high)
    return narrow(words, width)[: size(count, width)]


def _unpack_small(data: Bytes, count: int, width: int) -> Bytes:
    if width == 1:
        return np.unpackbits(data, count=count, bitorder="little")
    words = widen(data, width, -(-count // 8))
    for low, high, shift in reversed(_steps(width)):
        words = (words & low) | ((words & high) << shift)
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def narrow(words: Integers, size: int) -> Bytes:
    """Return the lowest ``size`` bytes of each word of 64 bits, flat."""
    if size in (1, 2, 4, 8):
        return words.astype(f"<u{size}", copy=False).view(np.uint8)
    return words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :size].ravel()


def widen(data: Bytes, size: int, count: int) -> NDArray[np.uint64]:
    """Return ``count`` words of 64 bits from ``size`` bytes each; missing bytes are zeros."""
    if len(data) < count * size:
        data = np.concatenate([data, np.zeros(count * size - len(data), np.uint8)])
    if size in (1, 2, 4, 8):
        return data.view(f"<u{size}").astype(np.uint64)
    found = np.zeros((count, 8), np.uint8)
    found[:, :size] = data.reshape(count, size)
    return found.view("<u8").ravel()

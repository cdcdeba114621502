"""Digits of any base: as many of them in a word of whole bytes as fit.

Word i of W holds the digits i, W + i, 2 W + i, ... of the sequence, the first as its lowest digit,
so that all passes run over contiguous memory.
"""

from __future__ import annotations

import numpy as np

from featherweight.federated.coding.bits import Bytes, Integers, narrow, widen
from featherweight.federated.wire import Reader, Refused


def layout(base: int) -> tuple[int, int]:
    """Return digits and bytes of a word: the fewest bits a digit, then the shortest word."""
    fits = [(_digits(base, width), width) for width in range(1, 9)]
    return min((fit for fit in fits if fit[0]), key=lambda fit: (fit[1] / fit[0], fit[1]))


def _digits(base: int, width: int) -> int:
    digits = 0
    while base ** (digits + 1) <= 256**width:
        digits += 1
    return digits


def size(count: int, base: int) -> int:
    """Return the bytes that ``count`` digits take."""
    digits, width = layout(base)
    return -(-count // digits) * width


def write(numbers: Integers, base: int) -> Bytes:
    """Code digits below ``base``.

    Args:
        numbers: [count], unsigned.
        base: from 2 to 2**17.
    """
    digits, width = layout(base)
    words = -(-len(numbers) // digits)
    kind = np.min_scalar_type(256**width - 1)
    found = np.zeros(words, kind)
    for place in reversed(range(digits)):
        part = numbers[place * words : (place + 1) * words]
        found *= kind.type(base)
        found[: len(part)] += part.astype(kind)
    return narrow(found, width)


def read(reader: Reader, count: int, base: int) -> Integers:
    """Read what `write` wrote.

    Raises:
        Refused: the body is too short, or it is not what `write` makes of any digits.
    """
    digits, width = layout(base)
    words = -(-count // digits)
    kind = np.min_scalar_type(256**width - 1)
    rest = widen(reader.raw(words * width), width, words).astype(kind)
    found = np.empty(words * digits, np.min_scalar_type(base - 1))
    for place in range(digits):
        quotient = rest // kind.type(base)
        found[place * words : (place + 1) * words] = rest - quotient * kind.type(base)
        rest = quotient
    if rest.any() or found[count:].any():
        raise Refused("a word of digits is too large")
    return found[:count]

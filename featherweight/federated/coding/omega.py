"""Elias's omega code, its planes transposed.

The code of n writes 0 for 1; else n in binary, in front of it the number of its further bits in
the same way, and so on down to 1, and 0 behind all. Here the groups of all numbers come together:
one bit for each whether a group follows, then the bits of these groups behind their leading 1, and
again for those that go on. The length is that of omega, and there is no loop over numbers.

Source: Elias 1975, "Universal codeword sets and representations of the integers"; used for
quantised gradients by Alistarh et al. 2017, arXiv:1610.02132.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.coding.bits import Bytes, Integers, pack_each, unpack_each
from featherweight.federated.wire import Reader, Refused

LARGEST_WIDTH = 32  # bits of a number behind its leading 1


def lengths(numbers: Integers) -> NDArray[np.int64]:
    """Return the bits of each number's code.

    Args:
        numbers: [count], from 1 to 2**32.
    """
    chain, groups = _chain(numbers)
    widths = sum((chain[row] + 1) * (groups >= row) for row in range(1, len(chain)))
    return np.asarray(1 + widths, np.int64) * np.ones(len(numbers), np.int64)


def size(numbers: Integers, counts: Integers | None = None) -> int:
    """Return the exact bytes of `write`.

    Args:
        numbers: [count], from 1 to 2**32.
        counts: how often each occurs; None for once.
    """
    counts = np.ones(len(numbers), np.int64) if counts is None else counts
    chain, groups = _chain(numbers)
    total = -(-int(counts.sum()) // 8)
    for step in range(int(groups.max(initial=0))):
        going = groups > step
        widths = _row(chain, groups, step)[going]
        total += -(-int((widths * counts[going]).sum()) // 8)
        total += -(-int(counts[going].sum()) // 8)
    return total


def write(numbers: Integers) -> list[Bytes]:
    """Code positive numbers.

    Args:
        numbers: [count], from 1 to 2**32.
    """
    going = numbers > 1
    planes = [np.packbits(going, bitorder="little")]
    active = numbers[going]
    chain, groups = _chain(active)
    for step in range(int(groups.max(initial=0))):
        widths = _row(chain, groups, step)
        numbers = _row(chain, groups, step + 1)
        planes.append(pack_each(numbers, widths))  # the low bits: the leading 1 is beyond the width
        going = groups > step + 1
        planes.append(np.packbits(going, bitorder="little"))
        chain, groups = chain[:, going], groups[going]
    return planes


def read(reader: Reader, count: int, most: int) -> NDArray[np.int64]:
    """Read what `write` wrote.

    Args:
        reader: of the body.
        count: how many numbers.
        most: the largest that is allowed.

    Raises:
        Refused: the body is too short, or a number is too large.
    """
    going = reader.bits(count)
    found = np.ones(count, np.int64)
    active = np.flatnonzero(going)
    while len(active):
        widths = found[active]
        if widths.max() > LARGEST_WIDTH:
            raise Refused("a number has more than 32 bits")
        found[active] = unpack_each(reader, widths) | (1 << widths)
        active = active[reader.bits(len(active)) > 0]
    if count and found.max() > most:
        raise Refused(f"a number is {found.max()}, more than {most}")
    return found


def _chain(numbers: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return n, log2(n), log2(log2(n)), ... rounded down to 1 and no further, and how many steps.

    Returns:
        [steps + 1, count] and [count].
    """
    rows = [np.asarray(numbers, np.int64)]
    groups = np.zeros(len(numbers), np.int64)
    while (going := rows[-1] > 1).any():
        logarithm = np.frexp(rows[-1].astype(np.float64))[1].astype(np.int64) - 1
        rows.append(np.where(going, logarithm, 1))
        groups += going
    return np.stack(rows), groups


def _row(chain: NDArray[np.int64], groups: NDArray[np.int64], step: int) -> NDArray[np.int64]:
    """Return the chain's entry ``step`` groups above its end, for each number."""
    found: NDArray[np.int64] = np.take_along_axis(
        chain, np.maximum(groups - step, 0)[None, :], axis=0
    )[0]
    return found

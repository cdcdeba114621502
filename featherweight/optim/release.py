"""Give memory that was freed back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

LIMIT = 64 << 20  # bytes; a smaller one costs time, since memory given back is asked for again


class Release:
    """Count bytes as they are freed, and give them back whenever there are many.

    glibc serves tensors of some MiB from its heap and gives back only what lies at the heap's end,
    so that one small tensor behind many freed ones keeps them all resident.

    Args:
        limit: bytes freed between two returns of memory.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._freed = 0

    def freed(self, size: int) -> None:
        """Say that ``size`` bytes of the CPU's memory were freed."""
        self._freed += size
        if self._freed >= self._limit:
            self._freed = 0
            _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """Return glibc's ``malloc_trim``, or what does nothing where the C library has none."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return lambda _: None
    return trim

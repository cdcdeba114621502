"""Codecs that send values and, because they depend on the vector, where these belong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.codecs.codec import Body, Codec, Message
from featherweight.federated.coding import sets
from featherweight.federated.wire import Array, Floats, Header, Reader, Refused, write_values

Indices = NDArray[np.int64]


class IndexedCodec(Codec):
    """A codec whose body is values and the set of their indices, in the shortest coding."""

    def most_bytes(self, length: int) -> int:
        """Return a size that no message exceeds."""
        count = self._most_count(length)
        return self._value_bytes(count) + sets.most_bytes(count, length)

    def _most_count(self, length: int) -> int:
        """Return how many entries a message may hold."""
        raise NotImplementedError

    def _check_count(self, header: Header) -> None:
        most = self._most_count(header.length)
        if header.count > most:
            raise Refused(f"the count is {header.count}, more than {most}")

    def _packed(self, indices: Indices, values: Floats, length: int) -> Body:
        """Return the body for ascending indices and their values."""
        coded = sets.write(indices, length)
        parts = [write_values(values, self.values), *coded.parts]
        return Body(parts, coding=coded.coding, count=len(indices))

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        if header.parameter:
            raise Refused(f"the parameter is {header.parameter}, not 0")
        self._check_count(header)
        values = reader.values(header.count, self.values)
        return values, sets.read(reader, header.coding, header.count, header.length)

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        values, indices = message.content
        total[indices] += np.float32(weight) * values


def largest(vector: Floats, count: int) -> Indices:
    """Return the indices of the largest magnitudes, ascending; of equal ones the first.

    Args:
        vector: [length].
        count: from 0 to length.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    magnitudes = np.abs(vector)
    threshold = np.partition(magnitudes, len(vector) - count)[len(vector) - count]
    kept = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    kept[ties[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept)

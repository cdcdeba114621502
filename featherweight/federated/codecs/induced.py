"""The induced compressor: Top-k, and Rand-k of what it left out."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from featherweight.federated.codecs.codec import Body, Message, Origin
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.codecs.indexed import IndexedCodec, largest
from featherweight.federated.codecs.rand_k import fingerprint
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.codecs.top_k import expected_count
from featherweight.federated.coding import sets
from featherweight.federated.indices import choose, hash64
from featherweight.federated.wire import Array, Floats, Header, Reader, Refused, write_values

CHOICE = 5  # sub-stream of the seed


@CODECS.register(
    "induced",
    "half the budget top-k, half rand-k of the rest; unbiased",
    "Horvath and Richtarik 2021, arXiv:2006.11077",
    needs=("k",),
)
class Induced(IndexedCodec):
    """Sends the k / 2 largest entries, and k / 2 random ones of what remains, scaled.

    The scaled Rand-k of the remainder makes up for Top-k's bias. The indices of the first half
    travel, those of the second follow from the seed.

    Args:
        k: a count (int) of at least 2, or a fraction (float); an odd count gives the random half
            one more.
        values: "float32", "float16" or "bfloat16".
        seed: clients and server share it.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range; on encoding, ``k`` is 1.

    Source:
        Horvath and Richtarik 2021, arXiv:2006.11077, definition 4.
    """

    name: ClassVar[str] = "induced"
    number: ClassVar[int] = 5
    unbiased: ClassVar[bool] = True
    contractive: ClassVar[bool] = False

    def __init__(self, k: Count, *, values: str = "float32", seed: int = 0) -> None:
        super().__init__(values=values, seed=seed)
        check_count(k)
        self.k = k

    def excess(self, length: int) -> float:
        """Return Rand-k's factor for the second half times Top-k's for the first."""
        count = count_of(self.k, length)
        top = count // 2
        return (length / (count - top) - 1) * (1 - top / length)

    def most_bytes(self, length: int) -> int:
        """Return a size that no message exceeds."""
        count = count_of(self.k, length)
        return self._value_bytes(count) + sets.most_bytes(count // 2, length)

    def key(self) -> int:
        """Return the fingerprint of the seed."""
        return fingerprint(self.seed)

    def _body(self, vector: Floats, origin: Origin) -> Body:
        count = count_of(self.k, len(vector))
        if count < 2:
            raise ValueError(f"k must be at least 2 entries for two halves, got {count}")
        top = largest(vector, count // 2)
        sent = write_values(vector[top], self.values)
        rest = vector.copy()
        rest[top] -= self._as_read(sent)
        drawn = choose(len(vector), count - len(top), hash64(self.seed, CHOICE, *origin))
        coded = sets.write(top, len(vector))
        parts = [sent, write_values(rest[drawn], self.values), *coded.parts]
        return Body(parts, coding=coded.coding, count=count)

    def _as_read(self, sent: Array) -> Floats:
        """Return values as the server will see them, so that rounding is made up for too."""
        return Reader(memoryview(sent.tobytes())).values(len(sent), self.values)

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        count = expected_count(self.k, header)
        if (header.parameter, header.count) != (0, count) or count < 2:
            raise Refused(f"parameter or count is not 0, {count}, or the count is below 2")
        values = reader.values(count, self.values)
        top = sets.read(reader, header.coding, count // 2, header.length)
        seed = hash64(self.seed, CHOICE, header.round, header.client)
        return values, top, choose(header.length, count - len(top), seed)

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        values, top, drawn = message.content
        total[top] += np.float32(weight) * values[: len(top)]
        factor = np.float32(weight * len(total) / len(drawn))
        total[drawn] += factor * values[len(top) :]

"""Rand-k: every client sends k entries that it chooses at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.codecs.codec import Body, Codec, Message, Origin
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.indices import choose, hash64
from featherweight.federated.wire import Array, Floats, Header, Reader, Refused, write_values

CHOICE = 1  # sub-stream of the seed


@CODECS.register(
    "rand-k",
    "k random entries, scaled by d / k; indices follow from a seed and cost nothing",
    "Konecny and Richtarik 2018, arXiv:1611.07555",
    needs=("k",),
)
class RandK(Codec):
    """Sends k entries chosen at random without replacement; the server scales them by length / k.

    The estimate is unbiased; its squared error is (length / k - 1) times the squared norm for one
    client, and falls with their number. A message is 32 bytes and the k values.

    Args:
        k: a count (int) or a fraction (float); a mapping gives each client its own.
        shared: all clients send the same entries, so that messages can be summed on the way.
        values: "float32", "float16" or "bfloat16".
        seed: clients and server share it.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        Konecny and Richtarik 2018, arXiv:1611.07555; as the baseline, Jhunjhunwala et al. 2021,
        arXiv:2110.07751.
    """

    name: ClassVar[str] = "rand-k"
    number: ClassVar[int] = 1
    unbiased: ClassVar[bool] = True
    contractive: ClassVar[bool] = False

    def __init__(
        self,
        k: Count | Mapping[int, Count],
        *,
        shared: bool = False,
        values: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(values=values, seed=seed)
        check_count(k)
        self.k = k
        self.shared = shared

    @property
    def linear(self) -> bool:
        """Whether messages of one round may be summed value by value: if entries are shared."""
        return self.shared

    def excess(self, length: int) -> float:
        """Return length / k - 1, for the client with the fewest entries."""
        counts = self.k.values() if isinstance(self.k, Mapping) else [self.k]
        return length / min(count_of(k, length) for k in counts) - 1

    def expected_bytes(self, length: int, client: int = 0) -> int:
        """Return the size of a client's message."""
        return self._value_bytes(count_of(self.k, length, client))

    def most_bytes(self, length: int) -> int:
        """Return the size of the largest client's message."""
        counts = self.k.values() if isinstance(self.k, Mapping) else [self.k]
        return self._value_bytes(max(count_of(k, length) for k in counts))

    def indices(self, length: int, *, round: int, client: int) -> NDArray[np.int64]:
        """Return the entries that a client sends in a round, in the order of the message."""
        seed = hash64(self.seed, CHOICE, round, 0 if self.shared else client)
        return choose(length, count_of(self.k, length, client), seed)

    def key(self) -> int:
        """Return the fingerprint of the seed."""
        return fingerprint(self.seed)

    def _body(self, vector: Floats, origin: Origin) -> Body:
        chosen = self.indices(len(vector), round=origin.round, client=origin.client)
        return Body([write_values(vector[chosen], self.values)], count=len(chosen))

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        try:
            count = count_of(self.k, header.length, header.client)
        except ValueError as error:
            raise Refused(str(error)) from None
        if (header.coding, header.parameter, header.count) != (0, 0, count):
            raise Refused(f"coding, parameter or count is not 0, 0, {count}")
        values = reader.values(count, self.values)
        return values, self.indices(header.length, round=header.round, client=header.client)

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        values, indices = message.content
        total[indices] += np.float32(weight * len(total) / len(values)) * values


def fingerprint(seed: int) -> int:
    """Return 32 bits by which a server notices that a client derives indices from another seed."""
    return hash64(seed) & 0xFFFFFFFF

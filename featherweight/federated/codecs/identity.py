"""Identity: every value travels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from featherweight.federated.codecs.codec import Body, Codec, Message, Origin
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.wire import Array, Floats, Header, Reader, Refused, write_values


@CODECS.register("identity", "all values, nothing left out")
class Identity(Codec):
    """Sends all values: 4 bytes an entry, or 2 in a half precision.

    Args:
        values: "float32", exact; "float16" or "bfloat16", rounded to nearest.
        seed: taken for uniformity; nothing is random.
    """

    name: ClassVar[str] = "identity"
    number: ClassVar[int] = 0
    unbiased: ClassVar[bool] = True
    contractive: ClassVar[bool] = True

    @property
    def linear(self) -> bool:
        """Whether messages of one round may be summed value by value: yes."""
        return True

    def excess(self, length: int) -> float:
        """Return 0: nothing is lost."""
        return 0.0

    def expected_bytes(self, length: int, client: int = 0) -> int:
        """Return the size of a message."""
        return self._value_bytes(length)

    def most_bytes(self, length: int) -> int:
        """Return the size of a message."""
        return self._value_bytes(length)

    def _body(self, vector: Floats, origin: Origin) -> Body:
        return Body([write_values(vector, self.values)], count=len(vector))

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        if (header.coding, header.parameter, header.count) != (0, 0, header.length):
            raise Refused("coding, parameter or count is not that of identity")
        return (reader.values(header.length, self.values),)

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        (values,) = message.content
        total += np.float32(weight) * values

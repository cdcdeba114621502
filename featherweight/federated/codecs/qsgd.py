"""QSGD: entries rounded at random to a grid between zero and the norm."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from featherweight.common import unknown
from featherweight.federated.codecs.codec import Body, Codec, Message, Origin
from featherweight.federated.codecs.quantise import (
    NORMS,
    check_levels,
    norms,
    parts,
    quantise,
    spread,
    variance_factor,
)
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.coding import levels as coding
from featherweight.federated.indices import generator
from featherweight.federated.wire import (
    HEADER_BYTES,
    Array,
    Floats,
    Header,
    Reader,
    Refused,
    check_integer,
    check_range,
    write_values,
)

ROUNDING = 6  # sub-stream of the seed


@CODECS.register(
    "qsgd",
    "signs and levels between zero and the norm, rounded at random; unbiased",
    "Alistarh et al. 2017, arXiv:1610.02132",
    needs=("levels",),
)
class QSGD(Codec):
    """Sends every entry as a signed level and the norm; rounding is random and unbiased.

    The grid on [0, 1] is {0, 1/s, ..., 1}. Levels are packed, or coded as radix digits or by
    Elias's omega code, whichever is shortest for the message at hand. With one norm for all and
    few levels almost every entry is 0, and the message a small part of ceil(log2(2 s + 1)) bits an
    entry.

    Args:
        levels: s, from 1 to 65,535; s = 2^b - 1 wastes no part of its bits.
        bucket: entries that share a norm; 0 for one norm, the paper's analysis. Smaller buckets
            lower the variance, from sqrt(length) / s to sqrt(bucket) / s, for 32 bits each.
        norm: "l2", or "max", which most practice uses with buckets.
        seed: of the rounding; clients need not share it.

    Raises:
        ValueError: an option is out of range.

    Source:
        Alistarh, Grubic, Li, Tomioka and Vojnovic 2017, arXiv:1610.02132, section 3.
    """

    name: ClassVar[str] = "qsgd"
    number: ClassVar[int] = 6
    unbiased: ClassVar[bool] = True
    contractive: ClassVar[bool] = False

    def __init__(self, levels: int, *, bucket: int = 0, norm: str = "l2", seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.levels = check_levels(levels)
        self.bucket = check_integer("bucket", bucket)
        if norm not in NORMS:
            raise ValueError(unknown("norm", norm, NORMS))
        self.norm = norm

    def excess(self, length: int) -> float:
        """Return the bound on the variance, of a bucket relative to its squared norm."""
        size = min(self.bucket, length) or length
        return variance_factor(size, self.levels)

    def most_bytes(self, length: int) -> int:
        """Return a size that no message exceeds."""
        body = coding.most_bytes(length, self._most_levels())
        return HEADER_BYTES + 4 * self._buckets(length) + body

    def _most_levels(self) -> int:
        """Return the largest number of levels that a message may use."""
        return self.levels

    def _check_levels(self, levels: int) -> None:
        if levels != self.levels:
            raise Refused(f"the levels are {levels}, not {self.levels}")

    def _buckets(self, length: int) -> int:
        return -(-length // self.bucket) if self.bucket else 1

    def _body(self, vector: Floats, origin: Origin) -> Body:
        scale = norms(vector, self.bucket, self.norm)
        check_range(scale, "a norm")
        draw = generator(self.seed, ROUNDING, *origin)
        signed = quantise(vector, scale, self.bucket, self.levels, draw)
        coded = coding.write(signed, self.levels)
        written = [write_values(scale, "float32"), *coded.parts]
        return Body(written, coded.coding, self.levels, self.bucket)

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        self._check_levels(header.parameter)
        if header.count != self.bucket:
            raise Refused(f"the bucket is {header.count}, not {self.bucket}")
        scale = reader.values(self._buckets(header.length), "float32")
        if scale.min() < 0:
            raise Refused("a norm is negative")
        return scale, coding.read(reader, header.coding, header.length, header.parameter)

    def _add(self, message: Message, weight: float, total: Floats) -> None:
        scale, signed = message.content
        size = self.bucket or len(total)
        factors = (scale * (weight / message.header.parameter)).astype(np.float32)
        for part, buckets in parts(len(total), size):
            total[part] += spread(factors, part, buckets, size) * signed[part]

"""The format of messages: a header of 32 bytes and a body, little-endian.

====== ====== ===========================================================================
offset type   field
====== ====== ===========================================================================
0      2 char magic, ``FW``
2      u8     version of the format
3      u8     codec
4      u8     coding of indices or levels
5      u8     type of values
6      u16    parameter of the codec: quantisation levels; 0 where there is none
8      u32    length of the vector
12     u32    count: entries sent, or entries a bucket
16     u32    round
20     u32    client
24     f32    weight in the mean
28     u32    fingerprint of the seed that indices are derived from; 0 where there are none
====== ====== ===========================================================================

Nothing is unpickled, and every size is checked before memory is asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Floats = NDArray[np.float32]

MAGIC = b"FW"
VERSION = 1
LAYOUT = struct.Struct("<2sBBBBHIIIIfI")
HEADER_BYTES = LAYOUT.size
LARGEST = 2.0**64  # magnitude of values: sums of scaled ones stay finite in float32
LARGEST_INTEGER = 2**32 - 1
VALUES = ("float32", "float16", "bfloat16")  # the place in this tuple is the code on the wire
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Refused(ValueError):
    """A message that is not what it should be; the text says why, in one line."""


@dataclass(frozen=True)
class Header:
    """The fields of a header behind magic and version, in order.

    Attributes:
        codec: number of the codec.
        coding: how indices or levels are coded.
        values: type of values, as its place in `VALUES`.
        parameter: of the codec.
        length: entries of the vector.
        count: entries sent, or entries a bucket.
        round: of the training.
        client: who sent it.
        weight: in the mean.
        key: fingerprint of the seed.
    """

    codec: int
    coding: int
    values: int
    parameter: int
    length: int
    count: int
    round: int
    client: int
    weight: float
    key: int

    def pack(self) -> bytes:
        """Return the 32 bytes.

        Raises:
            ValueError: a field is out of range.
        """
        check_weight(self.weight)
        try:
            return LAYOUT.pack(MAGIC, VERSION, *vars(self).values())
        except struct.error:
            raise ValueError(f"a field does not fit the header: {self}") from None

    @classmethod
    def unpack(cls, message: bytes) -> Header:
        """Read the header of a message.

        Raises:
            Refused: the message is no message of this format and version.
        """
        if not isinstance(message, bytes):
            raise Refused(f"a message must be bytes, got {type(message).__name__}")
        if len(message) < HEADER_BYTES:
            raise Refused(f"{len(message)} bytes are shorter than a header of {HEADER_BYTES}")
        magic, version, *fields = LAYOUT.unpack_from(message)
        if magic != MAGIC:
            raise Refused(f"the magic is {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise Refused(f"the version is {version}, not {VERSION}")
        header = cls(*fields)
        if not (math.isfinite(header.weight) and 0 < header.weight <= LARGEST):
            raise Refused(f"the weight {header.weight:g} is not positive and finite")
        if header.length < 1:
            raise Refused("the length is 0")
        return header

    def must_be(self, expected: Header) -> None:
        """Compare with what the fields should be.

        Raises:
            Refused: one differs; it is named.
        """
        for name, value in vars(self).items():
            if value != getattr(expected, name):
                raise Refused(f"the {name} is {value}, not {getattr(expected, name)}")


def check_weight(weight: float) -> None:
    """Raise ValueError unless a weight is positive and finite, also as float32."""
    if not (math.isfinite(weight) and 2.0**-126 <= weight <= LARGEST):
        raise ValueError(f"weight must be positive and finite, got {weight!r}")


def check_integer(name: str, value: int) -> int:
    """Return an integer that fits an unsigned field of 32 bits; else ValueError."""
    if isinstance(value, bool) or not 0 <= int(value) <= LARGEST_INTEGER or int(value) != value:
        raise ValueError(f"{name} must be an integer in [0, 2**32), got {value!r}")
    return int(value)


def as_vector(tensor: Tensor) -> Floats:
    """Return a tensor's entries as a float32 array, without a copy where there can be.

    Args:
        tensor: [length], floating point, any device.

    Raises:
        ValueError: it is not one-dimensional, empty, or has entries that are not finite or larger
            than 2**64.
    """
    if tensor.ndim != 1 or not tensor.is_floating_point() or not 0 < len(tensor) < 2**32:
        kind = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"tensor must be a floating-point vector of 1 to 2**32 - 1, got {kind}")
    vector = tensor.detach().to("cpu", torch.float32).contiguous()
    if not in_range(vector):
        raise ValueError("tensor has entries that are not finite or larger than 2**64")
    return vector.numpy()


def in_range(values: Tensor | Array) -> bool:
    """Tell whether all values are finite and of magnitude at most 2**64."""
    if len(values) == 0:
        return True
    if isinstance(values, Tensor):
        low, high = (float(end) for end in values.aminmax())
    else:
        low, high = float(values.min()), float(values.max())
    return low >= -LARGEST and high <= LARGEST  # false for NaN, which min and max hand on


def check_range(values: Array, what: str) -> None:
    """Raise ValueError unless all values may travel: finite, of magnitude at most 2**64."""
    if not in_range(values):
        raise ValueError(f"{what} is not finite or larger than 2**64")


def write_values(values: Floats, kind: str) -> Array:
    """Return values in the type they travel in, rounded to nearest.

    Raises:
        ValueError: a value is too large for the type.
    """
    if kind == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    if kind == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        if not np.isfinite(halves).all():
            raise ValueError("a value is too large for float16; use bfloat16 or float32")
        return halves
    bits = values.astype("<f4").view("<u4")
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")


class Reader:
    """A cursor over the body of a message; whoever reads past its end is refused.

    Args:
        body: what follows the header.
    """

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._body) - self._at

    def raw(self, size: int) -> NDArray[np.uint8]:
        """Read bytes, without a copy."""
        if not 0 <= size <= self.left:
            raise Refused(f"the body ends {size - self.left} bytes early")
        found = np.frombuffer(self._body, np.uint8, size, self._at)
        self._at += size
        return found

    def peek(self) -> NDArray[np.uint8]:
        """Return all bytes that are left, without reading them."""
        return np.frombuffer(self._body, np.uint8, self.left, self._at)

    def integer(self, size: int) -> int:
        """Read an unsigned integer of so many bytes."""
        return int.from_bytes(self.raw(size).tobytes(), "little")

    def values(self, count: int, kind: str) -> Floats:
        """Read values; they are finite and in range."""
        data = self.raw(count * VALUE_BYTES[kind])
        if kind == "float32":
            found = data.view("<f4")
        elif kind == "float16":
            found = data.view("<f2").astype(np.float32)
        else:
            found = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if not in_range(found):
            raise Refused("a value is not finite or larger than 2**64")
        return found

    def bits(self, count: int) -> NDArray[np.uint8]:
        """Read single bits, one a byte of the result; those that fill the last byte are zero."""
        found = np.unpackbits(self.raw(-(-count // 8)), bitorder="little")
        if found[count:].any():
            raise Refused("the bits that fill the last byte are not zero")
        return found[:count]

    def end(self) -> None:
        """Raise `Refused` unless everything has been read."""
        if self.left:
            raise Refused(f"{self.left} bytes follow the end of the body")


def join(header: Header, parts: Sequence[Array]) -> bytes:
    """Return a message: one copy of its parts."""
    return b"".join([header.pack(), *(part.data for part in parts)])

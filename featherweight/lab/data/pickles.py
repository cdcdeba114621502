"""Read CIFAR's python pickles without unpickling: no code named by the file is ever called.

A pickle may name any function and have it called. These files need only two numpy names, and even
those are not resolved to numpy but to inert stand-ins that note what they were given.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.lab.data.base import DataError


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, code: str | bytes, *_flags: object) -> None:
        self.is_byte = code in ("u1", b"u1")  # Python 2 wrote its texts as bytes

    def __setstate__(self, state: object) -> None:
        """Byte order and flags do not matter for single bytes."""


class _Array:
    """Stands in for ``numpy.ndarray``."""

    shape: tuple[int, ...] = ()
    data: bytes = b""
    column_major: bool = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _Dtype) or not dtype.is_byte:
            raise pickle.UnpicklingError("an array is not of unsigned bytes")
        if not isinstance(data, bytes) or math.prod(shape) != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} has the wrong size")
        self.shape, self.data, self.column_major = shape, data, bool(fortran_order)

    def tensor(self) -> Tensor:
        """Return a copy as uint8 tensor."""
        flat = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        if self.column_major:
            return flat.view(self.shape[::-1]).permute(*reversed(range(len(self.shape))))
        return flat.view(self.shape)


def _reconstruct(*_arguments: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes as latin-1 text under pickle protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin-1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused") from None


def read_pickle(path: Path) -> dict[bytes, Any]:
    """Read one pickled dictionary of lists, texts and uint8 arrays.

    Args:
        path: a file of the CIFAR "python version".

    Returns:
        The dictionary; its keys are bytes, its arrays uint8 tensors.

    Raises:
        DataError: the file is truncated, holds anything else, or asks for code to be run.
    """
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise almost anything
        raise DataError(f"{path} is refused or damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return {
        key.encode() if isinstance(key, str) else key: _plain(value)
        for key, value in content.items()
    }


def _plain(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Array) and value.shape else value

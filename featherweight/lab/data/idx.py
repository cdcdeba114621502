"""MNIST and Fashion-MNIST from their IDX files, plain, gzip or xz.

An IDX file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the data (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from featherweight.lab.data.base import DATA, DataError, Parts, Split, as_labels, existing

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


@DATA.register(
    "mnist",
    "handwritten digits: 60000 + 10000 images of 1x28x28, IDX files",
    "LeCun, Bottou, Bengio and Haffner 1998",
    needs=["path"],
)
def load_mnist(path: str) -> Parts:
    """Read MNIST from the folder ``path``, or from ``mnist/`` or ``MNIST/raw/`` in it."""
    return _load("mnist", path, ("", "mnist", "MNIST/raw"))


@DATA.register(
    "fashion-mnist",
    "pictures of clothes: 60000 + 10000 images of 1x28x28, IDX files",
    "Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747",
    needs=["path"],
)
def load_fashion_mnist(path: str) -> Parts:
    """Read Fashion-MNIST from ``path``, or from ``fashion-mnist/`` or ``FashionMNIST/raw/``."""
    return _load("fashion-mnist", path, ("", "fashion-mnist", "FashionMNIST/raw"))


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file; the ending .gz or .xz says how it is compressed.

    Returns:
        uint8, of the shape the file's header gives.

    Raises:
        DataError: not an IDX file of bytes, truncated, or longer than its header says.
    """
    opener = OPENERS.get(path.suffix, OPENERS[""])
    try:
        with opener(path, "rb") as file:
            shape = _header(file, path)
            size = math.prod(shape)
            data = bytearray(file.read(size + 1))  # one more: the file must end there
    except DAMAGED as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(data) != size:
        state = "truncated" if len(data) < size else "longer than its header says"
        raise DataError(f"{path} is {state}: its header {shape} means {size} bytes of data")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def _header(file: BinaryIO, path: Path) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path} is no IDX file of bytes: it starts with {magic.hex(' ')}, not 00 00 08 ND"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} is truncated: it ends within its header")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    if 0 in shape:
        raise DataError(f"{path} is empty: its header says {shape}")
    return shape


def _load(name: str, path: str, subfolders: tuple[str, ...]) -> Parts:
    wanted = "train-images-idx3-ubyte[.gz|.xz] and the three files beside it"
    base = existing(path, name, wanted)
    for folder in [base / subfolder for subfolder in subfolders]:
        if _find(folder, "train-images-idx3-ubyte") is not None:
            return Parts(_split(folder, "train"), _split(folder, "t10k"), 10)
    raise DataError(f"data set {name!r}: no {wanted} in {base} or its {subfolders[1]}/")


def _split(folder: Path, part: str) -> Split:
    images = read_idx(_file(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_file(folder, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: {part} images {tuple(images.shape)} do not fit labels {tuple(labels.shape)}"
        )
    return Split(images.unsqueeze(1), as_labels(labels))


def _find(folder: Path, stem: str) -> Path | None:
    return next(
        (folder / (stem + end) for end in OPENERS if (folder / (stem + end)).is_file()), None
    )


def _file(folder: Path, stem: str) -> Path:
    path = _find(folder, stem)
    if path is None:
        raise DataError(f"{folder} lacks {stem} (plain, .gz or .xz)")
    return path

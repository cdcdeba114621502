"""CIFAR-10 and CIFAR-100 in any of the three layouts they are found in.

* pickles: the official "python version", ``data_batch_1..5`` and ``test_batch`` (CIFAR-100:
  ``train`` and ``test``).
* strips: ``train_1..5.zip`` and ``test.zip``, each with ``labels.npy`` and lossless WebP pictures
  of images stacked vertically.
* parquet: ``train-*.parquet`` and ``test-*.parquet`` as on the Hugging Face Hub.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featherweight.lab.data.base import DATA, DataError, Parts, Split, as_labels, existing
from featherweight.lab.data.images import decode_images
from featherweight.lab.data.pickles import read_pickle

SIDE = 32
LABEL_KEYS = ("labels", "fine_labels")
LABEL_COLUMNS = ("label", "fine_label")
IMAGE_COLUMNS = ("img", "image")


@dataclass(frozen=True)
class Layout:
    """How a set may lie on the disk; patterns are relative to the folder.

    Attributes:
        read: turns one file into a split.
        train: files of the training part, in order; a pattern may match several.
        test: files of the test part.
    """

    read: Callable[[Path], Split]
    train: tuple[str, ...]
    test: tuple[str, ...]


@DATA.register(
    "cifar10",
    "small photographs, 10 classes: 50000 + 10000 images of 3x32x32",
    "Krizhevsky 2009 (technical report)",
    needs=["path"],
)
def load_cifar10(path: str) -> Parts:
    """Read CIFAR-10 from the folder ``path`` or from a ``cifar10/``-like folder in it."""
    pickles = Layout(_read_pickle, tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",))
    official = "cifar-10-batches-py"
    folders = ("cifar10", f"cifar10/{official}", official, "cifar10/plain_text", "plain_text")
    return _load("cifar10", path, folders, (pickles, STRIPS, PARQUET), 10)


@DATA.register(
    "cifar100",
    "small photographs, 100 classes: 50000 + 10000 images of 3x32x32",
    "Krizhevsky 2009 (technical report)",
    needs=["path"],
)
def load_cifar100(path: str) -> Parts:
    """Read CIFAR-100 (fine labels) from ``path`` or from a ``cifar100/``-like folder in it."""
    pickles = Layout(_read_pickle, ("train",), ("test",))
    official = "cifar-100-python"
    folders = ("cifar100", f"cifar100/{official}", official, "cifar100/cifar100")
    return _load("cifar100", path, folders, (pickles, STRIPS, PARQUET), 100)


def _load(
    name: str, path: str, folders: tuple[str, ...], layouts: tuple[Layout, ...], classes: int
) -> Parts:
    firsts = ", ".join(layout.train[0] for layout in layouts)
    base = existing(path, name, f"a folder with {firsts}")
    for folder in [base / nested for nested in (*folders, "")]:
        for layout in layouts:
            if _files(folder, layout.train[:1]):
                train, test = (
                    _part(folder, layout.train, layout),
                    _part(folder, layout.test, layout),
                )
                return Parts(train, test, classes)
    raise DataError(f"data set {name!r}: none of {firsts} in {base} or its {', '.join(folders)}")


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Find the files of each pattern in order; an empty list if any pattern has none."""
    found = [sorted(p for p in folder.glob(pattern) if p.is_file()) for pattern in patterns]
    return [path for paths in found for path in paths] if all(found) else []


def _part(folder: Path, patterns: tuple[str, ...], layout: Layout) -> Split:
    files = _files(folder, patterns)
    if not files:
        missing = [pattern for pattern in patterns if not _files(folder, (pattern,))]
        raise DataError(f"{folder} lacks {', '.join(missing)}")
    with ThreadPoolExecutor(len(files)) as pool:
        splits = list(pool.map(layout.read, files))
    return Split(
        torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits])
    )


def _checked(images: Tensor, labels: object, path: Path) -> Split:
    split = Split(images, as_labels(labels))
    if len(split) != len(images):
        raise DataError(f"{path}: {len(images)} images but {len(split)} labels")
    return split


def _first(table: Any, keys: tuple[str, ...], path: Path) -> str:
    key = next((key for key in keys if key in table), None)
    if key is None:
        raise DataError(f"{path} has no {' or '.join(keys)}")
    return key


def _read_pickle(path: Path) -> Split:
    content = {key.decode(): value for key, value in read_pickle(path).items()}
    images = content[_first(content, ("data",), path)]
    labels = content[_first(content, LABEL_KEYS, path)]
    if not isinstance(images, Tensor) or images.shape[1:] != (3 * SIDE * SIDE,):
        raise DataError(f"{path}: data is no array of rows of {3 * SIDE * SIDE} bytes")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path}: labels are no list of integers")
    return _checked(images.reshape(-1, 3, SIDE, SIDE), labels, path)


def read_strips(path: Path) -> Split:
    """Read one zip of the strips layout, such as ``test.zip``.

    Raises:
        DataError: the zip or a picture in it is damaged or missing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            labels = np.load(io.BytesIO(archive.read("labels.npy")), allow_pickle=False)
            names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
            strips = [np.asarray(Image.open(archive.open(name))) for name in names]
            pixels = np.concatenate(strips).reshape(-1, SIDE, SIDE, 3)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return _checked(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, path)


def _read_parquet(path: Path) -> Split:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'featherweight[lab]'") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    cells = table[_first(table.column_names, IMAGE_COLUMNS, path)].to_pylist()
    labels = table[_first(table.column_names, LABEL_COLUMNS, path)].to_pylist()
    names = [f"{path} row {row}" for row in range(len(cells))]
    images, _ = decode_images(names, lambda row: cells[row]["bytes"])
    if images.shape[1:] != (3, SIDE, SIDE):
        raise DataError(f"{path}: images of {list(images.shape[1:])}, not 3x{SIDE}x{SIDE}")
    return _checked(images, labels, path)


STRIPS = Layout(read_strips, tuple(f"train_{i}.zip" for i in range(1, 6)), ("test.zip",))
PARQUET = Layout(_read_parquet, ("train-*.parquet",), ("test-*.parquet",))

"""Load a data set by name: training images limited and split by seed, the test part untouched."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from featherweight.lab.data.base import DATA, Data, DataError, Parts, Split, check
from featherweight.lab.data.seeding import derive_generator


def load(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Read a data set into memory.

    Args:
        name: a name in ``DATA``.
        path: folder or file that holds the data; for ``hf`` the name or the folder of a Hugging
            Face data set; None for data that comes with a library (``digits``).
        validation: fraction of the training images, in [0, 1), that is held out for validation,
            every class in its share; 0 leaves the validation split empty.
        limit: use only this many of the training images (validation included), as many of each
            class as possible; a smaller limit is a subset of a larger one. None uses all.
        seed: chooses which images are kept and which are held out.

    Returns:
        The data; each split is in the order of the files. Mean and standard deviation are those
        of the training split alone.

    Raises:
        ValueError: the name is unknown, or ``DataError``: an argument is out of range, or the
            files are missing, incomplete or damaged.
    """
    if not 0.0 <= validation < 1.0:
        raise DataError(f"validation must lie in [0, 1), got {validation}")
    parts = _read(name, path)
    pool = parts.train if limit is None else _limited(parts.train, limit, seed)
    train, held_out = _split(pool, validation, seed)
    mean, std = channel_statistics(train.images)
    return Data(name, train, held_out, parts.test, parts.classes, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation of each channel on the [0, 1] scale.

    Args:
        images: [N, C, H, W], uint8 or float32 in [0, 1].

    Returns:
        Two float32 [C]; the deviation is 1 where a channel is constant.
    """
    if images.dtype == torch.uint8:
        moments = [_histogram_moments(images[:, channel]) for channel in range(images.shape[1])]
        mean, std = torch.tensor(moments, dtype=torch.float64).unbind(1)
    else:
        pixels = images.double().transpose(0, 1).flatten(1)
        mean, std = pixels.mean(1), pixels.std(1, correction=0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _histogram_moments(channel: Tensor) -> tuple[float, float]:
    """Mean and deviation from the 256 counts: exact, and without a float copy of the images."""
    counts = torch.bincount(channel.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ values) / counts.sum()
    variance = (counts @ (values - mean).square()) / counts.sum()
    return mean.item(), variance.sqrt().item()


def _read(name: str, path: str | os.PathLike[str] | None) -> Parts:
    entry = DATA[name]
    if "path" not in entry.needs:
        if path:
            raise DataError(f"data set {name!r} comes with a library: leave out path={path!s}")
        parts = entry.method()
    elif not path:
        raise DataError(f"data set {name!r} needs path=, the folder or file that holds it")
    else:
        parts = entry.method(os.fspath(path))
    check(parts.train, parts.classes, f"data set {name!r}, training part")
    check(parts.test, parts.classes, f"data set {name!r}, test part")
    if parts.train.images.shape[1:] != parts.test.images.shape[1:]:
        shapes = [list(part.images.shape[1:]) for part in (parts.train, parts.test)]
        raise DataError(f"data set {name!r}: training images {shapes[0]}, test images {shapes[1]}")
    return parts


def _limited(split: Split, limit: int, seed: int) -> Split:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= len(split):
        raise DataError(f"limit must be a whole number in 1..{len(split)}, got {limit!r}")
    index, rank, _ = _ranked(split.labels, seed, "limit")
    return split.take(_first(index, rank.double(), limit))


def _split(pool: Split, validation: float, seed: int) -> tuple[Split, Split]:
    count = round(validation * len(pool))
    if count == len(pool) or (validation > 0 and count == 0):
        raise DataError(
            f"validation={validation} of {len(pool)} training images holds out {count}: "
            "none would be left on one side"
        )
    index, rank, size = _ranked(pool.labels, seed, "validation")
    held_out = torch.zeros(len(pool), dtype=torch.bool)
    held_out[_first(index, (rank + 0.5) / size, count)] = True
    return pool.take((~held_out).nonzero()[:, 0]), pool.take(held_out.nonzero()[:, 0])


def _ranked(labels: Tensor, seed: int, use: str) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle; then tell of each image how many of its class came before, and its class's size."""
    shuffled = torch.randperm(len(labels), generator=derive_generator(seed, use))
    index = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within
    sizes = torch.bincount(labels)
    before = sizes.cumsum(0) - sizes
    rank = torch.arange(len(labels)) - before[labels[index]]
    return index, rank, sizes[labels[index]]


def _first(index: Tensor, key: Tensor, count: int) -> Tensor:
    """Take the ``count`` images of smallest key, and put them back into the order of the files.

    Keyed by rank this is round robin over the classes; keyed by rank over class size every class
    keeps its share to within one image.
    """
    return index[key.argsort(stable=True)[:count]].sort().values

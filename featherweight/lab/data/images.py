"""Decode many encoded images (PNG, JPEG, WebP) into one tensor, in threads."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featherweight.lab.data.base import DataError

GREY = ("1", "L", "LA")
COLOUR = ("P", "RGB", "RGBA", "CMYK", "YCbCr")
CHUNK = 256


def decode_images(names: Sequence[str], read: Callable[[int], bytes]) -> tuple[Tensor, bool]:
    """Decode images of one size to RGB.

    Args:
        names: what to call each image in an error.
        read: gives the encoded bytes of the image at a position; called from several threads.

    Returns:
        uint8 [N, 3, H, W], and whether every image was grey (then the channels are equal).

    Raises:
        DataError: there is no image, one cannot be decoded, or one has another size than the
            first.
    """
    if not names:
        raise DataError("no image to decode")
    first, _ = _pixels(read(0), names[0])
    images = np.empty((len(names), *first.shape), np.uint8)

    def fill(start: int) -> bool:
        grey = True
        for position in range(start, min(start + CHUNK, len(names))):
            pixels, is_grey = _pixels(read(position), names[position])
            if pixels.shape != first.shape:
                raise DataError(_other_size(names[position], pixels, names[0], first))
            images[position] = pixels
            grey = grey and is_grey
        return grey

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        grey = all(list(pool.map(fill, range(0, len(names), CHUNK))))
    return torch.from_numpy(images), grey


def _pixels(encoded: bytes, name: str) -> tuple[NDArray[np.uint8], bool]:
    """Decode one image to uint8 [3, H, W], and tell whether it was grey."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no image that can be decoded: {error}") from error
    if mode not in GREY + COLOUR:
        raise DataError(f"{name} has mode {mode!r}; only 8-bit images are read")
    return pixels.transpose(2, 0, 1), mode in GREY


def _other_size(
    name: str, pixels: NDArray[np.uint8], first_name: str, first: NDArray[np.uint8]
) -> str:
    size, expected = (f"{p.shape[2]}x{p.shape[1]}" for p in (pixels, first))
    return f"{name} is {size} but {first_name} is {expected}: all images must have one size"

"""Random crops and flips of whole batches without a loop over images."""

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


def flip_where(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror some images left to right.

    Args:
        images: [B, C, H, W], any dtype.
        flip: bool [B], which images.
    """
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def crop_flip(images: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
    """Pad every image by 4 zero pixels, cut its own window of the old size out, mirror some.

    Args:
        images: [B, C, H, W], any dtype.
        offset: int64 [B, 2], row and column in 0..8 where the window starts; 4, 4 is the image.
        flip: bool [B], which windows are mirrored left to right.

    Returns:
        [B, C, H, W], on the device of ``images``.
    """
    channels, height, width = images.shape[1:]
    rows = offset[:, :1] + torch.arange(height, device=images.device)
    columns = offset[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None, :]  # B H W
    padded = F.pad(images, (PADDING, PADDING, PADDING, PADDING)).flatten(2)
    every_channel = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    return padded.gather(2, every_channel).view(images.shape)

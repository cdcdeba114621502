"""Batches of a split held on the device: order and augmentation are functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from featherweight.common import unknown
from featherweight.lab.data.augment import PADDING, crop_flip, flip_where
from featherweight.lab.data.base import Split
from featherweight.lab.data.seeding import derive_generator

Augment = Literal["none", "flip", "crop-flip"]


class Draws(NamedTuple):
    """All random numbers of an epoch, one row a position in the epoch.

    Attributes:
        order: int64 [N], which image comes at each position.
        offset: int64 [N, 2], where its crop starts, in 0..8.
        flip: bool [N], whether it is mirrored.
    """

    order: Tensor
    offset: Tensor
    flip: Tensor

    def to(self, device: torch.device) -> Draws:
        """Return a copy on the device."""
        return Draws(*(draw.to(device) for draw in self))


class Batches:
    """Serve a split in batches, without worker processes.

    The split moves to the device once. Every epoch's order and augmentation are drawn anew on the
    CPU from ``(seed, stage, epoch)`` alone: a run that resumes, or one with another number of
    ranks or another device, sees the same batches.

    Images are augmented as pixels (padding is black) and normalised after that, the order that
    torchvision's usual pipeline has: crop and flip, scale to [0, 1], subtract mean, divide by std.

    Args:
        split: what to serve.
        mean: float [C] on the [0, 1] scale; 0 leaves the images as they are.
        std: float [C] on the [0, 1] scale; 1 leaves the images as they are.
        batch_size: images in a whole batch, over all ranks.
        seed: root of all randomness here.
        augment: "none", "flip" (each image mirrored with probability 1/2), or "crop-flip" (also
            shifted by up to 4 pixels each way).
        shuffle: draw a new order every epoch, rather than the order of the split.
        device: where the split lives and the batches come from.
        dtype: of the images served; normalisation is computed in float32.
        rank: which of ``world`` processes this is.
        world: number of processes; rank r gets the images r, r + world, ... of every whole batch.
        drop_last: leave out a last batch that is not full. Kept, it may hold fewer images than
            ranks, and some rank then gets an empty one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: Split,
        mean: Tensor,
        std: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: Augment,
        shuffle: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        _check(augment, batch_size, rank, world)
        self.device, self.dtype = torch.device(device), dtype
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        scale = 1 / 255 if split.images.dtype == torch.uint8 else 1.0
        deviation = std.float().view(-1, 1, 1)
        self._gain = (scale / deviation).to(device)
        self._shift = (-mean.float().view(-1, 1, 1) / deviation).to(device)
        self.batch_size, self.seed = batch_size, seed
        self.augment, self.shuffle = augment, shuffle
        self.rank, self.world = rank, world
        self.served = len(split) // batch_size * batch_size if drop_last else len(split)

    def __len__(self) -> int:
        return -(-self.served // self.batch_size)

    def epoch(self, stage: int | str, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield the batches of one epoch.

        Args:
            stage: names the part of the run (such as a pruning level), so that its epochs differ
                from those of other parts.
            epoch: number of the epoch within the stage.

        Yields:
            Images [B, C, H, W] and labels int64 [B] of this rank, and the number of images of the
            whole batch over all ranks.
        """
        draws = self.draws(stage, epoch).to(self.device)
        for start in range(0, self.served, self.batch_size):
            stop = min(start + self.batch_size, self.served)
            mine = slice(start + self.rank, stop, self.world)
            images = self._normalised(self._augmented(Draws(*(draw[mine] for draw in draws))))
            yield images, self.labels[draws.order[mine]], stop - start

    def draws(self, stage: int | str, epoch: int) -> Draws:
        """Return the random numbers of an epoch, on the CPU, the same on every rank."""
        count = len(self.labels)
        order, generator = (
            derive_generator(self.seed, stage, epoch, use) for use in ("order", "augmentation")
        )
        return Draws(
            torch.randperm(count, generator=order) if self.shuffle else torch.arange(count),
            torch.randint(2 * PADDING + 1, (count, 2), generator=generator),
            torch.rand(count, generator=generator) < 0.5,
        )

    def _augmented(self, draws: Draws) -> Tensor:
        images = self.images[draws.order]
        if self.augment == "crop-flip":
            return crop_flip(images, draws.offset, draws.flip)
        return flip_where(images, draws.flip) if self.augment == "flip" else images

    def _normalised(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images.float(), self._gain).to(self.dtype)


def _check(augment: str, batch_size: int, rank: int, world: int) -> None:
    if augment not in get_args(Augment):
        raise ValueError(unknown("augment", augment, get_args(Augment)))
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0..world-1, got rank={rank} of world={world}")
    if batch_size < world:
        raise ValueError(f"batch_size must be at least world={world}, got {batch_size}")
